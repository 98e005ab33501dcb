"""The recipes that ship with the package, found by name."""

from pathlib import Path
from typing import Any

from ..console import command
from ..errors import UsageError, did_you_mean

FOLDER = Path(__file__).parent


def list_recipes() -> dict[str, str]:
    """Name -> first comment line of every shipped recipe."""
    return {
        path.stem: path.read_text(encoding="utf-8").splitlines()[0].removeprefix("#").strip()
        for path in sorted(FOLDER.glob("*.yaml"))
    }


def find_recipe(name: str) -> Path:
    """A file or pipe as it is, `-` for stdin, or a shipped recipe by name. Raises UsageError if it is none."""
    path = Path("/dev/stdin" if name == "-" else name)
    if path.exists() and not path.is_dir():
        return path
    shipped = FOLDER / f"{name}.yaml"
    if shipped.is_file():
        return shipped
    raise _no_recipe(name, path)


def _no_recipe(name: str, path: Path) -> UsageError:
    """What stands where a recipe should: a folder with one in it, a model, or nothing of that name."""
    if inside := sorted(path.glob("*.yaml")):
        return UsageError(f"{name} is a folder, not a recipe", fix=f"Give a file: {', '.join(map(str, inside[:3]))}")
    if path.is_dir() or name.endswith(".gguf") or _is_of_the_hub(name, path):
        what = "a folder" if path.is_dir() else "a model"
        own = command("run", "default", "--out", "DIR", "--set", f"source.model={name}")
        return UsageError(f"{name} is {what}, not a recipe", fix=f"For a model: `{own}`. {_choices()}")
    beside = [file.name for ending in (".yaml", ".yml") if (file := path.with_suffix(ending)).is_file()]
    near = f" Did you mean {str(path.with_name(beside[0]))!r}?" if beside else ""
    hint = near or did_you_mean(path.stem, list(list_recipes()))
    return UsageError(f"There is no recipe {name!r}.{hint}", fix=_choices())


def _is_of_the_hub(name: str, path: Path) -> bool:
    """Whether it looks like `owner/name` rather than a file in a folder."""
    return name.count("/") == 1 and not path.parent.is_dir() and path.suffix not in (".yaml", ".yml", ".json")


def _choices() -> str:
    return f"Give a file, or one of the shipped recipes: {', '.join(list_recipes())}."


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
Made from the schema by `cla-convert recipes reference`. Unknown keys are refused. Relative paths count from the folder
that you are in.

On resume: what may change in a run folder that holds work. free: as you like. named: while uptraining is not finished,
once `--allow-change` names it; the result records it. Everything else: another `--out`, or `--overwrite`."""


def _meaning(field: Any) -> str:
    """What a setting does, and the values that registries give it."""
    from ..named import OneOf

    values = [one.registry.summaries() for one in field.metadata if isinstance(one, OneOf)]
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
