"""The verdict on a converted model: every measure that has a margin, held against it.

Three kinds of measures are judged, each by its 95% interval and a margin fixed beforehand: the mean accuracy over
tasks, the perplexity of every text and the KL divergence from the source model on held-out text. A single task is
judged too, but only for being worse than the margin (one-sided, Holm over tasks): a mean can hide one that collapsed.
So is one whose metric is a share and not 0 or 1 (f1), by its own interval; one whose metric has no margin at all (bleu)
is named, and leaves the verdict open.

    margin_broken   one of them is shown to be worse than its margin
    within_margin   all of them are shown to be within theirs, and nothing could not be compared
    inconclusive    neither
    not_measured    there is nothing to judge
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

from ..recipe import Evaluate
from .statistics import BROKEN, INCONCLUSIVE, WITHIN, rise_verdict

Json = dict[str, Any]
NOT_MEASURED = "not_measured"
NOT_COMPARED = "not_compared"
NOT_JUDGED = "not_judged"
LEVEL = 0.025
"""One-sided error of a test, the same as of one end of a 95% interval."""
JUDGED_UNITS = ("word_perplexity", "byte_perplexity")
"""Perplexities of tasks that are those of a text. That of single answers (lambada) goes with their accuracy."""


@dataclass(frozen=True)
class Margins:
    """What may be lost."""

    accuracy: float = 0.01
    """In accuracy: 0.01 is one point."""
    perplexity: float = 0.05
    """As a share of the source model's perplexity."""
    kl: float = 0.1
    """In nats per token."""

    @classmethod
    def of(cls, settings: Evaluate) -> "Margins":
        """The margins of a recipe."""
        return cls(settings.margin, settings.perplexity_margin, settings.kl_margin)

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return asdict(self)


def judge(
    mean: Json | None,
    tasks: dict[str, dict[str, Json]],
    perplexity: dict[str, Json],
    agreement: Json | None,
    problems: list[str],
    margins: Margins,
) -> Json:
    """`{status, judged, gate}` of a comparison.

    Args:
        mean: mean accuracy over tasks, as `paired.macro_average` gives it.
        tasks: rows by task and metric.
        perplexity: rows by text.
        agreement: of the last point with the source model; None where it was not measured.
        problems: what could not be compared, in words.
        margins: fixed beforehand.

    Returns:
        judged: rows of {scope, measure, delta, ci95, margin, verdict}, in the order in which they are told.
        gate: {state, passed, reasons}: state is `passed`, `inconclusive` or `failed`; see gate.py.
    """
    judged = [*_means(mean), *_texts(tasks, perplexity, margins), *_kl(agreement, margins), *_single_tasks(tasks)]
    unjudged = _unjudged(tasks)
    verdicts = {row["verdict"] for row in judged}
    if BROKEN in verdicts:
        status = BROKEN
    elif not judged:
        status = NOT_MEASURED
    else:
        status = WITHIN if verdicts == {WITHIN} and mean and not problems and not unjudged else INCONCLUSIVE
    return {"status": status, "judged": judged, "gate": _gate(status, judged, mean is None, problems, unjudged)}


def _gate(status: str, judged: list[Json], unmeasured: bool, problems: list[str], unjudged: list[Json]) -> Json:
    """Absent numbers must not open a gate: what was not measured or could not be compared fails it."""
    reasons: list[Json] = [{"scope": "task", "code": NOT_COMPARED, "why": problem} for problem in problems]
    reasons += [{"scope": "mean", "code": NOT_MEASURED}] if unmeasured else []
    absent = bool(reasons)
    reasons += [{**row, "code": row["verdict"]} for row in judged if row["verdict"] != WITHIN] + unjudged
    state = "failed" if absent or status == BROKEN else "passed" if status == WITHIN else "inconclusive"
    return {"state": state, "passed": state == "passed", "reasons": reasons}


def _means(mean: Json | None) -> list[Json]:
    return [_row("mean", "accuracy", mean["delta"], mean["ci95"], mean["margin"], mean["verdict"])] if mean else []


def _texts(tasks: dict[str, dict[str, Json]], perplexity: dict[str, Json], margins: Margins) -> list[Json]:
    """Every text once: what a task says per word and per byte is about the same text."""
    rows = list(perplexity.items())
    rows += [(task, metrics[unit]) for task, metrics in tasks.items() for unit in JUDGED_UNITS if unit in metrics]
    chosen: dict[str, Json] = {}
    for name, row in rows:
        chosen.setdefault(name, row)
    return [_text(name, row, margins.perplexity) for name, row in chosen.items()]


def _text(name: str, row: Json, margin: float) -> Json:
    """A perplexity that is no number any more (the JSON says null) is as bad as it gets."""
    before, after, interval = row["before"], row["after"], row.get("relative_ci95")
    lost = before is not None and math.isfinite(before) and (after is None or not math.isfinite(after))
    change = None if lost or before is None or not math.isfinite(before) else after / before - 1
    return _row(name, "perplexity", change, interval, margin, BROKEN if lost else rise_verdict(interval, margin))


def _kl(agreement: Json | None, margins: Margins) -> list[Json]:
    """A divergence that is no number is as bad as it gets, likewise."""
    if not agreement:
        return []
    kl, interval = agreement["kl"], agreement["ci95"]["kl"]
    lost = kl is None or not math.isfinite(kl)
    interval = None if lost or interval is None or None in interval else interval
    return [_row("held_out", "kl", kl, interval, margins.kl, BROKEN if lost else rise_verdict(interval, margins.kl))]


def _single_tasks(tasks: dict[str, dict[str, Json]]) -> list[Json]:
    """Those that are worse than the margin by themselves."""
    return [
        {**_row(task, "accuracy", row["delta"], row["ci95"], row["margin"], BROKEN), "metric": metric}
        | {"p_inferior_holm": row["p_inferior_holm"]}
        for task, metrics in tasks.items()
        for metric, row in metrics.items()
        if row["primary"] and _worse(row)
    ]


def _worse(row: Json) -> bool:
    """Shown to be worse than the margin: of 0/1 metrics by the test, of other shares by the interval."""
    if row["kind"] == "binary":
        return row["p_inferior_holm"] is not None and row["p_inferior_holm"] < LEVEL
    return row["verdict"] == BROKEN


def _unjudged(tasks: dict[str, dict[str, Json]]) -> list[Json]:
    """Tasks none of whose metrics has a margin."""
    return [
        {"scope": task, "measure": metric, "code": NOT_JUDGED, "why": f"{task}: {metric} has no margin to be judged by"}
        for task, metrics in tasks.items()
        for metric, row in metrics.items()
        if row["primary"] and not row["verdict"] and metric not in JUDGED_UNITS
    ]


def _row(scope: str, measure: str, delta: float | None, ci95: Any, margin: float, verdict: str) -> Json:
    return {"scope": scope, "measure": measure, "delta": delta, "ci95": ci95, "margin": margin, "verdict": verdict}
