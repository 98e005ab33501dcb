"""Every family through vLLM: transformers' tokens and log-probabilities, and a KV cache as small as was promised.

Models are converted by the converter, in its own environment, all at once.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import ModelRegistry  # pyright: ignore[reportMissingImports]

from cla_convert.models.families import FAMILIES
from cla_convert.models.kinds import SLIDING
from cla_convert.models.served import FAILS, SERVED
from cla_convert.models.shape import shape_of
from cla_convert.models.whole_rows import WHOLES
from cla_convert.serving.plugin import register
from cla_convert.serving.versions import vllm_version
from tests.tiny import CASES
from tests.vllm.engine import run
from tests.vllm.reference import greedy

PROMPTS = [list(range(3, 40)), [5, 9, 7] * 40, list(range(100, 180))]
CACHE = 2**24
SMALL = {"max_model_len": 384, "max_num_seqs": 4, "max_num_batched_tokens": 64, "kv_cache_memory_bytes": CACHE,
         "threads": 1}  # fmt: skip
FIRST = {family: case for case, (family, _) in reversed(CASES.items())}
"""Of every family, the case that is also served with fewer KV heads."""


def served(folder: Path, work: Path, case: str) -> dict[str, Any]:
    """Answers of a model, compared with transformers'; and a cache for the owners alone."""
    family, release = CASES[case][0], ".".join(vllm_version().split(".")[:2])
    found = run(work, folder, [PROMPTS], **SMALL)
    if family in FAILS.get(release, ()):
        assert f"does not run {FAMILIES[family].code.name}" in found["error"]
        pytest.skip(f"vLLM {release} does not run {family}")
    if family not in SERVED.get(release, FAMILIES) and "error" in found:
        assert "InputError" in found["error"], f"models/served.py does not say that {release} serves {family}"
        pytest.skip(f"vLLM {release} is refused for {family}")
    assert "error" not in found, found["log"][-3000:]
    for ours, theirs in zip(greedy(folder, PROMPTS), found["rounds"][0], strict=True):
        assert theirs["tokens"] == ours["tokens"]
        torch.testing.assert_close(torch.tensor(theirs["logprobs"]), torch.tensor(ours["logprobs"]), rtol=0, atol=1e-3)
    shape = shape_of(json.loads((folder / "config.json").read_text()))
    owners = len(set(shape.kv_source_layers))
    assert found["layers"] == shape.num_layers > owners
    assert f"cla-convert: {owners} of {shape.num_layers} layers keep" in found["log"]
    assert sum(number for number, _ in found["groups"]) == owners
    assert max(number for number, _ in found["groups"]) == found["buffers"]  # groups take blocks of the same buffers
    assert found["free"] == found["blocks"] - 1  # vLLM keeps one block for padding
    assert family in SERVED.get(release, FAMILIES), f"{release} serves {family}: models/served.py should say so"
    return found


def test_the_families_that_vllm_knows_are_those_of_the_table():
    """Read from its own registry: what the plugin registers is served, by the table, or tested to be refused."""
    register()
    known = {name for name in ModelRegistry.models if name.startswith("Cla")}
    wholes = {whole.class_name("ForConditionalGeneration") for whole in WHOLES.values()}  # to be refused
    assert known == {family.class_name("ForCausalLM") for family in FAMILIES.values()} | wholes
    tested = {CASES[case][0] for case in (*SERVABLE, *HYBRIDS)}
    assert tested == FAMILIES.keys()
    assert all(set(families) <= tested - {CASES[case][0] for case in HYBRIDS} for families in SERVED.values())


HYBRIDS = [case for case, (family, _) in CASES.items() if FAMILIES[family].state]
SERVABLE = [case for case in CASES if case not in HYBRIDS]


@pytest.mark.parametrize("case", HYBRIDS)
def test_hybrids_are_refused_with_the_reason(case: str, conversions: Path, tmp_path: Path):
    found = run(tmp_path, conversions / case / "cla2", [PROMPTS], **SMALL)
    assert "layers have no attention" in found["error"] and "Serve it with transformers" in found["error"]


@pytest.mark.parametrize("case", SERVABLE)
def test_served_as_transformers_computes_it(case: str, conversions: Path, tmp_path: Path):
    served(conversions / case / "cla2", tmp_path, case)


@pytest.mark.parametrize(
    "case", [case for family, case in FIRST.items() if family != "gpt_bigcode" and case in SERVABLE]
)
def test_fewer_kv_heads_and_sharing(case: str, conversions: Path, tmp_path: Path):
    """The cache is as large as the conversion promised, to the byte."""
    found = served(conversions / case / "cla2-heads", tmp_path, case)
    promised = json.loads((conversions / case / "promised.json").read_text())
    assert f"KV heads: 1 instead of 2; {promised['cla2-heads']:,} bytes a token" in found["log"]
    if len(found["groups"]) == 1:  # several are padded to equal size
        assert found["bytes"] == found["blocks"] * found["block"] * promised["cla2-heads"]
        assert found["blocks"] == CACHE // (found["block"] * promised["cla2-heads"])
        kinds = shape_of(json.loads((conversions / case / "source/config.json").read_text())).kinds
        if not any(kind.startswith(SLIDING) for kind in kinds):  # of a window, vLLM counts contexts
            assert found["tokens"] == found["blocks"] * found["block"]


def test_bench_and_verify_count_the_bytes_that_were_promised(conversions: Path):
    folder = conversions / "llama"
    promised = json.loads((folder / "promised.json").read_text())
    for kind in ("cla2", "cla2-heads"):
        counted = json.loads((folder / f"{kind}.json").read_text())
        assert counted == {"bench": promised[kind], "verify": {"dynamic": promised[kind], "static": promised[kind]}}
