"""Files of a run folder, as the stages leave them, for tests of the report."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import yaml

from cla_convert.files import write_json

KV_MAP = [0, 1, 1, 3, 3, 5]
RIGHT = {"before": 60, "converted": 30, "after": 58, "control": 64}
NLL = {"before": 3.0, "converted": 6.0, "after": 3.2, "control": 2.5}


def write_point(folder: Path, point: str, specification: str = "s" * 64, n: int = 100) -> None:
    """One evaluated point: piqa with RIGHT of n right, wikitext with NLL nats per word, held-out text, KV cache."""
    samples = {
        "piqa": [{"acc": float(i < RIGHT[point])} for i in range(n)],
        "wikitext": [{"word_perplexity": [-NLL[point] * (50 + i), 50 + i]} for i in range(8)],
    }
    scores = {"piqa": {"acc": RIGHT[point] / n}, "wikitext": {"word_perplexity": math.exp(NLL[point])}}
    for task, rows in samples.items():
        entries = [
            {"task": task, "doc_id": i, "doc_hash": f"d{i}", "prompt_hash": f"p{i}", "target_hash": "t", "metrics": row}
            for i, row in enumerate(rows)
        ]
        write_json(folder / "eval" / point / "tasks" / f"{task}.json", {"task": task, "samples": entries})
    tasks = {name: {"source": "offline pack", "n": len(rows)} for name, rows in samples.items()}
    write_json(folder / "eval" / point / "results.json", {
        "tasks": scores, "n": {name: len(rows) for name, rows in samples.items()}, "specification_hash": specification,
        "specification": {"tasks": tasks}, "versions": {"torch": "2"}, "model_fingerprint": f"model of {point}",
    })  # fmt: skip
    # In every window the same change; one has a little more of it, the next one as much less.
    windows = [[64 * math.log(10 * NLL[point]) + (-1) ** i * NLL[point], 64] for i in range(64)]
    held_out = {"perplexity": 10 * NLL[point], "tokens": 4096, "windows": windows}
    write_json(folder / "eval" / point / "held_out.json", held_out)
    kv = {"measured_bytes": 64 * 768, "bytes_per_token": 768.0, "tokens": 64, "cached_layers": 6, "dtype": "float32"}
    half = {"measured_bytes": 64 * 384, "bytes_per_token": 384.0, "cached_layers": 3}
    write_json(folder / "eval" / point / "kv_cache.json", kv if point == "before" else kv | half)


def add_everything(folder: Path) -> Path:
    """Add what only some runs have: calibration, a control, texts, agreement, long contexts, samples, bench."""
    convert = json.loads((folder / "convert.json").read_text())
    pair = {"captured_k": 0.92, "captured_v": 0.81}
    convert["groups"] = [
        {"layers": [0]}, {"layers": [1, 2], "damage": 0.02, **pair}, {"layers": [3, 4], "damage": 0.04, **pair},
        {"layers": [5]},
    ]  # fmt: skip
    write_json(folder / "convert.json", convert | {"init": "calibrated"})
    write_point(folder, "control")
    write_json(folder / "control" / "train.json", {"tokens": 4096, "loss": 1.4, "seconds": 9, "device": "cpu"})
    (folder / "control" / "metrics.jsonl").write_text((folder / "metrics.jsonl").read_text())
    for point in RIGHT:
        where = folder / "eval" / point
        write_json(where / "perplexity" / "law.json", {"perplexity": 5 * NLL[point], "tokens": 2048})
        answer = {"prompt": "Who is there?", "text": f"Nobody {point}.", "cut": point == "after"}
        write_json(where / "answers.json", {"answers": [answer], "identity": point})
        grid = [{"length": n, "depth": d, "n": 4, "acc": RIGHT[point] / 100} for n in (512, 1024) for d in (0.0, 0.5)]
        _edit(where / "tasks" / "piqa.json", lambda task, grid=grid: task | {"grid": grid})
        _edit(where / "tasks" / "piqa.json", lambda task, point=point: _with_texts(task, RIGHT[point]))
    agreement = {"kl": 0.12, "top1": 0.81, "tokens": 4096, "ci95": {"kl": [0.1, 0.14], "top1": [0.8, 0.82]}}
    for point in ("converted", "after", "control"):
        write_json(folder / "eval" / point / "agreement.json", agreement)
    write_domains(folder)
    write_json(folder / "bench.json", bench_result())
    return folder


DOMAINS = {"law": (0.4, 0.1, False, 0.0), "code": (0.9, 0.6, False, 0.0), "news": (0.2, 0.02, True, 0.3)}
"""Name -> KL converted and after, whether such text was trained on, and how much of this very text."""


def write_domains(folder: Path) -> None:
    """Three domains: perplexity 20 at the source, and e^KL times as much elsewhere."""
    for point, index in (("before", None), ("converted", 0), ("after", 1), ("control", 1)):
        rows = {}
        for name, values in DOMAINS.items():
            kl = values[index] if index is not None else 0.0
            rows[name] = {"perplexity": 20 * math.exp(kl), "tokens": 512} | ({"kl": kl} if index is not None else {})
        if (folder / "eval" / point).exists():
            write_json(folder / "eval" / point / "domains.json", {"domains": rows, "identity": point})
    touched = {
        name: {"touched": kind, "contained": share, "similarity": 0.4, "held_out_similarity": 0.5}
        for name, (_, _, kind, share) in DOMAINS.items()
    }
    write_json(folder / "eval" / "domains.json", {"text": "digest", "domains": touched})


def _edit(path: Path, change: Callable[[dict], dict]) -> None:
    write_json(path, change(json.loads(path.read_text())))


def _with_texts(task: dict, right: int) -> dict:
    """Two choices a document; the model prefers the first, the right one, where it is right."""
    for i, sample in enumerate(task["samples"]):
        likelihoods = [-1.0, -2.0] if i < right else [-3.0, -2.5]
        texts = {"prompt": f"Question {i}?", "choices": [" yes", " no"], "target": 0}
        sample |= texts | {"loglikelihoods": likelihoods}
    return task


def bench_result() -> dict:
    """What `cla-convert bench` measures, in round numbers: twice the batch, twice the context."""
    models, speed = {}, []
    for name, size, layers, largest, rate in (("source", 768, 6, 8, 100.0), ("converted", 384, 3, 16, 110.0)):
        models[name] = {
            "model": name, "weight_bytes": 1000, "length": 64, "largest_batch": largest,
            "longest_context": 64 * largest, "max_position_embeddings": 512,
            "kv": {
                "bytes_per_token": size, "layer_bytes_per_token": [128.0] * layers + [0.0] * (6 - layers), "layers": 6,
            },
        }  # fmt: skip
        for phase, batch in (("prefill", 1), ("decode", 1), ("decode", 8), ("decode", 16)):
            row = {"model": name, "phase": phase, "batch": batch, "fits": batch <= largest}
            runs = [batch * rate * factor for factor in (0.9, 1.0, 1.1)]
            speed.append(row | ({"tokens_per_second": runs[1], "low": runs[0], "high": runs[2], "runs": runs,
                                 "steps": None} if row["fits"] else {}))  # fmt: skip
    return {
        "device": "cuda", "dtype": "bfloat16", "prompt": 56, "new": 8, "turns": 3, "seconds": 60.0, "cut": [],
        "models": models,
        "memory": {"bytes": 10**9, "enforced": True, "meaning": "for all that torch allocates."}, "speed": speed,
    }  # fmt: skip


def write_run(folder: Path) -> Path:
    """A run of every stage on a tiny map."""
    for point in ("before", "converted", "after"):
        write_point(folder, point)
    recipe = {"source": {"model": "org/tiny"}, "train": {"loss": "distill"}, "eval": {"margin": 0.01}, "seed": 3}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    write_json(folder / "convert.json", {
        "output": "converted", "sharing": "cla2-keep-ends", "init": "mean", "kv_source_layers": KV_MAP,
        "kv_bytes_per_token": {"before": 768, "after": 384}, "parameters": {"before": 100, "after": 90}, "seconds": 1.5,
        "source": {"model": "org/tiny", "license": "mit", "sha256": "ab", "quantization": "Q4_1"},
    })  # fmt: skip
    write_json(
        folder / "train.json", {"tokens": 4096, "steps": 4, "tokens_per_second": 1000.0, "loss": 1.5, "seconds": 9}
    )
    rows = [{"step": i, "tokens": 1024 * i, "loss": 5.0 - i} for i in (1, 2, 3, 4)]
    rows.append({"tokens": 4096, "validation_perplexity": 33.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 5, "tok')
    write_json(folder / "environment.json", {
        "command": "cla-convert run recipe.yaml --out run", "versions": {"torch": "2.13.0"}, "seeds": {"seed": 3},
        "hardware": {"cores": 2, "memory_bytes": 2**33, "gpus": []}, "stages": {"convert": 1.5},
    })  # fmt: skip
    return folder
