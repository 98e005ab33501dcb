"""Build report.json, report.md and report.html from the files of a run folder; needs no torch, no model, no network.

Any subset of the stages may have run. A number that was not measured is null in the JSON and a dash in the text.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..files import plain, write_bytes, write_json
from ..recipe import Train
from .domains import domain_advice, domain_table
from .figures import to_png, to_svg
from .flips import find_flips
from .grids import find_grids
from .numbers import comparison_of, control_comparison, kv_numbers, mean_at, perplexity_table, task_table
from .page import render_page
from .plots import draw_bench, draw_curves, draw_pareto
from .render import render
from .run_folder import POINTS, Json, RunFiles, explained, read_run_folder
from .runs import compare_runs
from .sharing import draw_sharing
from .words import caveats, control_statement, verdict_line

ALT = {
    "loss": "training loss and held-out perplexity over tokens",
    "sharing": "which layers share keys and values",
    "pareto": "mean accuracy against KV bytes per token",
    "bench": "tokens per second over batch size",
}


def build_report(run_dir: Path, others: Sequence[Path] = ()) -> Json:
    """Write report.json, report.md, report.html and the pictures (*.png) into `run_dir`; return the report.

    Args:
        run_dir: the run to report on.
        others: further run folders to compare it with; they are only read.

    Raises:
        InputError: one of the folders is not a run folder, or a file in it does not hold what a stage leaves.
        UsageError: the same, of its recipe.
    """
    run, *rest = (read_run_folder(Path(folder)) for folder in (run_dir, *others))
    with explained(run_dir):
        report = collect(run, rest)
        figures = _figures(run, report)
        pictures = {name: to_png(figure) for name, figure in figures.items()}
        report = plain({**report, "plots": {name: run.files.picture(name).name for name in figures}})
        svgs = {name: to_svg(figure, name, ALT[name]) for name, figure in figures.items()}
        texts = {"md": render(report), "html": render_page(report, svgs)}
    write_json(run.files.report, report)
    for name, picture in pictures.items():
        write_bytes(run.files.picture(name), picture)
    for name, text in texts.items():
        write_bytes(run.files.pages[name], text.encode("utf-8", errors="backslashreplace"))
    return report


def collect(run: RunFiles, others: Sequence[RunFiles] = ()) -> Json:
    """Everything the report says, as one JSON object (the keys that tools may read)."""
    settings = run.recipe.get("eval") or {}
    seed, margin = int(run.recipe.get("seed") or 0), float(settings.get("margin", 0.01))
    comparison = comparison_of(run, margin, seed)
    against = control_comparison(run, margin, seed)
    tasks = task_table(run, comparison, against)
    perplexity, kv = perplexity_table(run, tasks, comparison, against), kv_numbers(run)
    summary, point = comparison["mean_accuracy"], comparison["compared"]
    control, domains = _control(run, against, perplexity), domain_table(run)
    return {
        "verdict": verdict_line(summary, perplexity, point),
        "status": comparison["status"],
        "compared": point,
        "source": run.convert.get("source") or {"model": (run.recipe.get("source") or {}).get("model")},
        "converted": _converted(run),
        "kv": kv,
        "train": _train(run),
        "perplexity": perplexity,
        "tasks": tasks,
        "mean_accuracy": summary and summary | {"at": {name: mean_at(run, summary, name) for name in POINTS}},
        "gate": comparison.get("gate"),
        "control": control,
        "agreement": {p: {k: v for k, v in row.items() if k != "windows"} for p, row in run.agreement.items()},
        "domains": domains,
        "domain_advice": domain_advice(domains),
        "grids": find_grids(run, tasks),
        "flips": find_flips(run, tasks, point),
        "bench": run.bench or None,
        "runs": compare_runs([run, *others], summary) if others else [],
        "caveats": caveats(run, kv, comparison),
        "versions": run.environment.get("versions") or _eval_versions(run),
        "seeds": run.environment.get("seeds") or {"recipe": seed},
        "hardware": run.environment.get("hardware"),
        "hashes": _hashes(run),
        "stage_seconds": _stage_seconds(run),
        "command": _command(run),
        "settings": run.recipe,
    }


def _figures(run: RunFiles, report: Json) -> dict[str, Any]:
    """The pictures that there are numbers for."""
    drawn: dict[str, Any] = {}
    if sum(row.get("loss") is not None for row in run.metrics) > 1:
        source = run.held_out.get("before", {}).get("perplexity")
        drawn["loss"] = draw_curves(run.metrics, run.control_metrics, source)
    if report["converted"].get("kv_source_layers"):
        drawn["sharing"] = draw_sharing(report["converted"])
    if sum(row["accuracy"] is not None and row["kv_bytes_per_token"] is not None for row in report["runs"]) > 1:
        drawn["pareto"] = draw_pareto(report["runs"])
    if run.bench:
        drawn["bench"] = draw_bench(run.bench)
    return drawn


def _control(run: RunFiles, against: Json | None, perplexity: dict[str, Json]) -> Json | None:
    """The control and what it says; None where none was asked for or it is not trained yet."""
    settings = Train.model_construct(**(run.recipe.get("train") or {}))
    if against or run.control_train:
        summary = against["mean_accuracy"] if against else None
        control: Json = {"kind": "trained", "train": run.control_train or None, "mean_accuracy": summary}
    elif settings.control and settings.tokens and not settings.needs_control:
        control = {"kind": "source", "train": None, "mean_accuracy": None}
    else:
        return None
    return control | {"statement": control_statement(control, perplexity)}


def _converted(run: RunFiles) -> Json:
    keys = ("output", "sharing", "init", "kv_source_layers", "parameters", "seconds", "peak_rss_bytes", "groups")
    return {key: run.convert.get(key) for key in keys if key in run.convert}


def _train(run: RunFiles) -> Json | None:
    return {**run.train, "loss_name": (run.recipe.get("train") or {}).get("loss")} if run.train else None


def _eval_versions(run: RunFiles) -> Json:
    return next((result["versions"] for result in run.results.values() if result.get("versions")), {})


def _hashes(run: RunFiles) -> Json:
    """Hashes of the run, of the specification at each point, and of the models that were measured."""
    found: Json = dict(run.environment.get("hashes") or {})
    for point, result in run.results.items():
        found[f"specification_{point}"] = result.get("specification_hash")
        found[f"model_{point}"] = result.get("model_fingerprint")
    return found


def _stage_seconds(run: RunFiles) -> Json:
    """Seconds of every stage, as the pipeline recorded them."""
    found = run.environment.get("stages") or run.environment.get("seconds")
    return dict(found) if isinstance(found, dict) else {}


def _command(run: RunFiles) -> str | None:
    command = run.environment.get("command")
    return " ".join(map(str, command)) if isinstance(command, list) else command
