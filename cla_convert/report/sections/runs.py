"""Several runs side by side: quality against KV bytes per token, and how each one learned."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from ..comparisons import comparison_of, mean_at
from ..content import Block, Column, Figure, Paragraph, Row, Table
from ..formats import MISSING, change, count, integer, number, percent, percent_interval
from ..run_folder import Json, RunFiles
from ..run_plots import draw_learning, draw_pareto, has_pareto
from ..section import Material, Picture, Section, register
from ..text import Text, note

ALT = "quality against KV bytes per token"
LEARNING = "held-out perplexity and KL over training tokens"
MEANING = (
    "KL: from the source model, nats a token; of the domains their mean. Domains (the mean), wikitext (per word) and "
    "text files: perplexity above the source's."
)
SEVERAL = (
    "The runs were made of different source models: each stands below its own, from which its differences are taken. "
    "Accuracies and held-out perplexities tell the models apart, not only how well they were converted. The picture "
    "has bytes and accuracies as compared with each run's own."
)
FIGURES = (
    Figure(
        "pareto",
        ALT,
        "Bars: the 95% interval of the paired difference from the source. The dotted line joins the runs that no other "
        "one of the same source model beats.",
    ),
    Figure("learning", LEARNING, "Every point of KL is a mean over steps."),
)
_CURVE = 60
"""Points of a curve of training, each the mean of what lies between it and the last."""


def collect(material: Material, report: Json) -> Json:
    """runs: the rows of `rows_of`; empty for a single run."""
    return {"runs": rows_of(material) if material.others else []}


def rows_of(material: Material) -> list[Json]:
    """The source model, and below it the last point and the control of every run that was made of it; the next source.

    Rows of label, point, sharing, kv_heads, init, trained, tokens, kv_bytes_per_token, accuracy, ci95, kl, domains,
    wikitext, held_out, held_out_kl, texts, comparable, stale, incomplete and curves. Accuracy is over the tasks of the
    first run, and None where a run was measured under another specification (comparable: false) or one of both not at
    all (comparable: null). stale: the model was made anew since it was measured. incomplete: what of the point was not
    measured, in words. ci95 is the source's accuracy plus the interval of the paired difference from it, within 0 to 1.
    kl (nats) and domains (perplexity above the source's, a share) are means over the domains; None where these are not
    those of the first run. wikitext is the word perplexity above the source's; texts {name: the same} of text files
    that are those of the first run. held_out and held_out_kl are None where the run's held-out text is not that of the
    first run. curves {validation, kl}: pairs of tokens and value.
    """
    runs, summary = [material.run, *material.others], material.comparison["mean_accuracy"]
    labels = _labels(runs)
    of_source: dict[str, list[tuple[RunFiles, str]]] = {}
    for run, label in zip(runs, labels, strict=True):
        of_source.setdefault(_source(run) or _source(runs[0]) or "", []).append((run, label))
    rows: list[Json] = []
    for made in of_source.values():
        measured = [(run, label) for run, label in made if "before" in run.results]
        comparable = [(run, label) for run, label in measured if _comparable(material, run, "before")]
        first, name = [*comparable, *measured, *made][0]
        of = f" of {name}" if len(of_source) > 1 else ""
        rows.append(_row(material, first, f"source model{of}", "before", summary))
        for run, label in made:
            rows.append(_row(material, run, label, run.last_point, summary))
            if "control" in run.results:
                rows.append(_row(material, run, f"{label}, control", "control", summary))
    return rows


def _source(run: RunFiles) -> str | None:
    """Which model a run was made of, by its content; None where nothing tells."""
    converted = (run.convert.get("source") or {}).get("fingerprint")
    return run.results.get("before", {}).get("model_fingerprint") or converted


def _row(material: Material, run: RunFiles, label: str, point: str, summary: Json | None) -> Json:
    computed = (run.convert.get("kv_bytes_per_token") or {}).get("before" if point == "before" else "after")
    comparable = _comparable(material, run, point)
    source, shares = point == "before", point not in ("before", "control")
    same_text = run is material.run or _alike(material, run, lambda one: _identity(one.held_out))
    same_domains = run is material.run or _alike(material, run, lambda one: _identity(one.domains))
    return {
        "label": label,
        "point": point,
        "sharing": run.convert.get("sharing") if shares else None,
        "kv_heads": _heads(run) if shares else None,
        "init": run.convert.get("init") if shares else None,
        "trained": None if source else _objective(run),
        "tokens": None if source else run.train.get("tokens"),
        "kv_bytes_per_token": run.kv_cache.get(point, {}).get("bytes_per_token") or computed,
        "accuracy": mean_at(run, summary, point) if comparable else None,
        "ci95": _interval(material, run, summary) if shares and comparable else None,
        **(_domains(run, point) if same_domains and not source else {"kl": None, "domains": None}),
        "wikitext": _wikitext(run, point) if comparable and not source else None,
        "held_out_kl": run.agreement.get(point, {}).get("kl") if same_text and not source else None,
        "texts": {} if source else _texts(material, run, point),
        "held_out": run.held_out.get(point, {}).get("perplexity") if same_text else None,
        "comparable": comparable,
        "stale": point in run.stale,
        "incomplete": run.incomplete.get(point, []),
        "curves": _curves(run, same_text) if shares else {"validation": [], "kl": []},
    }


def _comparable(material: Material, run: RunFiles, point: str) -> bool | None:
    """Whether a point and the source model of its run were measured as the source model of the first run was."""
    found = [
        one.get(name, {}).get("specification_hash")
        for one, name in ((material.run.results, "before"), (run.results, "before"), (run.results, point))
    ]
    return None if None in found else len(set(found)) == 1


def _alike(material: Material, run: RunFiles, identity: Callable[[RunFiles], str | None]) -> bool:
    """Whether something of a run is what it is of the first run."""
    mine, first = identity(run), identity(material.run)
    return mine is not None and mine == first


def _identity(by_point: dict[str, Json]) -> str | None:
    return by_point.get("before", {}).get("identity")


def _heads(run: RunFiles) -> int | None:
    """KV heads of a layer, where they were pooled."""
    heads = run.convert.get("kv_heads") or {}
    return heads.get("after") if heads.get("before") != heads.get("after") else None


def _objective(run: RunFiles) -> str | None:
    """What was minimised; None of a run that did not train."""
    if not run.train:
        return None
    settings = run.recipe.get("train") or {}
    loss, weight = settings.get("loss"), settings.get("cross_entropy_weight") or 0
    return f"{loss} + {weight:g} cross-entropy" if loss == "distill" and weight else loss


def _domains(run: RunFiles, point: str) -> Json:
    """Mean KL over the domains, and the geometric mean of perplexities over the source's, less one."""
    before, last = (run.domains.get(name, {}).get("domains", {}) for name in ("before", point))
    kls = [row.get("kl") for row in last.values()]
    pairs = [(row["perplexity"], before[name]["perplexity"]) for name, row in last.items() if name in before]
    logs = [math.log(new / old) if new and old else None for new, old in pairs]
    mean = _mean(logs)
    return {"kl": _mean(kls), "domains": None if mean is None else math.expm1(mean)}


def _mean(values: Sequence[float | None]) -> float | None:
    """None where one is not known: of a model whose numbers are lost on one kind of text, the others tell little."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _wikitext(run: RunFiles, point: str) -> float | None:
    """Word perplexity above the source's, a share of it."""
    values = [
        run.results.get(name, {}).get("tasks", {}).get("wikitext", {}).get("word_perplexity")
        for name in ("before", point)
    ]
    return values[1] / values[0] - 1 if values[0] and values[1] else None


def _texts(material: Material, run: RunFiles, point: str) -> dict[str, float]:
    """Perplexity of text files above the source's, shares of it: of those that are the same ones in the first run."""
    first, before, last = material.run.texts["before"], run.texts["before"], run.texts[point]
    return {
        name: last[name]["perplexity"] / before[name]["perplexity"] - 1
        for name in first
        if name in last and before.get(name, {}).get("sha256") == first[name].get("sha256")
        and before[name]["perplexity"] and last[name]["perplexity"]
    }  # fmt: skip


def _curves(run: RunFiles, same_text: bool) -> Json:
    validation = [
        [row["tokens"], row["validation_perplexity"]]
        for row in run.metrics
        if same_text and row.get("validation_perplexity") is not None
    ]
    steps = [(row["tokens"], row["kl"]) for row in run.metrics if row.get("kl") is not None]
    width = max(1, math.ceil(len(steps) / _CURVE))
    parts = [steps[start : start + width] for start in range(0, len(steps), width)]
    return {"validation": validation, "kl": [[part[-1][0], sum(kl for _, kl in part) / len(part)] for part in parts]}


def _interval(material: Material, run: RunFiles, summary: Json | None) -> list[float] | None:
    found = comparison_of(run, material.margins, material.seed)["mean_accuracy"]
    if not found or not summary or found["metrics"] != summary["metrics"]:
        return None
    return [min(1.0, max(0.0, found["before"] + end)) for end in found["ci95"]]


def _labels(runs: Sequence[RunFiles]) -> list[str]:
    """Folder names, or whole paths where names repeat."""
    names = [run.path.resolve().name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.path) for run in runs]


