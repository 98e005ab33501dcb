"""README.md of a converted model: metadata for the Hugging Face hub, how to load it, its numbers and its limits."""

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ..environment import command_line
from ..files import read_json, stays_in, write_bytes
from ..models.headers import ELEMENT_SIZE, FLOATING
from ..models.shape import long_cache, shape_of
from ..models.whole import text_config, whole_of
from ..models.writer import read_manifest
from ..run_folder import RECIPE
from .formats import (
    changed,
    count,
    groups_text,
    integer,
    model_name,
    number,
    owners_text,
    percent,
    quoted,
    titled,
    to_yaml,
    unit_of,
)
from .model_index import eval_results
from .run_folder import Json
from .sections.kv import how_long, ratio, with_ratio
from .sections.model import fewer_heads
from .sections.next_step import next_of_model
from .text import cell_in_markdown, fenced, guarded

if TYPE_CHECKING:
    import jinja2

TAGS = ["cross-layer-attention", "kv-cache", "cla-convert"]
_EMPTY: Json = {
    "source": {"model": None}, "converted": {}, "kv": {}, "train": None, "tasks": {}, "perplexity": {}, "caveats": [],
    "compared": None, "command": None, "verdict": "Not evaluated yet.", "next": None, "settings": None,
}  # fmt: skip
_OTHER = {
    "converted": "An intermediate result: it was uptrained further, and the verdict is about the uptrained model.",
    "after": "Not evaluated yet.",
}
"""What stands in place of the verdict on the card of a model that the verdict is not about."""
TEMPLATES = Path(__file__).parent / "templates"
_LONGEST_CARD = 1 << 22
_MADE = ("kv_source_layers", "kv_heads", "sharing", "init")
"""What of a manifest says how the model was made."""
CARRIED = ("license", "license_name", "license_link", "language", "extra_gated_prompt")
"""Metadata of the source's card that also holds for a derived model."""


def write_model_card(folder: Path, report: Json, source_card: str | None = None, point: str | None = None) -> Path:
    """Write README.md, and recipe.yaml where there is one, into the model folder; return the path of the card.

    Args:
        folder: the converted or uptrained model.
        report: what build_report returns; stages that did not run leave their part out.
        source_card: text of the source model's README.md, whose licence and language are carried over.
        point: where this model was measured, `converted` or `after`; None: the last point.
    """
    report = {**_EMPTY, **report}
    measured_at: str = point or report["compared"] or "converted"
    if report["compared"] not in (None, measured_at):
        report |= {"compared": measured_at, "verdict": _OTHER[measured_at]}
    if point == "converted":  # whatever happened to it later
        report["train"] = None
    name = card_name(report, folder)
    step = report["next"] or next_of_model(folder, report)
    whole = whole_of(read_json(folder / "config.json") or {})
    body = _template().render(
        auto="AutoModelForImageTextToText" if whole else "AutoModelForCausalLM",
        reader="AutoProcessor" if whole else "AutoTokenizer",
        report=report, name=name, folder=folder.name, next=step, rows=_measured(report, measured_at),
        after="uptrained" if measured_at == "after" else "converted", recipe=bool(report["settings"]),
    )  # fmt: skip
    if report["settings"]:
        write_bytes(folder / RECIPE, f"{to_yaml(report['settings'])}\n".encode(errors="backslashreplace"))
    path = folder / "README.md"
    fields = metadata(report, source_card) | ({"pipeline_tag": "image-text-to-text"} if whole else {})
    _write(path, f"{_front(fields | _results(report, name, measured_at))}\n{body}")
    return path


def card_name(report: Json, folder: Path) -> str:
    """What the model is called: its source, its map and fewer KV heads, `SmolLM2-135M-Instruct-cla2-keep-ends-kv1`."""
    source, converted = report.get("source") or {}, report.get("converted") or {}
    sharing, heads = converted.get("sharing"), converted.get("kv_heads") or {}
    base = source.get("base_model") or (source.get("model") and model_name(source))
    if not base:
        return folder.name
    pattern = re.sub(r"[^\w.-]+", "-", sharing).strip("-") if isinstance(sharing, str) else "cla"
    fewer = f"-kv{heads['after']}" if heads and heads["after"] != heads["before"] else ""
    return f"{str(base).rstrip('/').rsplit('/', 1)[-1]}-{pattern or 'cla'}{fewer}"


def _measured(report: Json, point: str) -> list[list[str]]:
    """Rows of the card's table: task, metric with its unit, n, source, this model; and every perplexity once."""
    rows = []
    for task, metrics in report["tasks"].items():
        for metric, row in metrics.items():
            unit = row.get("unit") or unit_of(metric, row.get("kind"))
            if unit in ("perplexity", "bits"):
                continue
            shown, said = (percent, "%") if unit == "share" else (number, "nats" if unit == "nats" else "")
            asked = "with chat template" if row.get("in_turns") else ""
            named = ", ".join(filter(None, (metric, asked, said)))
            rows.append([task, named, integer(row["n"]), shown(row["before"]), shown(row[point])])
    for name, row in report["perplexity"].items():
        n = integer(row["n"])
        rows.append([titled(name), f"perplexity per {row['unit']}", n, number(row["before"]), number(row[point])])
    return [[cell_in_markdown(text) for text in row] for row in rows]


def write_first_card(folder: Path, result: Json, source: Path) -> Path:
    """The card of a model that was converted, and nothing else yet.

    Args:
        folder: the converted model.
        result: what `convert` returns.
        source: folder of the source model.
    """
    kv = {f"bytes_per_token_{when}": size for when, size in result["kv_bytes_per_token"].items()}
    kv["long_context"] = with_ratio(result.get("kv_bytes_of_long_context"))
    report = {"converted": result, "source": result["source"], "kv": kv, "command": command_line()}
    return write_model_card(folder, report, source_card(source))


