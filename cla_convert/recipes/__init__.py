"""The recipes that ship with the package, found by name."""

from pathlib import Path
from typing import Any

from ..errors import UsageError, did_you_mean

FOLDER = Path(__file__).parent


def list_recipes() -> dict[str, str]:
    """Name -> first comment line of every shipped recipe."""
    return {
        path.stem: path.read_text(encoding="utf-8").splitlines()[0].removeprefix("#").strip()
        for path in sorted(FOLDER.glob("*.yaml"))
    }


def find_recipe(name: str) -> Path:
    """A file as it is, or a shipped recipe by name. Raises UsageError if it is neither."""
    if Path(name).is_file():
        return Path(name)
    shipped = FOLDER / f"{name}.yaml"
    if shipped.is_file():
        return shipped
    raise UsageError(
        f"There is no recipe {name!r}.{did_you_mean(name, list(list_recipes()))}",
        fix=f"Give a file, or one of the shipped recipes: {', '.join(list_recipes())}.",
    )


def reference() -> str:
    """Every setting as Markdown: name, default, what it does. docs/recipe.md is this text."""
    from ..recipe import Generate, Recipe, TextSource, on_resume

    lists = {"data.sources[].": TextSource, "data.sources[].generate.": Generate}
    sections = {"": Recipe, **_sections(Recipe, ""), **lists}
    parts = ["# The recipe", _PREFACE]
    for prefix, section in sections.items():
        heading = f"## `{prefix.rstrip('.')}`" if prefix else "## Top level"
        rows = ["| key | default | on resume | meaning |", "|---|---|---|---|"]
        for name, field in section.model_fields.items():
            if f"{prefix}{name}." not in sections:
                default = "required" if field.is_required() else repr(field.default)
                mark = on_resume(f"{prefix}{name}")
                may = mark.allowed if mark else ""
                rows.append(f"| `{prefix}{name}` | `{default}` | {may} | {_escaped(_meaning(field))} |")
        doc = " ".join((section.__doc__ or "").split())
        parts += [heading, doc, "\n".join(rows)]
    return "\n\n".join(parts) + "\n"


_PREFACE = """\
Made from the schema by `cla-convert recipes reference`. Unknown keys are refused.

On resume: what may change in a run folder that holds work. free: as you like. named: while uptraining is not finished,
once `--allow-change` names it; the result records it. Everything else: another `--out`, or `--overwrite`."""


def _meaning(field: Any) -> str:
    """What a setting does, and the values that registries give it."""
    from ..named import OneOf

    values = [one.registry.told() for one in field.metadata if isinstance(one, OneOf)]
    return " ".join([field.description or "", *values])


def _sections(section: Any, prefix: str) -> dict[str, Any]:
    """Sections inside a section, depth first: dotted prefix -> class."""
    found: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        if hasattr(field.annotation, "model_fields"):
            found[f"{prefix}{name}."] = field.annotation
            found |= _sections(field.annotation, f"{prefix}{name}.")
    return found


def _escaped(text: str | None) -> str:
    """One line that Markdown does not mistake for HTML."""
    return " ".join((text or "").split()).replace("<", "&lt;")
