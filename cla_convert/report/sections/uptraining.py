"""The training: how much, how fast, and what it did to text that it does not see."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from ..content import Block, Figure, Paragraph
from ..formats import count, duration, number
from ..plots import draw_curves
from ..run_folder import Json, RunFiles
from ..section import Material, Picture, Section, register

ALT = "training loss and held-out perplexity over tokens"


def collect(material: Material, report: Json) -> Json:
    """train: train.json with the loss's name and `curve`; None where nothing was trained."""
    run = material.run
    if not run.train:
        return {"train": None}
    source = run.held_out.get("before", {}).get("perplexity")
    name = (run.recipe.get("train") or {}).get("loss")
    return {"train": {**run.train, "loss_name": name, "curve": curve(run.train, run.metrics, source)}}


def curve(train: Json, metrics: list[Json], source: float | None) -> Json | None:
    """What is known of the validation perplexity; None where it was not measured twice.

    Returns:
        first, previous, last: the perplexities before training, at the last but one check and at the end; source: that
        of the source model on the same text; regained: the share of what conversion added that training took away.
    """
    rows: Any = train.get("validation") or [row for row in metrics if row.get("validation_perplexity") is not None]
    values = [row["validation_perplexity"] for row in rows if row["validation_perplexity"] is not None]
    if len(values) < 2:
        return None
    first, last = values[0], values[-1]
    regained = (first - last) / (first - source) if source and first > source else None
    return {"first": first, "previous": values[-2], "last": last, "source": source, "regained": regained}


def show(report: Json) -> Sequence[Block]:
    """A sentence, the same of a control, and the curves."""
    if not report["train"]:
        return []
    blocks: list[Block] = [Paragraph(training_line(report["train"]))]
    if report["control"] and report["control"]["train"]:
        blocks.append(Paragraph(f"Control, the source model: {training_line(report['control']['train'])}"))
    return [*blocks, Figure("loss", ALT)] if "loss" in report["plots"] else blocks


def training_line(train: Json) -> str:
    """`26M tokens in 400 steps, 3 min 45 s (116k tokens/s), loss distill, validation perplexity 46.15 -> 44.22, ...`.

    A single step's loss says more about its text than about the training, so there is none.
    """
    text = f"{count(train['tokens'])} tokens"
    if train.get("steps") is not None:
        text += f" in {train['steps']} steps"
    if train.get("seconds") is not None:
        text += f", {duration(train['seconds'])}"
    if train.get("tokens_per_second") is not None:
        text += f" ({number(train['tokens_per_second'], 3)} tokens/s)"
    text += f", loss {train.get('objective') or train.get('loss_name') or 'not recorded'}"
    if found := train.get("curve") or curve(train, [], None):
        text += f", validation perplexity {number(found['first'])} -> {number(found['last'])}"
        text += f" (source {number(found['source'])})" if found["source"] else ""
    return f"{text}, on {train.get('device') or 'an unrecorded device'}" + (
        f" in {train['precision']}." if train.get("precision") else "."
    )


def draw(run: RunFiles, report: Json) -> Mapping[str, Picture]:
    """Loss and perplexity over tokens."""
    if sum(row.get("loss") is not None for row in run.metrics) < 2:
        return {}
    source = run.held_out.get("before", {}).get("perplexity")
    return {"loss": Picture(ALT, partial(draw_curves, run.metrics, run.control_metrics, source))}


register(Section("uptraining", place=70, title="Uptraining", collect=collect, show=show, draw=draw))