def show(report: Json) -> Sequence[Block]:
    """The pictures and the table."""
    if not report["runs"]:
        return []
    pictures = [figure for figure in FIGURES if figure.name in report["plots"]]
    several = sum(run["point"] == "before" for run in report["runs"]) > 1
    warning = [Paragraph(SEVERAL)] if several else []
    return [*warning, *pictures, table(report["runs"]), Paragraph(MEANING, "note")]


def table(runs: Sequence[Json]) -> Table:
    """A row a run."""
    measures = [(title, told) for title, told in _measures(runs) if any(told(run) != MISSING for run in runs)]
    columns = [
        Column("run", text=True), Column("made by", text=True, long=True), Column("KV bytes per token"),
        *(Column(title) for title, _ in measures), Column("accuracy, % [95% CI]", long=True),
    ]  # fmt: skip
    rows = [
        Row(
            [
                _label(run), _made_by(run), integer(run["kv_bytes_per_token"]),
                *(told(run) for _, told in measures), _accuracy(run),
            ]
        )
        for run in runs
    ]  # fmt: skip
    return Table(columns, rows, "cards wide")


def _measures(runs: Sequence[Json]) -> list[tuple[str, Callable[[Json], str]]]:
    """The columns of quality but for the accuracy: those that no run has are left out."""
    texts = dict.fromkeys(name for run in runs for name in run.get("texts") or {})
    return [
        ("KL, domains", lambda run: number(run["kl"], 3)),
        ("KL, held-out", lambda run: number(run.get("held_out_kl"), 3)),
        ("domains", lambda run: change(run["domains"])),
        ("wikitext", lambda run: change(run["wikitext"])),
        *((name, lambda run, name=name: change((run.get("texts") or {}).get(name))) for name in texts),
        ("held-out perplexity", lambda run: number(run["held_out"])),
    ]


