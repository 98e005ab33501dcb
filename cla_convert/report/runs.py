"""Several runs side by side: accuracy against KV bytes per token."""

from collections.abc import Sequence

from .numbers import mean_at
from .run_folder import Json, RunFiles


def compare_runs(runs: Sequence[RunFiles], summary: Json | None) -> list[Json]:
    """The source model of the first run and the last point of every run, one row each.

    Args:
        runs: run folders; the first sets the standard.
        summary: mean accuracy of the first run: its tasks and metrics are used for all.

    Returns:
        Rows of label, point, sharing, init, tokens, kv_bytes_per_token, accuracy, held_out and comparable. Accuracy is
        None where the run was measured under another specification (comparable: false) or not at all.
    """
    labels = _labels(runs)
    rows = [_row(runs[0], "source model", "before", summary, runs[0])]
    return rows + [_row(run, labels[i], run.last_point, summary, runs[0]) for i, run in enumerate(runs)]


def _row(run: RunFiles, label: str, point: str | None, summary: Json | None, first: RunFiles) -> Json:
    computed = (run.convert.get("kv_bytes_per_token") or {}).get("before" if point == "before" else "after")
    hashes = [one.results.get("before", {}).get("specification_hash") for one in (run, first)]
    comparable = None not in hashes and hashes[0] == hashes[1]
    converted = point != "before"
    return {
        "label": label,
        "point": point,
        "sharing": run.convert.get("sharing") if converted else None,
        "init": run.convert.get("init") if converted else None,
        "tokens": run.train.get("tokens") if converted else None,
        "kv_bytes_per_token": run.kv_cache.get(point or "", {}).get("bytes_per_token") or computed,
        "accuracy": mean_at(run, summary, point) if point and comparable else None,
        "held_out": run.held_out.get(point or "", {}).get("perplexity"),
        "comparable": comparable,
    }


def _labels(runs: Sequence[RunFiles]) -> list[str]:
    """Folder names, or whole paths where names repeat."""
    names = [run.path.resolve().name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.path) for run in runs]
