"""What sharing cost apart from what the data taught: the uptrained model against the control."""

from collections.abc import Sequence

from ...recipe import Train
from ..content import Block, Paragraph
from ..formats import change, number, titled
from ..run_folder import Json
from ..section import Material, Section, register


def collect(material: Material, report: Json) -> Json:
    """control {kind, train, mean_accuracy, statement}; None where none was asked for or it is not trained yet."""
    run, against = material.run, material.control
    settings = Train.model_construct(**(run.recipe.get("train") or {}))
    if against or run.control_train:
        summary = against["mean_accuracy"] if against else None
        control: Json = {"kind": "trained", "train": run.control_train or None, "mean_accuracy": summary}
    elif settings.control and settings.tokens and not settings.needs_control:
        control = {"kind": "source", "train": None, "mean_accuracy": None}
    else:
        return {"control": None}
    return {"control": control | {"statement": _statement(control, report["perplexity"])}}


def _statement(control: Json, perplexity: dict[str, Json]) -> str:
    if control["kind"] == "source":
        return (
            "The control is the source model itself: distilling it from itself starts at a KL of 0 and stays there. "
            "CLA cost = after - before."
        )
    parts = []
    if summary := control["mean_accuracy"]:
        low, high = (100 * value for value in summary["ci95"])
        parts.append(f"mean accuracy {100 * summary['delta']:+.1f} points (95% CI {low:+.1f} to {high:+.1f})")
    parts += [
        f"{titled(name)} perplexity {number(row['control'])} -> {number(row['after'])} "
        f"({change(row['cla_cost_relative'])})"
        for name, row in perplexity.items()
        if row["cla_cost_relative"] is not None
    ]
    return f"CLA cost = after - control: {', '.join(parts) or 'not measured yet'}."


def show(report: Json) -> Sequence[Block]:
    """The statement."""
    return [Paragraph(report["control"]["statement"])] if report["control"] else []


register(Section("control", place=15, title="Against the control", collect=collect, show=show, needs=("perplexity",)))