def _label(run: Json) -> Text:
    """Of a model that is another one now, the numbers are not; of one whose evaluation was stopped, some are not."""
    said = ["as it was before it was made anew"] if run.get("stale") else []
    said += ["evaluation incomplete"] if run.get("incomplete") else []
    return [f"{run['label']} ", note("; ".join(said))] if said else run["label"]


def _made_by(run: Json) -> str:
    """`cla2-keep-ends, calibrated, distill, 26M tokens`."""
    heads = f"{run['kv_heads']} KV heads" if run["kv_heads"] else ""
    tokens = f"{count(run['tokens'])} tokens" if run["tokens"] else ""
    return ", ".join(str(one) for one in (run["sharing"], heads, run["init"], run["trained"], tokens) if one)


def _accuracy(run: Json) -> Text:
    if run["comparable"] is None:
        return "not measured"
    if not run["comparable"]:
        return "measured differently"
    return [f"{percent(run['accuracy'])} ", note(percent_interval(run["ci95"]))]


def draw(run: RunFiles, report: Json) -> Mapping[str, Picture]:
    """Quality over bytes, where two points have it; and curves, where two runs have some."""
    found, runs = {}, report["runs"]
    if has_pareto(runs):
        found["pareto"] = Picture(ALT, partial(draw_pareto, runs))
    learned = [run for run in runs if any(run["curves"].values())]
    if len(learned) > 1:
        found["learning"] = Picture(LEARNING, partial(draw_learning, learned))
    return found


register(Section("runs", place=60, title="Against other runs", collect=collect, show=show, draw=draw))
