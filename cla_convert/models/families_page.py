"""docs/families.md, from the table of families: `python -m cla_convert.models.families_page > docs/families.md`."""

import re
from collections.abc import Iterable
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from .families import FAMILIES, REFUSED
from .family import Family
from .family_notes import NOTES
from .kinds import only_windows_rotate, some_without_rope
from .served import served_by
from .whole_rows import WHOLES

TEMPLATES = Path(__file__).parent / "templates"


def page() -> str:
    """The whole page as Markdown."""
    environment = Environment(loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, keep_trailing_newline=True)
    return environment.get_template("families.md.j2").render(
        families=_table(
            ("`model_type`", "checkpoints that people have", "what is different from Llama"),
            ((f"`{name}`", NOTES[name].checkpoints, NOTES[name].difference) for name in FAMILIES),
        ),
        kept=_table(
            (
                "`model_type`",
                "kinds of layers",
                "keys that fold exactly",
                "vLLM, tested",
                "measured with published weights",
            ),
            (_kept(name, family) for name, family in FAMILIES.items()),
        ),
        wholes=_table(
            ("`model_type`", "checkpoints that people have", "language model, tested"),
            (
                (f"`{row.model_type}`", row.checkpoints, ", ".join(f"`{name}`" for name in row.around.split(", ")))
                for row in WHOLES.values()
            ),
        ),
        refused=_table(("what", "why"), [*_refused(), *_required()]),
    )


def _table(heading: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [heading, ("---",) * len(heading), *rows]
    return "\n".join("| " + " | ".join(cells).replace(" |  |", " | |") + " |" for cells in lines)


def _kept(name: str, family: Family) -> tuple[str, ...]:
    releases = "refused" if family.state else ", ".join(served_by(name)) or "not yet"
    return f"`{name}`", _kinds(family), _keys(family), releases, NOTES[name].measured or "not yet"


def _kinds(family: Family) -> str:
    """The rule in words: the first line of its docstring, without the families that have it."""
    rule = (family.kinds.__doc__ or "").splitlines()[0]
    return re.sub(r"( \([^)]*\))?\.$", "", rule)


def _keys(family: Family) -> str:
    """Which changes of basis of the keys calibration undoes in the queries, without a rest."""
    if not family.code.rotates:
        return "any change of basis"
    turned = "rotations of a pair of channels whose gains agree" if family.qk_norm else "rotations and sizes of pairs"
    unturned = "; any change where there is no RoPE" if family.kinds in (only_windows_rotate, some_without_rope) else ""
    return turned + unturned + ("; sinks go with their heads" if family.sinks else "")


def _refused() -> Iterable[tuple[str, ...]]:
    """Reasons, each once, with the types that have it."""
    for reason in dict.fromkeys(REFUSED.values()):
        yield ", ".join(f"`{name}`" for name, why in REFUSED.items() if why == reason), reason


def _required() -> Iterable[tuple[str, ...]]:
    """Members of a family that its code does not fit."""
    for family in FAMILIES.values():
        for requirement in family.requires:
            setting = f"{requirement.key}: false" if requirement.value else requirement.key
            yield f"`{family.model_type}` with `{setting}`", f"{requirement.why} {requirement.fix}"


if __name__ == "__main__":
    print(page(), end="")