def rename_card(folder: Path, name: str) -> None:
    """Call the model `name` on the card in its folder: the id that it is about to have on the hub."""
    path = folder / "README.md"
    if not path.exists():
        return
    text, fields = path.read_text(encoding="utf-8"), front_matter(source_card(folder))
    for entry in fields.get("model-index", []):
        entry["name"] = name.rsplit("/", 1)[-1]
    body = re.sub(r"^# .*$", lambda _: f"# {name}", text.split("\n---\n", 1)[1], count=1, flags=re.MULTILINE)
    body = body.replace(f"folder = {quoted(folder.name)}", f"folder = {quoted(name)}", 1)
    _write(path, _front(fields) + body)


def described(folder: Path, train: Json | None = None) -> Json:
    """What the files of an output folder say, as a report for `write_model_card`: the map, its bytes, the source."""
    config = text_config(read_json(folder / "config.json") or {})
    manifest = read_manifest(folder)
    shape = shape_of(config)
    heads = (manifest.get("kv_heads") or {}).get("before", shape.num_key_value_heads)
    source_shape = replace(shape, num_key_value_heads=heads)
    size = {name: ELEMENT_SIZE[code] for code, name in FLOATING.items()}.get(str(config.get("dtype")), 4)
    source, base = manifest.get("source") or {}, front_matter(source_card(folder)).get("base_model")
    model = base or source.get("model") or source.get("file") or source.get("folder")
    return {
        "source": {**source, "model": model},
        "converted": {key: manifest[key] for key in _MADE if key in manifest},
        "kv": {
            "bytes_per_token_before": source_shape.kv_bytes_per_token(size, len(shape.kv_layers)),
            "bytes_per_token_after": shape.kv_bytes_per_token(size),
            "long_context": with_ratio(
                long_cache(config, size, shape.kv_source_layers, (heads, shape.num_key_value_heads))
            ),
        },
        "train": train,
    }


def metadata(report: Json, source_card: str | None) -> Json:
    """The YAML front matter: what the hub indexes."""
    source = report.get("source") or {}
    carried = {key: value for key, value in front_matter(source_card).items() if key in CARRIED}
    if "license" not in carried and source.get("license"):
        carried["license"] = source["license"]
    found: Json = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    base = source.get("base_model") or source.get("model")
    if is_hub_id(base):
        found["base_model"] = base
        # "finetune" is the hub's word for a model whose weights were changed; there is none for a changed cache.
        found["base_model_relation"] = "finetune"
    return {**found, **carried, "tags": [*TAGS, *_source_tags(source_card)]}


def source_card(folder: Path) -> str | None:
    """The model card in a folder, if it has one of its own: a link that leads elsewhere is none."""
    path = folder / "README.md"
    if not path.is_file() or not stays_in(path, folder):
        return None
    with path.open("rb") as file:
        return file.read(_LONGEST_CARD).decode(errors="replace")


def is_hub_id(model: Any) -> bool:
    """Whether `model` names a model on the hub: the hub refuses a card whose base_model is a local path."""
    return isinstance(model, str) and bool(re.fullmatch(r"[\w.-]+/[\w.-]+", model)) and not Path(model).exists()


def _write(path: Path, text: str) -> None:
    """By rename: in place of a link that stands there, and never into what it leads to."""
    write_bytes(path, text.encode(errors="backslashreplace"))


def _front(fields: Json) -> str:
    """The YAML block at the top of a card, written by the hub's own library."""
    from huggingface_hub import ModelCardData

    data = ModelCardData(**fields, ignore_metadata_errors=True)
    return f"---\n{data.to_yaml()}\n---\n"


def _results(report: Json, name: str, point: str) -> Json:
    """What the hub shows beside the card: the name of the model and its measured numbers."""
    found = eval_results(report, point)
    return {"model_name": name, "eval_results": found} if found else {}


def _shares(sources: list[int | None]) -> bool:
    """Whether any layer reads another's K/V."""
    return any(source not in (layer, None) for layer, source in enumerate(sources))


def _template() -> "jinja2.Template":
    """The card's body: whatever it prints is guarded, unless it stands in a block of code."""
    import jinja2

    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: value if isinstance(value, _Fenced) else guarded(value),
    )  # fmt: skip
    filters: Json = {"count": count, "integer": integer, "changed": changed, "model_name": model_name, "ratio": ratio}
    filters["how_long"] = how_long
    filters |= {
        "fewer_heads": fewer_heads,
        "fenced": lambda text: _Fenced(fenced(text)),
        "quoted": lambda text: _Fenced(quoted(text)),
    }
    env.filters |= filters | {"groups": groups_text, "owners": owners_text, "shares": _shares}
    return env.get_template("model_card.md.j2")


class _Fenced(str):
    """Text in a block of code, where Markdown and HTML mean nothing and lines stay lines."""


def _source_tags(source_card: str | None) -> list[str]:
    tags: Any = front_matter(source_card).get("tags")
    return [tag for tag in tags if isinstance(tag, str) and tag not in TAGS] if isinstance(tags, list) else []


def front_matter(card: str | None) -> Json:
    """The YAML block at the top of a model card; empty where there is none or it is not valid."""
    match = re.match(r"\A---\s*\n(.*?)\n---\s*(\n|\Z)", card or "", re.DOTALL)
    try:
        value = yaml.safe_load(match[1]) if match else None
    except Exception:  # yaml raises what Python does for a 13th month or 10,000 brackets
        value = None
    return value if isinstance(value, dict) else {}
