"""A few prompts, answered by every model, side by side."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from ..content import Block, Paragraph, Svgs
from ..formats import plural
from ..run_folder import POINTS, Json
from ..section import Material, Section, register
from ..text import cell_in_markdown, in_html, in_markdown, strong

_NAMES = {"before": "source", "converted": "converted", "after": "uptrained", "control": "control"}


def collect(material: Material, report: Json) -> Json:
    """answers: rows of {prompt, answers {point: {text, cut}}}; only prompts that every measured point was asked.

    silent {point: {silent, of}}: to how many of these prompts it said nothing.
    """
    found = {point: material.run.answers[point]["answers"] for point in POINTS if point in material.run.answers}
    texts = {point: {row["prompt"]: row for row in rows} for point, rows in found.items()}
    prompts = [row["prompt"] for row in next(iter(found.values()), [])]
    rows = [
        {"prompt": prompt, "answers": {p: {k: one[prompt][k] for k in ("text", "cut")} for p, one in texts.items()}}
        for prompt in prompts
        if all(prompt in one for one in texts.values())
    ]
    silent = {p: {"silent": sum(not row["answers"][p]["text"] for row in rows), "of": len(rows)} for p in texts}
    return {"answers": rows, "silent": silent}


def silence(silent: dict[str, Json], point: str) -> str:
    """`It says nothing in answer to 4 of 4 prompts (the source model: 0).`, where it is silent oftener than that."""
    source, model = silent.get("before"), silent.get(point)
    if not source or not model or model["silent"] <= source["silent"]:
        return ""
    times = f"{model['silent']} of {plural(model['of'], 'prompt')}"
    return f"It says nothing in answer to {times} (the source model: {source['silent']})."


def show(report: Json) -> Sequence[Block]:
    """Every prompt with its answers."""
    if not report["answers"]:
        return []
    note = "Greedy, each prompt by itself; cut after a few words. None of the prompts stands in the training text."
    return [Paragraph(note, "note"), *(Answers(row["prompt"], row["answers"]) for row in report["answers"])]


@dataclass(frozen=True)
class Answers:
    """A prompt and its answers by point: columns in HTML, below each other on a phone and in Markdown."""

    prompt: str
    answers: dict[str, Json]

    def markdown(self) -> str:  # noqa: D102
        rows = [f"| {_NAMES[point]} | {cell_in_markdown(_text(answer))} |" for point, answer in self.answers.items()]
        return "\n".join([f"{in_markdown(strong(self.prompt))}\n", "| model | answer |", "|---|---|", *rows])

    def html(self, svgs: Svgs) -> Markup:  # noqa: D102
        cells = Markup("").join(
            Markup('<div><span class="who">{}</span> {}</div>').format(_NAMES[point], _text(answer))
            for point, answer in self.answers.items()
        )
        return Markup('<h3>{}</h3><div class="answers">{}</div>').format(in_html(self.prompt), cells)


def _text(answer: Json) -> str:
    return (answer["text"] or "(nothing)") + (" ..." if answer["cut"] else "")


register(Section("answers", place=47, title="What it says", collect=collect, show=show))
