"""The quality gate: may a pipeline go on with this model? Decided from the comparison of before and after alone.

The gate fails when a loss beyond the margin is *shown*: the 95% interval of the mean accuracy over tasks lies below
-margin altogether, or a single task is worse than the margin by a one-sided test at 2.5% after Holm's correction over
tasks (a mean can hide one task that collapsed). It fails too when there is nothing to judge, or when a task that was
measured before cannot be compared: absent numbers must not open a gate.

The strict gate fails as well when the opposite is not shown, that is unless the whole interval of the mean lies above
-margin. With few rows it therefore fails even for a perfect model.
"""

from typing import Any

from ..errors import QualityGate

Json = dict[str, Any]
LEVEL = 0.025
"""One-sided error of the tests, the same as of one end of a 95% interval."""


def judge(mean: Json | None, tasks: dict[str, dict[str, Json]], problems: list[str]) -> Json:
    """`{passed, strict_passed, reasons}`; a reason is {scope: "mean", "task" or a task's name, code, ...}."""
    reasons: list[Json] = [{"scope": "task", "code": "not_compared", "why": problem} for problem in problems]
    if mean is None:
        reasons.append({"scope": "mean", "code": "not_measured"})
    elif mean["verdict"] != "within_margin":
        reasons.append({"scope": "mean", "code": mean["verdict"], "delta": mean["delta"], "ci95": mean["ci95"]})
    for task, metrics in tasks.items():
        for metric, row in metrics.items():
            p = row["p_inferior_holm"]
            if p is not None and p < LEVEL:
                figures = {"metric": metric, "delta": row["delta"], "ci95": row["ci95"], "p_inferior_holm": p}
                reasons.append({"scope": task, "code": "margin_broken", **figures})
    return {
        "passed": all(reason["code"] == "not_enough_rows" for reason in reasons),
        "strict_passed": not reasons,
        "reasons": reasons,
    }


def enforce(comparison: Json, mode: bool | str) -> None:
    """Raise QualityGate if the gate of this mode (False: none, True, "strict") fails.

    Raises:
        QualityGate: with every reason.
    """
    if not mode:
        return
    gate = comparison["gate"]
    if gate["strict_passed" if mode == "strict" else "passed"]:
        return
    reasons = [_words(reason, comparison["margin"]) for reason in gate["reasons"]]
    raise QualityGate(
        "The quality gate failed" + (" (strict)" if mode == "strict" else ""),
        why="; ".join(reasons),
        fix="Uptrain longer or on broader text, share fewer layers, or evaluate more rows (docs/evaluation.md).",
    )


def _words(reason: Json, margin: float) -> str:
    where = "the mean over tasks" if reason["scope"] == "mean" else reason["scope"]
    if reason["code"] == "not_compared":
        return reason["why"].rstrip(".")
    if reason["code"] == "not_measured":
        return "no accuracy was measured at both points"
    low, high = (100 * value for value in reason["ci95"])
    said = "is worse than the margin" if reason["code"] == "margin_broken" else "is not shown to be within the margin"
    return f"{where} {said} of {100 * margin:g} points: {100 * reason['delta']:+.1f}, 95% CI {low:+.1f} to {high:+.1f}"
