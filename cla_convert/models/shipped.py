"""The modelling code that an output carries, and what else lies beside its weights. Imports no torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import read_json, write_bytes
from .checkpoint import Checkpoint
from .families import FAMILIES, Family
from .whole import Around, around, text_config


def write_sidecars(source: Checkpoint, family: Family, out: Path) -> None:
    """Copy the family's code and the source's tokenizer, template, generation and licence files, byte for byte."""
    for name, code in shipped_code(family, source.around).items():
        (out / name).write_bytes(code)
    source.copy_sidecars(out)


def shipped_code(family: Family, outside: Around | None = None) -> dict[str, bytes]:
    """The modelling files of an output, by name."""
    text = outside.text_code(family) if outside else family
    files = {file.name: file.read_bytes() for file in text.code_files}
    if outside is None:
        return files
    from .generate import render_whole

    return files | {name: code.encode() for name, code in render_whole(outside.whole, text).items()}


def update_code(folder: Path) -> None:
    """Put this version's modelling code into an output folder; weights and config.json stay as they are.

    Raises:
        InputError: it is not a converted model of a known family.
    """
    code = _code_for(read_json(folder / "config.json") or {})
    if not code:
        raise InputError(f"{folder} is not a converted model", fix="Give the output folder of convert or uptrain.")
    for name, content in code.items():
        write_bytes(folder / name, content)


def has_other_code(folder: Path) -> bool:
    """Whether a converted model carries other modelling code than this version would write."""
    code = _code_for(read_json(folder / "config.json") or {})
    return any(not (folder / f).is_file() or (folder / f).read_bytes() != content for f, content in code.items())


def _code_for(config: Mapping[str, Any]) -> dict[str, bytes]:
    """The files that an output with this config.json has; none for any other model."""
    family = converted_family(text_config(config))
    return shipped_code(family, around(config, ())) if family else {}


def converted_family(config: Mapping[str, Any]) -> Family | None:
    """The family of a converted model's config.json; None for any other."""
    return next((family for family in FAMILIES.values() if family.cla_type == config.get("model_type")), None)
