"""What was made of which model."""

from collections.abc import Sequence

from ...models.shape import owners_of
from ..content import Block, Paragraph
from ..formats import count, model_name, owners_text, plural
from ..run_folder import POINTS, Json
from ..section import Material, Section, register
from ..text import code

_KEPT = (
    "output", "sharing", "init", "kv_source_layers", "kv_heads", "parameters", "seconds", "peak_rss_bytes", "groups"
)  # fmt: skip


def collect(material: Material, report: Json) -> Json:
    """source, converted, title and the points at which something was measured."""
    run = material.run
    source = run.convert.get("source") or {"model": (run.recipe.get("source") or {}).get("model")}
    converted = {key: run.convert[key] for key in _KEPT if key in run.convert}
    if sources := converted.get("kv_source_layers"):
        converted |= {"layers": len(sources), "owners": len(owners_of(sources))}
    measured = [run.results, run.held_out, *({p: texts for p, texts in run.texts.items() if texts},)]
    points = [point for point in POINTS if any(point in one for one in measured)]
    return {"source": source, "converted": converted, "title": model_name(source), "points": points}


def show(report: Json) -> Sequence[Block]:
    """One sentence under the title."""
    converted, train = report["converted"], report["train"]
    if not converted.get("layers"):
        return []
    trained = f", uptrained on {count(train['tokens'])} tokens" if train and train.get("tokens") else ""
    return [
        Paragraph(
            [
                f"{owners_text(converted['kv_source_layers'])} cache keys and values (",
                code(converted.get("sharing") or "by hand"), f"){fewer_heads(converted)}, initialised by ",
                code(converted.get("init") or "?"), f"{trained}.",
            ],
            "note",
        )
    ]  # fmt: skip


def fewer_heads(converted: Json) -> str:
    """That a layer has fewer KV heads than in the source, as the end of a sentence; nothing if it has not."""
    heads = converted.get("kv_heads") or {}
    if not heads or heads["before"] == heads["after"]:
        return ""
    return f", with {plural(heads['after'], 'KV head')} a layer instead of {heads['before']}"


register(Section("model", place=0, collect=collect, show=show, style=lambda report: "bare"))
