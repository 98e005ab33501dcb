"""The quality gate: may a pipeline go on with this model? It follows the verdict (verdict.py).

    failed        a loss beyond a margin is shown, nothing was measured, or something could not be compared
    passed        everything is shown to be within its margin
    inconclusive  neither: the data cannot tell

The gate fails on `failed`; the strict gate unless `passed`. With few rows that fails a perfect model too.
"""

from typing import Any

from ..console import warn
from ..errors import QualityGate
from .statistics import BROKEN
from .verdict import NOT_COMPARED, NOT_JUDGED, NOT_MEASURED

Json = dict[str, Any]
_FIX = "Uptrain longer or on broader text, share fewer layers, or evaluate more rows (docs/evaluation.md)."


def enforce(comparison: Json, mode: bool | str) -> None:
    """Raise QualityGate if the gate of this mode (False: none, True, "strict") fails; warn where it cannot tell.

    `comparison` may be a report, which says the same of it.

    Raises:
        QualityGate: with every reason.
    """
    gate = comparison["gate"]
    if not mode or gate["state"] == "passed":
        return
    if comparison["compared"] is None:
        raise QualityGate(
            "The quality gate has nothing to judge: the models have not been evaluated",
            why="It needs the results of the source and of the converted model (eval/before, eval/after).",
            fix="Let `cla-convert run` with the same recipe and --out finish: it goes on where it stopped.",
        )
    reasons = "; ".join(reason_in_words(reason) for reason in gate["reasons"])
    if gate["state"] == "inconclusive" and mode != "strict":
        warn(f"the quality gate is inconclusive: {reasons}")
        return
    raise QualityGate("The quality gate failed" + (" (strict)" if mode == "strict" else ""), why=reasons, fix=_FIX)


def reason_in_words(reason: Json) -> str:
    """`held_out: perplexity is worse than the margin of 5%: +43.7%, 95% CI +39.0% to +48.6%`."""
    if reason["code"] in (NOT_COMPARED, NOT_JUDGED):
        return reason["why"].rstrip(".")
    if reason["code"] == NOT_MEASURED:
        return "no accuracy was measured at both points"
    where = "the mean accuracy over tasks" if reason["scope"] == "mean" else f"{reason['scope']}: {reason['measure']}"
    said = "is worse than the margin" if reason["code"] == BROKEN else "is not shown to be within the margin"
    interval = ", no interval"
    if reason["ci95"]:
        low, high = (amount(reason["measure"], value) for value in reason["ci95"])
        interval = f", 95% CI {low} to {high}"
    margin = amount(reason["measure"], reason["margin"]).lstrip("+")
    return f"{where} {said} of {margin}: {amount(reason['measure'], reason['delta'])}{interval}"


def amount(measure: str, value: float | None) -> str:
    """A change in its unit: points of accuracy, per cent of the source's perplexity, nats."""
    if value is None:
        return "not a finite number"
    if measure == "accuracy":
        return f"{100 * value:+.1f} points"
    return f"{100 * value:+.1f}%" if measure == "perplexity" else f"{value:.3g} nats"
