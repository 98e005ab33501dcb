"""How a verb shows itself in its help, whichever release of typer prints it."""

from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperCommand


class Verb(TyperCommand):
    """A command whose usage line has everything that it cannot do without, in plain words."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """`[OPTIONS] RECIPE --out DIR`: typer leaves required options out, and new ones write `{RECIPE}`."""
        pieces = [piece.replace("{", "").replace("}", "") for piece in super().collect_usage_pieces(ctx)]
        return [*pieces, *(f"{one.opts[0]} {one.metavar}" for one in self.params if _needed_option(one))]


def _needed_option(parameter: Any) -> bool:
    return parameter.param_type_name == "option" and parameter.required


class Verbs(typer.Typer):
    """A group of such commands."""

    def command(self, name: str | None = None, *, epilog: str | None = None, **rest: Any) -> Callable[[Any], Any]:
        """As typer's. The epilog, an example to be copied, stays on one line."""
        return super().command(name, cls=Verb, epilog=f"{WHOLE}{epilog}" if epilog else None, **rest)


WHOLE = "\b\n"
"""Tells click to leave the lines of a paragraph as they are."""
