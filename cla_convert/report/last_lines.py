"""The last screen of a run: what came of it, where it lies and what to do next, in plain text."""

import shlex
import textwrap

from ..run_folder import RunFolder
from .formats import change, integer, number, plural, points, points_interval, smaller, stage, titled
from .run_folder import Json
from .sections.answers import silence
from .sections.kv import how_long
from .sections.verdict import HEADINGS, INCOMPLETE

_NAMES = 12
"""Columns of the names at the left."""


def last_lines(report: Json, folder: RunFolder, width: int = 80) -> list[str]:
    """Verdict, accuracy, KL, perplexity, KV bytes, paths and the next step.

    Only what cannot be broken, such as a long path, is ever wider than `width`.

    Args:
        report: what `build_report` returns.
        folder: the run folder.
        width: columns of the screen.
    """
    verdict = HEADINGS[report["status"]] + (f", {stage(report['compared'])}" if report["compared"] else "")
    rows = [("Verdict", f"{INCOMPLETE}. {verdict}" if report["incomplete"] else verdict)]
    rows += [("Accuracy", _accuracy(report)), ("Perplexity", _perplexity(report)), ("KL", _kl(report))]
    rows += [("Answers", silence(report["silent"], report["compared_point"])), ("KV cache", _kv(report))]
    trained = report["compared"] == "after" or report["train"]
    model = folder.training.model if trained else folder.converted
    rows += [("Model", str(model) if model.exists() else ""), ("Report", str(folder.pages["html"]))]
    lines = [line for name, text in rows if text for line in _wrapped(name, text, width)]
    return [*lines, *_wrapped("Next", report["next"]["text"], width), *_command(report["next"]["command"], width)]


def _accuracy(report: Json) -> str:
    mean = report["mean_accuracy"]
    if not mean:
        return ""
    tasks = plural(len(mean["tasks"]), "task")
    change_of_mean = f"{points(mean['delta'])} points {points_interval(mean['ci95'])}"
    return f"{change_of_mean}, mean of {tasks}{_verdict(report, 'mean', 'accuracy')}"


def _perplexity(report: Json) -> str:
    rows = ((name, row) for name, row in report["perplexity"].items() if row["relative"] is not None)
    return ", ".join(
        f"{titled(name)} {number(row['before'])} -> {number(row['last'])} "
        f"({change(row['relative'])}{_verdict(report, name, 'perplexity')})"
        for name, row in rows
    )


def _kl(report: Json) -> str:
    point = report["compared_point"]
    row = report["agreement"].get(point)
    texts = {name: points[point] for name, points in report["text_agreement"].items() if point in points}
    said = [f"{number(row['kl'], 3)} nats per token from the source{_verdict(report, 'held_out', 'kl')}"] if row else []
    return ", ".join([*said, *(f"{titled(name)} {number(one['kl'], 3)}" for name, one in texts.items())])


def _kv(report: Json) -> str:
    kv = report["kv"]
    if not kv["ratio"]:
        return ""
    sizes = f"{integer(kv['bytes_per_token_before'])} -> {integer(kv['bytes_per_token_after'])} bytes per token"
    return f"{sizes} ({smaller(kv['ratio'])}{how_long(kv)})"


def _verdict(report: Json, scope: str, measure: str) -> str:
    said = {"margin_broken": ", worse", "inconclusive": ", cannot tell", "within_margin": ""}
    found = (row["verdict"] for row in report["judged"] if (row["scope"], row["measure"]) == (scope, measure))
    return said[next(found, "within_margin")]


def _wrapped(name: str, text: str, width: int) -> list[str]:
    return textwrap.wrap(
        text, width, initial_indent=f"{name:<{_NAMES}}", subsequent_indent=" " * _NAMES, break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip


def _command(command: str | None, width: int) -> list[str]:
    """A command that may be copied: cut between arguments, with a backslash at the end of a line."""
    if not command:
        return []
    indent, lines, line = " " * _NAMES, [], ""
    for word in map(shlex.quote, shlex.split(command)):
        if line and len(indent) + len(line) + len(word) + 3 > width:
            lines.append(f"{indent}{line} \\")
            line, indent = "", " " * (_NAMES + 2)
        line = f"{line} {word}" if line else word
    return [*lines, f"{indent}{line}"]
