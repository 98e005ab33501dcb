"""Other people's software on converted models: the most used, each in a process of its own."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from cla_convert.models.export import load_model

windowed = pytest.mark.parametrize("converted", ["llama", "gemma3"], indirect=True)


@windowed
def test_left_padded_batches(client: Any, converted: Path) -> None:
    client("generate_padded", converted)


def test_saved_and_loaded_in_a_clean_process(client: Any, converted: Path, tmp_path: Path) -> None:
    client("save_model", converted, tmp_path / "saved")
    client("reload", converted, tmp_path / "saved")


def test_trainer(client: Any, converted: Path, tmp_path: Path) -> None:
    client("trainer", converted, tmp_path / "trained")
    client("reload", tmp_path / "trained", tmp_path / "trained")


@windowed
def test_peft_lora(client: Any, converted: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="PEFT is not installed: pip install 'cla-convert[dev]'")
    client("peft_lora", converted, tmp_path / "adapters")


def test_trl_sft(client: Any, converted: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="TRL is not installed: pip install 'cla-convert[dev]'")
    client("trl_sft", converted, tmp_path / "tuned")
    client("reload", tmp_path / "tuned", tmp_path / "tuned")


def test_transformers_serve(client: Any, converted: Path) -> None:
    client("serve", converted)


def test_lm_eval(client: Any, converted: Path, tmp_path: Path) -> None:
    """The perplexity that its command line finds is that of the logits."""
    text = "The cat sat on the mat in 2024, and ships sailed the sea."
    (tmp_path / "rows.jsonl").write_text(json.dumps({"page": text}) + "\n")
    files = {"test": str(tmp_path / "rows.jsonl")}
    task = {
        "task": "rows", "dataset_path": "json", "dataset_kwargs": {"data_files": files},
        "output_type": "loglikelihood_rolling", "test_split": "test", "doc_to_text": "", "doc_to_target": "{{page}}",
        "metric_list": [{"metric": "bits_per_byte"}], "metadata": {"version": 1},
    }  # fmt: skip
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "rows.yaml").write_text(json.dumps(task))
    arguments = f"pretrained={converted},trust_remote_code=True,dtype=float32"
    client(
        "-m", "lm_eval", "run", "--model", "hf", "--model_args", arguments, "--device", "cpu",
        "--tasks", "rows", "--include_path", tmp_path / "tasks", "--output_path", tmp_path / "out",
    )  # fmt: skip
    (file,) = (tmp_path / "out").rglob("results*.json")
    found = json.loads(file.read_text())["results"]["rows"]["bits_per_byte,none"]
    ids = AutoTokenizer.from_pretrained(converted, trust_remote_code=False)(text, return_tensors="pt").input_ids
    rows = torch.cat((torch.zeros(1, 1, dtype=torch.long), ids), dim=1)  # <|bos|>
    with torch.no_grad():
        logits = load_model(converted, dtype=torch.float32)(input_ids=rows[:, :-1]).logits
    nats = torch.nn.functional.cross_entropy(logits[0], ids[0], reduction="sum").item()
    assert found == abs(found) and math.isclose(found, nats / math.log(2) / len(text.encode()), rel_tol=1e-4)
