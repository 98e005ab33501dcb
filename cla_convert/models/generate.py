"""Writes the modelling code that ships with every output: `python -m cla_convert.models.generate`.

Two templates and the table of families make all files; nobody edits them by hand, and a test holds them to this.
"""

import re
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from .families import FAMILIES, Family
from .family_code import NEWEST, OLDEST

TEMPLATES = Path(__file__).parent / "templates"


def render(family: Family) -> dict[Path, str]:
    """The two files of a family, as they should be."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["argument_names"] = lambda text: re.findall(r"^\w+", text, re.MULTILINE)
    names = _names(family)
    return {
        path: environment.get_template(f"{kind}.py.j2").render(names)
        for kind, path in zip(("configuration", "modeling"), family.code_files, strict=True)
    }


def _names(family: Family) -> dict[str, object]:
    """What the templates call things by."""
    code, parent = family.code, family.class_prefix
    functions = sorted(["eager_attention_forward", *code.functions, *(["apply_rotary_pos_emb"] * code.rotates)])
    parts = ["Attention", code.layer, "ForCausalLM", code.model, "PreTrainedModel", *([code.router] * code.experts)]
    decoder, layers = family.layers.split(".")
    return {
        "tested": f"{OLDEST} to {NEWEST}",
        "family": family,
        "code": code,
        "parent": parent,
        "cla": f"Cla{parent}",
        "module": code.module or family.model_type,
        "imports": sorted(parent + part for part in parts) + functions,
        "decoder": decoder,
        "layers": layers,
        "article": "An" if parent[0] in "AEIO" else "A",
        "article_of_name": "An" if code.name[0] in "AEIO" else "A",
    }


def write(family: Family) -> None:
    """Write the two files of a family anew."""
    for path, text in render(family).items():
        path.write_text(text, encoding="utf-8")


def main() -> None:
    """Write every file anew."""
    for family in FAMILIES.values():
        write(family)


if __name__ == "__main__":
    main()
