"""Peak memory of uptraining: what was foreseen beside what was measured, each in a process of its own.

    python benchmarks/training_memory.py                             # on a GPU: the pairs of docs/measurements.md
    python benchmarks/training_memory.py --only 1.2B --compile no    # other pairs
    python benchmarks/training_memory.py --device cpu --only tiny    # to try the script

Random models and tokens, nothing is downloaded; the models (32 GB for 8B) lie in a temporary folder. `foreseen` and
`measured` are bytes of tensors (torch.cuda.max_memory_allocated, from loading to the last step); `reserved` is what the
allocator took from the driver for them. On a CPU `measured` counts every tensor of a step with a dispatch mode, beside
what was there.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GIB = 2**30


@dataclass(frozen=True)
class Shape:
    """A Llama by its sizes, and how it is trained."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool
    length: int
    rows: int
    settings: dict[str, Any]
    variants: tuple[bool, ...] = (True,)
    """Whether compiled, unless --compile says."""


SHAPES = {
    "tiny": Shape(128, 384, 6, 4, 2, 512, True, 128, 2, {}, (False,)),
    "135M": Shape(576, 1536, 30, 9, 3, 49152, True, 1024, 32, {}, (False, True)),
    "1.2B": Shape(2048, 8192, 16, 32, 8, 128256, True, 2048, 4, {}),
    "8B attention": Shape(4096, 14336, 32, 32, 8, 128256, False, 2048, 1, {"parameters": "attention"}),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="135M,1.2B,8B attention", help=f"comma-separated, of {', '.join(SHAPES)}")
    parser.add_argument("--compile", choices=["yes", "no"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=180, help="begin no measurement after so long")
    parser.add_argument("--out", help="JSON file for the rows")
    parser.add_argument("--folder", default="/dev/shm" if Path("/dev/shm").exists() else None, help="for the models")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        name, compiled, folder = json.loads(options.one)
        print(json.dumps(measure(SHAPES[name], compiled, Path(folder), options.device, options.steps)))
        return 0
    rows, deadline = [], time.monotonic() + options.seconds
    for name in options.only.split(","):
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            for compiled in SHAPES[name].variants if options.compile is None else [options.compile == "yes"]:
                if time.monotonic() < deadline:
                    rows.append({"model": name, "compiled": compiled, **in_a_process(name, compiled, folder, options)})
                    print(line(rows[-1]), flush=True)
    if options.out:
        Path(options.out).write_text(json.dumps(rows, indent=2))
    return 0 if all("error" not in row for row in rows) else 1


def in_a_process(name: str, compiled: bool, folder: str, options: argparse.Namespace) -> dict[str, Any]:
    """Measure in a fresh process: memory, and what CUDA keeps, start from nothing."""
    command = [sys.executable, __file__, "--one", json.dumps([name, compiled, folder])]
    command += ["--device", options.device, "--steps", str(options.steps)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no output"])[-1][:200]}
    return json.loads(done.stdout.splitlines()[-1])


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    what = f"{row['model']:<14} {'compiled' if row['compiled'] else 'not compiled':<14}"
    if "error" in row:
        return f"{what} {row['error']}"
    foreseen, measured = row["foreseen"] / GIB, row["measured"] / GIB
    return (
        f"{what} {row['rows']:>3} x {row['length']:<5} foreseen {foreseen:7.3f} GiB  measured {measured:7.3f} GiB  "
        f"ratio {foreseen / measured:.3f}  reserved {row['reserved'] / GIB:7.3f} GiB  {row['seconds']:.0f} s"
    )


def measure(shape: Shape, compiled: bool, folder: Path, device: str, steps: int) -> dict[str, Any]:
    """Train some steps; what was foreseen and what was the peak."""
    started = time.monotonic()
    import numpy as np
    import torch

    from cla_convert.recipe import Recipe, Train
    from cla_convert.training.data import TokenStore
    from cla_convert.training.state import Position, TrainingStates
    from cla_convert.training.step import take_step
    from cla_convert.training.trainer import set_up

    batch = 2 * shape.rows * shape.length
    train = Train(
        tokens=steps * batch, sequence_length=shape.length, batch_tokens=batch, micro_batch_size=shape.rows,
        precision="bfloat16", compile=compiled, **shape.settings,
    )  # fmt: skip
    tokens = np.random.default_rng(0).integers(0, shape.vocabulary, size=(steps + 1) * batch).astype(np.uint32)
    store = TokenStore(tokens, tokens[: shape.length], "random", {}, np.zeros(0, dtype=np.int64))
    source, student = folder / "source", folder / "student"
    if not student.exists():
        write_models(shape, source, student, device)
    if device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    trainer = set_up(student, source, Recipe(train=train), device, data=store)
    checkpoints, position = TrainingStates(folder / "checkpoints", {}, 1), Position()
    peak = 0
    for _ in range(steps):
        if device == "cpu":
            position, peak = tracked(trainer, position, checkpoints)
        else:
            position, _ = take_step(trainer, position, checkpoints)
    return {
        "rows": shape.rows,
        "length": shape.length,
        "foreseen": trainer.forecast.needs(shape.rows).peak,
        "measured": peak or torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.max_memory_reserved() if device != "cpu" else 0,
        "seconds": time.monotonic() - started,
    }


def tracked(trainer: Any, position: Any, checkpoints: Any) -> tuple[Any, int]:
    """A step on the CPU, and the bytes of tensors at its peak."""
    from cla_convert.training.rehearsal import _Live
    from cla_convert.training.step import take_step

    models = [model for model in (trainer.student, trainer.objective.teacher) if model is not None]
    there = [tensor for model in models for tensor in model.parameters()]
    there += [value for each in trainer.optimizers for state in each.state.values() for value in state.values()]
    with _Live() as live:
        position, _ = take_step(trainer, position, checkpoints)
    return position, live.peak + sum({t.untyped_storage()._cdata: t.nbytes for t in there}.values())


def write_models(shape: Shape, source: Path, student: Path, device: str) -> None:
    """A random source model in bfloat16, made on the device, and its conversion."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from cla_convert.conversion.convert import convert
    from cla_convert.conversion.plan import make_plan
    from cla_convert.models.checkpoint import Checkpoint

    config = LlamaConfig(
        hidden_size=shape.hidden, intermediate_size=shape.inner, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, vocab_size=shape.vocabulary,
        tie_word_embeddings=shape.tied, max_position_embeddings=8192, dtype="bfloat16",
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)  # never in float32: 8B would take 32 GB
    with torch.device(device):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(source)
    del model
    checkpoint = Checkpoint.open(source)
    convert(make_plan(checkpoint, sharing="cla2-keep-ends", init="first"), checkpoint, student)


if __name__ == "__main__":
    sys.exit(main())
