"""Text of a report, as Markdown and as HTML.

Text is a string, a `Mark` (code, note, strong, or a tag of some tone), or a list of those.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape


@dataclass(frozen=True)
class Mark:
    """Text that stands out, or back."""

    text: str
    style: str = "note"
    """note, code, strong, or tag; and the tone of a tag: `tag good`."""


Text = str | Mark | Sequence[str | Mark]


def code(text: Any) -> Mark:
    """A name or a value as a program writes it."""
    return Mark(str(text), "code")


def note(text: Any) -> Mark:
    """Something that matters less."""
    return Mark(str(text), "note")


def strong(text: Any) -> Mark:
    """Something that matters more."""
    return Mark(str(text), "strong")


def tag(text: Any, tone: str = "") -> Mark:
    """A word in a frame; tone: good, bad or unsure."""
    return Mark(str(text), f"tag {tone}".strip())


def guarded(text: Any) -> str:
    """For Markdown: no HTML, no links, no pictures, no new lines."""
    return str(text).replace("<", "&lt;").replace("](", "]\\(").replace("\r", " ").replace("\n", " ")


def in_markdown(text: Text) -> str:
    """Text as Markdown."""
    if isinstance(text, str):
        return guarded(text)
    if isinstance(text, Mark):
        plain = guarded(text.text)
        if text.style == "code":
            return f"`{plain.replace('`', chr(39))}`"
        return f"**{plain}**" if text.style in ("strong", "tag good", "tag bad", "tag unsure") else plain
    return "".join(map(in_markdown, text))


def in_html(text: Text) -> Markup:
    """Text as HTML."""
    if isinstance(text, str):
        return escape(text)
    if isinstance(text, Mark):
        if text.style in ("code", "strong"):
            return Markup("<{0}>{1}</{0}>").format(Markup(text.style), text.text)
        return Markup('<span class="{}">{}</span>').format(text.style, text.text)
    return Markup("").join(map(in_html, text))


def cell_in_markdown(text: Text) -> str:
    """Text that stays in its cell of a table."""
    return in_markdown(text).replace("\\", "\\\\").replace("|", "\\|")


def fenced(text: Any) -> str:
    """A block of code whose text cannot end it."""
    return "```\n" + str(text).replace("```", "'''") + "\n```"
