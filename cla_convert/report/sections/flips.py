"""Documents whose answer turned from right to wrong, or back: what a mean over documents hides."""

from collections.abc import Sequence

from ...evaluation.samples import CHOICE
from ..content import Block, Bullets, Column, Details, Heading, Paragraph, Row, Table
from ..formats import number
from ..run_folder import Json, RunFiles
from ..section import Material, Section, register
from ..text import Text, note, strong, tag

SHOWN = 3
"""Examples in each direction and task."""
CUT = 280
"""Characters of a prompt (its end) and of a choice (its start) that are shown."""


def collect(material: Material, report: Json) -> Json:
    """flips."""
    return {"flips": find_flips(material.run, report["tasks"], material.comparison["compared"])}


def find_flips(run: RunFiles, tasks: dict[str, dict[str, Json]], point: str | None) -> dict[str, Json]:
    """{task: {metric, lost, gained, examples {lost: [...], gained: [...]}}} between `before` and `point`.

    Counted on the task's primary metric. An example holds doc_id and, where the task file kept them, the end of the
    prompt and the choices: text, target, and per point the log-likelihood (nats) and whether the model chose it.
    """
    found = {}
    for task, metrics in tasks.items():
        metric = next(
            (name for name, row in metrics.items() if row.get("primary") and row.get("kind") == "binary"), None
        )
        before, after = run.task_file("before", task), run.task_file(point or "", task)
        if metric is None or before is None or after is None:
            continue
        pairs = list(zip(before["samples"], after["samples"], strict=True))
        examples = {
            "lost": [_example(a, b, metric) for a, b in pairs if _right(a, metric) and not _right(b, metric)],
            "gained": [_example(a, b, metric) for a, b in pairs if _right(b, metric) and not _right(a, metric)],
        }
        counts = {direction: len(rows) for direction, rows in examples.items()}
        if any(counts.values()):
            shown = {direction: rows[:SHOWN] for direction, rows in examples.items()}
            found[task] = {"metric": metric, "n": len(pairs), **counts, "examples": shown}
    return found


def _right(sample: Json, metric: str) -> bool:
    return sample["metrics"].get(metric) == 1


def _example(before: Json, after: Json, metric: str) -> Json:
    shown: Json = {"doc_id": before["doc_id"], "prompt": _end(before.get("prompt")), "choices": []}
    texts = before.get("choices") or []
    sides = {"before": before, "after": after}
    if not texts or not all(len(sample.get("loglikelihoods") or []) == len(texts) for sample in sides.values()):
        return shown
    scores = {side: sample["loglikelihoods"] for side, sample in sides.items()}
    chosen = {side: _chosen(scores[side], texts, metric) for side in sides}
    # The right one is what the right side chose: tasks name their target by number, by letter or by text.
    target = chosen["before" if _right(before, metric) else "after"]
    if chosen["before"] == chosen["after"]:  # not told by these numbers
        chosen, target = {"before": None, "after": None}, None
    shown["choices"] = [
        {"text": _start(text), "target": index == target}
        | {side: scores[side][index] for side in sides}
        | {f"chosen_{side}": index == number for side, number in chosen.items()}
        for index, text in enumerate(texts)
    ]
    return shown


def _chosen(scores: list[float], texts: list[str], metric: str) -> int | None:
    """What the model answers: the likeliest choice, per character where the metric says so (as lm-eval does)."""
    if metric == "acc_norm" and any(len(text) >= CHOICE for text in texts):
        return None  # shortened in the file: its true length is not known here
    lengths = [max(len(text.strip()), 1) if metric == "acc_norm" else 1 for text in texts]
    rates = [score / length for score, length in zip(scores, lengths, strict=True)]
    return rates.index(max(rates))


def _start(choice: str) -> str:
    text = " ".join(choice.split())
    return text if len(text) <= CUT else f"{text[:CUT]} ..."


def _end(prompt: str | None) -> str | None:
    text = " ".join((prompt or "").split())
    return (text if len(text) <= CUT else f"... {text[-CUT:]}") or None


def show(report: Json) -> Sequence[Block]:
    """The counts, and a few examples of every task, folded away."""
    if not report["flips"]:
        return []
    columns = [
        Column("task", text=True),
        Column("metric", text=True),
        Column("right to wrong"),
        Column("wrong to right"),
        Column("of"),
    ]
    rows = [
        Row([task, found["metric"], str(found["lost"]), str(found["gained"]), str(found["n"])])
        for task, found in report["flips"].items()
    ]
    note_ = (
        "Numbers: log-likelihood of the choice in nats, before and after. The model answers the likeliest one (per "
        "character for acc_norm)."
    )
    after = report["compared"]
    return [
        Paragraph(f"From before to {after}, on each task's main metric. A few of them, shortened.", "note"),
        Table(columns, rows), *(_examples(task, found, after) for task, found in report["flips"].items()),
        Paragraph(note_, "note"),
    ]  # fmt: skip


def _examples(task: str, found: Json, after: str) -> Details:
    blocks: list[Block] = []
    for direction, heading in (("lost", "Right to wrong"), ("gained", "Wrong to right")):
        if found["examples"][direction]:
            blocks.append(Heading(heading))
        for example in found["examples"][direction]:
            blocks.append(Paragraph([note(f"document {example['doc_id']} "), example["prompt"] or ""]))
            blocks.append(Bullets([_choice(choice, after) for choice in example["choices"]], "choices"))
    return Details(f"{task}: {found['lost']} right to wrong, {found['gained']} wrong to right, of {found['n']}", blocks)


def _choice(choice: Json, after: str) -> Text:
    tags = [tag("right", "good")] if choice["target"] else []
    tags += [tag(point) for point in ("before",) if choice["chosen_before"]]
    tags += [tag(after)] if choice["chosen_after"] else []
    text = strong(choice["text"]) if choice["target"] else choice["text"]
    spaced = [part for one in tags for part in (" ", one)]
    return [text, *spaced, note(f" {number(choice['before'])} \u2192 {number(choice['after'])} nats")]


register(Section("flips", place=80, title="Answers that changed", collect=collect, show=show, needs=("accuracy",)))
