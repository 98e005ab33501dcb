"""Does an output work for somebody who has only transformers? Checked in a clean process, elsewhere, offline."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from ..errors import InputError

# Runs in the clean process: `cla_convert` is made unimportable, so the shipped code is what loads.
_SCRIPT = """
import json, sys
sys.modules["cla_convert"] = None
folder = sys.argv[1]
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model, info = AutoModelForCausalLM.from_pretrained(
    folder, trust_remote_code=True, dtype=torch.float32, output_loading_info=True)
model.eval()
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
text = "The quick brown fox jumps over the lazy dog."
ids = tokenizer(text, return_tensors="pt").input_ids
with torch.inference_mode():
    full = model(ids, use_cache=False).logits
    cached = model(ids, use_cache=True).logits
    cache, steps = None, []
    for i in range(ids.shape[1]):
        out = model(ids[:, i:i + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        steps.append(out.logits)
    new = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
states = [t for layer in cache.layers for t in (layer.keys, layer.values) if t is not None]
sources = getattr(model.config, "kv_source_layers", list(range(model.config.num_hidden_layers)))
print(json.dumps({
    "module": type(model).__module__,
    "missing_keys": sorted(info["missing_keys"]),
    "unexpected_keys": sorted(info["unexpected_keys"]),
    "cached_difference": (full - cached).abs().max().item(),
    "stepwise_difference": (full - torch.cat(steps, 1)).abs().max().item(),
    "logits_finite": bool(full.isfinite().all()),
    "largest_logit": full.abs().max().item(),
    "cached_layers": len(states) // 2,
    "owners": len(set(sources)),
    "tokenizer_round_trip": tokenizer.decode(ids[0], skip_special_tokens=True) == text,
    "generated": tokenizer.decode(new[0, ids.shape[1]:]),
}))
"""


def verify_model(folder: Path) -> dict[str, Any]:
    """Load `folder` in a clean process and return what was found, with `ok`.

    Raises:
        InputError: it does not load or a check fails (the reason names which).
    """
    if not (folder / "config.json").exists():
        raise InputError(f"{folder} is not a model folder", why="It has no config.json.")
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONSTARTUP")}
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
    with tempfile.TemporaryDirectory() as elsewhere:
        environment["HF_MODULES_CACHE"] = elsewhere  # never reuse code that an earlier load had cached
        done = subprocess.run(
            [sys.executable, "-c", _SCRIPT, str(folder.resolve())],
            cwd=elsewhere, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise InputError(f"{folder} does not load in a clean process", why=lines[-1], fix="Convert it again.")
    result = json.loads(done.stdout.strip().splitlines()[-1])
    rounding = 1e-3 * result["largest_logit"]  # float32 sums in another order; a wrong cache is off by far more
    checks = {
        "loads with the shipped code": result["module"].startswith("transformers_modules"),
        "no weights missing or unexpected": not (result["missing_keys"] or result["unexpected_keys"]),
        "logits are finite": result["logits_finite"],
        "logits with and without cache agree": result["cached_difference"] <= rounding,
        "logits token by token agree": result["stepwise_difference"] <= rounding,
        "the cache holds the owners only": result["cached_layers"] == result["owners"],
        "the tokenizer round-trips": result["tokenizer_round_trip"],
    }
    result |= {"folder": str(folder), "checks": checks, "ok": all(checks.values())}
    if not result["ok"]:
        failed = ", ".join(name for name, passed in checks.items() if not passed)
        raise InputError(
            f"{folder} failed verification",
            why=f"Failed: {failed}.",
            fix="Convert it again; if it stays, report a bug.",
        )
    return result


def render(result: dict[str, Any]) -> str:
    """The checks, one a line."""
    return "\n".join(f"ok  {name}" for name in result["checks"])
