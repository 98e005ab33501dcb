"""Does an output work for somebody who has only transformers? Checked in a clean process, elsewhere, offline."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..console import command, human_bytes, say
from ..errors import InputError
from ..files import did_you_mean_path, load_json, models_in, refuse_pointer
from .checkpoint import refuse_adapter, refuse_damaged
from .export import refuse_pieces
from .kinds import SLIDING
from .self_test import ROUNDING, check_interface
from .shape import owners_of, shape_of
from .shipped import has_other_code
from .tokenization import has_tokenizer, recorded_ids
from .whole import text_config

SCRIPT = Path(__file__).with_name("clean_check.py")
CACHE_SCRIPT = Path(__file__).with_name("cache_check.py")


def verify_model(folder: Path) -> dict[str, Any]:
    """Load `folder` in a clean process and return what was found, with `ok`.

    Raises:
        InputError: it does not load or a check fails (the reason names which), or the installed transformers is not one
            that models of its family work with.
    """
    return verify_models([folder])[0]


def verify_models(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """As `verify_model`, all in one process. Raises InputError for the first that fails."""
    configs = [check_shares(folder) for folder in folders]
    for folder in folders:
        _check_tokenizer(folder)
    found = _in_a_clean_process(SCRIPT, folders)
    results = [_judged(folder, result) for folder, result in zip(folders, found, strict=True)]
    for config in configs:
        check_interface(config.get("model_type", ""))  # beyond a window too, which here may be too large for that
    return results


def _check_tokenizer(folder: Path) -> None:
    if not has_tokenizer(folder):
        raise InputError(
            f"{folder} has no tokenizer",
            why="The checks read a text. Its source had none either, or its files were taken away.",
            fix="Put the tokenizer of the source model (tokenizer.json, tokenizer_config.json) into the folder.",
        )
    refuse_pointer(folder / "tokenizer.json")
    refuse_pieces(folder)


def check_shares(folder: Path) -> dict[str, Any]:
    """The config of a converted model. Raises InputError if the folder is not there or holds none."""
    fix = "Give the folder that `cla-convert convert`, `uptrain` or `run` wrote."
    if not folder.is_dir():
        what = f"{folder} is a file" if folder.exists() else f"There is no folder {folder}.{did_you_mean_path(folder)}"
        raise InputError(what, fix=fix)
    if not (folder / "config.json").exists():
        raise InputError(f"{folder} is not a model folder", why="It has no config.json.", fix=models_in(folder) or fix)
    refuse_damaged(folder)
    refuse_adapter(folder)  # transformers would check the two together, or fail over the one
    config = text_config(load_json(folder / "config.json"))
    if not config.get("kv_source_layers"):
        raise InputError(
            f"{folder} is not a converted model",
            why="Its config.json has no kv_source_layers: no layer shares keys and values.",
            fix=fix,
        )
    return config


def measure_cache(folder: Path, source: Path | None = None) -> dict[str, Any]:
    """Fill transformers' caches with a model, in a clean process, and count their bytes.

    Args:
        folder: an output folder.
        source: a model to measure beside it; without one, `saved` compares with a cache for every layer, each as large
            as its owner's.

    Returns:
        tokens, kv_source_layers, `bytes` and `unshared_bytes` by kind of cache (dynamic, static), saved (a factor).

    Raises:
        InputError: a model does not load, a consumer has a cache, or the two are not a model and its source.
    """
    folders = [folder, source] if source else [folder]
    found = _in_a_clean_process(CACHE_SCRIPT, folders)
    ours, sources = found[0]["layers"], found[0]["kv_source_layers"]
    if found[-1]["tokens"] != found[0]["tokens"] or len(found[-1]["kv_source_layers"]) != len(sources):
        raise InputError(f"{source} is not the source of {folder}", why="Layers or context differ.")
    for layer, owner in enumerate(sources):
        if (ours["dynamic"][layer] > 0) != (layer == owner):
            raise InputError(f"In {folder}, layer {layer} {'has no' if layer == owner else 'has a'} KV cache")
    readers = [owner for owner in sources if owner is not None]
    theirs = found[1]["layers"] if source else {k: [held[owner] for owner in readers] for k, held in ours.items()}
    shared, unshared = ({kind: sum(held) for kind, held in layers.items()} for layers in (ours, theirs))
    return {
        "folder": str(folder),
        "source": str(source) if source else None,
        "tokens": found[0]["tokens"],
        "kv_source_layers": sources,
        "bytes": shared,
        "unshared_bytes": unshared,
        "saved": unshared["dynamic"] / shared["dynamic"],
    }


def _in_a_clean_process(script: Path, folders: Sequence[Path]) -> list[dict[str, Any]]:
    """What a script of ours prints for each folder. Raises InputError for the first that does not load."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONSTARTUP")}
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
    say(f"loading {' and '.join(str(folder) for folder in folders)} in a clean process, without cla-convert ...")
    with tempfile.TemporaryDirectory() as elsewhere:
        environment["HF_MODULES_CACHE"] = elsewhere  # never reuse code that an earlier load had cached
        done = subprocess.run(
            [sys.executable, "-P", script, *(str(folder.resolve()) for folder in folders)],
            cwd=elsewhere, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        failed = folders[len(found)]
        raise InputError(f"{failed} does not load in a clean process", why=lines[-1], fix=_fix(failed))
    return found


def _judged(folder: Path, result: dict[str, Any]) -> dict[str, Any]:
    """What was found, with the verdict on each check. Raises InputError if one fails."""
    # An output without a record was made before there were any; then its family says how the text must be read.
    recorded = recorded_ids(folder) or result["family_tokenizer_digest"]
    rounding = ROUNDING * result["largest_logit"]
    checks = {
        "loads with the shipped code": result["module"].startswith("transformers_modules"),
        "no weights missing or unexpected": not (result["missing_keys"] or result["unexpected_keys"]),
        "all weights are finite": not result["not_finite"],
        "logits are finite": result["logits_finite"],
        "logits with and without cache agree": result["cached_difference"] <= rounding,
        "logits token by token agree": result["stepwise_difference"] <= rounding,
        "the cache holds the owners only": result["owners_only"],
        "the cache is as large as planned": result["layer_bytes"] == planned_bytes(folder, result["tokens"]),
        "text becomes the tokens of the source": result["tokenizer_digest"] == recorded,
        "the tokenizer round-trips": result["tokenizer_round_trip"],
        "it generates": result["generated_tokens"] > 0,
    }
    result |= {"folder": str(folder), "checks": checks, "ok": all(checks.values())}
    if not result["ok"]:
        failed = ", ".join(name for name, passed in checks.items() if not passed)
        lost = result["not_finite"]
        named = f" NaN or infinity in {', '.join(lost[:3])}{', ...' if lost[3:] else ''}." if lost else ""
        raise InputError(
            f"{folder} failed verification",
            why=f"Failed: {failed} (transformers {result['transformers']}).{named}",
            fix=_DAMAGED if lost else _fix(folder),
        )
    return result


_DAMAGED = "Check the source's weights, which are copied as they are, or download them again; then convert again."


def _fix(folder: Path) -> str:
    """What to do about a model that fails, by whether its code is what this version ships."""
    if has_other_code(folder):
        return (
            "Its modelling files are not this version's, and may be older than the installed transformers: "
            f"`{command('verify', folder, '--update-code')}` replaces them (weights stay) and checks again."
        )
    return "Convert it again; if it stays, report a bug."


def planned_bytes(folder: Path, tokens: int) -> list[int]:
    """Bytes of each layer's cache in float32 after so many tokens; a full window keeps room for the one to come."""
    shape = shape_of(text_config(load_json(folder / "config.json")))
    per_token, window = shape.kv_bytes_per_token(4, 1), shape.sliding_window
    kept = {kind: min(tokens, window - 1) if window and kind.startswith(SLIDING) else tokens for kind in shape.kinds}
    sources = shape.kv_source_layers
    return [per_token * kept[shape.kinds[layer]] * (source == layer) for layer, source in enumerate(sources)]


def render(result: dict[str, Any]) -> str:
    """The checks, one a line."""
    return "\n".join(f"ok  {name}" for name in result["checks"])


def render_cache(measured: dict[str, Any]) -> str:
    """What `measure_cache` found, in words."""
    sources, tokens = measured["kv_source_layers"], measured["tokens"]
    against = measured["source"] or "the same with a cache for every layer"
    rows = [
        f"{kind} cache of {tokens} tokens in float32: {human_bytes(measured['bytes'][kind])}; "
        f"{against}: {human_bytes(measured['unshared_bytes'][kind])}"
        for kind in measured["bytes"]
    ]
    owners, readers = len(owners_of(sources)), sum(source is not None for source in sources)
    which = f"{readers} layers" if readers == len(sources) else f"the {readers} layers with attention"
    return "\n".join([*rows, f"{owners} of {which} hold keys and values: {measured['saved']:.2f}x smaller"])
