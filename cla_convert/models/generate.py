"""Writes the modelling code that ships with every output: `python -m cla_convert.models.generate`.

Two templates and the table of families make all files; nobody edits them by hand, and a test holds them to this. Two
more make what stands around a language model, for the one that it is: those are rendered into the output.
"""

import re
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from .families import FAMILIES, Family
from .family_code import NEWEST
from .whole_rows import INNER, Whole

TEMPLATES = Path(__file__).parent / "templates"


def render(family: Family) -> dict[Path, str]:
    """The two files of a family, as they should be."""
    environment, names = _environment(), _names(family)
    return {
        path: environment.get_template(f"{kind}.py.j2").render(names)
        for kind, path in zip(("configuration", "modeling"), family.code_files, strict=True)
    }


def render_whole(whole: Whole, text: Family) -> dict[str, str]:
    """The two files of a whole around a language model with the code of `text`, by name."""
    environment, parent = _environment(), whole.class_prefix
    names = {
        "whole": whole,
        "text": text,
        "parent": parent,
        "cla": f"Cla{parent}",
        "text_config": text.class_name("Config"),
        "text_model": text.class_name("Model"),
        "article": _article(parent),
        "article_of_name": _article(whole.name),
    }
    return {
        f"{kind}_{whole.cla_type}.py": environment.get_template(f"whole_{kind}.py.j2").render(names)
        for kind in ("configuration", "modeling")
    }


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["argument_names"] = lambda text: re.findall(r"^\w+", text, re.MULTILINE)
    return environment


def _article(name: str) -> str:
    return "An" if name[0] in "AEIO" else "A"


def _names(family: Family) -> dict[str, object]:
    """What the templates call things by."""
    code, parent = family.code, family.class_prefix
    functions = sorted(["eager_attention_forward", *code.functions, *(["apply_rotary_pos_emb"] * code.rotates)])
    pretrained = code.pretrained or parent
    parts = ["Attention", code.layer, *["ForCausalLM"] * code.causal, code.model, *([code.router] * code.experts)]
    decoder, layers = family.layers.split(".")
    return {
        "tested": f"{code.oldest} to {NEWEST}",
        "family": family,
        "code": code,
        "parent": parent,
        "cla": f"Cla{parent}",
        "module": code.module or family.model_type,
        "pretrained": pretrained,
        "imports": sorted([*(parent + part for part in parts), f"{pretrained}PreTrainedModel"]) + functions,
        "decoder": decoder,
        "layers": layers,
        "article": _article(parent),
        "article_of_name": _article(code.name),
    }


def write(family: Family) -> None:
    """Write the two files of a family anew."""
    for path, text in render(family).items():
        path.write_text(text, encoding="utf-8")


def main() -> None:
    """Write every file anew."""
    for family in (*FAMILIES.values(), *(inner.code for inner in INNER.values())):
        write(family)


if __name__ == "__main__":
    main()
