"""Build report.json and report.md from the files of a run folder; needs no torch, no model and no network.

Any subset of the stages may have run. A number that was not measured is null in the JSON and a dash in the text.
"""

from pathlib import Path

from ..files import plain, write_json
from .numbers import compare_points, kv_numbers, perplexity_table, summarise, task_table
from .plots import draw_plots
from .render import render
from .run_folder import Json, RunFolder, read_run_folder
from .words import caveats, status, verdict_line


def build_report(run_dir: Path) -> Json:
    """Write report.json, report.md and the pictures (*.png) into `run_dir`; return the report.

    Raises:
        InputError: `run_dir` is not a run folder.
    """
    run = read_run_folder(Path(run_dir))
    report: Json = plain({**collect(run), "plots": draw_plots(run)})
    write_json(run.path / "report.json", report)
    (run.path / "report.md").write_text(render(report), encoding="utf-8")
    return report


def collect(run: RunFolder) -> Json:
    """Everything the report says, as one JSON object (the keys that tools may read)."""
    settings = run.recipe.get("eval") or {}
    seed, margin = int(run.recipe.get("seed") or 0), float(settings.get("margin", 0.01))
    comparisons = compare_points(run, margin, seed)
    tasks = task_table(run, comparisons)
    perplexity, kv = perplexity_table(run, tasks), kv_numbers(run)
    summary = summarise(comparisons, margin, seed)
    return {
        "verdict": verdict_line(summary, perplexity, comparisons.point),
        "status": status(summary),
        "compared": comparisons.point,
        "source": run.convert.get("source") or {"model": (run.recipe.get("source") or {}).get("model")},
        "converted": _converted(run),
        "kv": kv,
        "train": _train(run),
        "perplexity": perplexity,
        "tasks": tasks,
        "mean_accuracy": summary,
        "caveats": caveats(run, kv, comparisons.problems),
        "versions": run.environment.get("versions") or _eval_versions(run),
        "seeds": run.environment.get("seeds") or {"recipe": seed},
        "hardware": run.environment.get("hardware"),
        "hashes": _hashes(run),
        "stage_seconds": _stage_seconds(run),
        "command": _command(run),
        "settings": run.recipe,
    }


def _converted(run: RunFolder) -> Json:
    keys = ("output", "sharing", "init", "kv_source_layers", "parameters", "seconds", "peak_rss_bytes", "groups")
    return {key: run.convert.get(key) for key in keys if key in run.convert}


def _train(run: RunFolder) -> Json | None:
    return {**run.train, "loss_name": (run.recipe.get("train") or {}).get("loss")} if run.train else None


def _eval_versions(run: RunFolder) -> Json:
    return next((result["versions"] for result in run.results.values() if result.get("versions")), {})


def _hashes(run: RunFolder) -> Json:
    """Hashes of the run, of the specification at each point, and of the models that were measured."""
    found: Json = dict(run.environment.get("hashes") or {})
    for point, result in run.results.items():
        found[f"specification_{point}"] = result.get("specification_hash")
        found[f"model_{point}"] = result.get("model_fingerprint")
    return found


def _stage_seconds(run: RunFolder) -> Json:
    """Seconds of every stage, as the pipeline recorded them."""
    found = run.environment.get("stages") or run.environment.get("seconds")
    return dict(found) if isinstance(found, dict) else {}


def _command(run: RunFolder) -> str | None:
    command = run.environment.get("command")
    return " ".join(map(str, command)) if isinstance(command, list) else command
