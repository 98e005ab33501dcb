"""The KV cache: bytes per token, computed by the conversion and measured in a real generation."""

from collections.abc import Sequence
from typing import Any

from ..content import Block, Column, Paragraph, Row, Table
from ..formats import integer, smaller
from ..run_folder import Json
from ..section import Material, Section, register
from ..text import code


def collect(material: Material, report: Json) -> Json:
    """kv {bytes_per_token_before, bytes_per_token_after, ratio, measured_..., ...}.

    long_context {window, tokens, before, after, ratio}: of a model with sliding windows, whose `ratio` holds for
    contexts within the window; else None.
    """
    run = material.run
    computed: Any = run.convert.get("kv_bytes_per_token") or {}
    heads: Any = run.convert.get("kv_heads") or {}
    before = run.kv_cache.get("before", {})
    after = run.kv_cache.get(run.last_point) or {}
    kv = {
        "bytes_per_token_before": computed.get("before"),
        "bytes_per_token_after": computed.get("after"),
        "measured_bytes_before": before.get("measured_bytes"),
        "measured_bytes_after": after.get("measured_bytes"),
        "measured_bytes_per_token_before": before.get("bytes_per_token"),
        "measured_bytes_per_token_after": after.get("bytes_per_token"),
        "measured_tokens": after.get("tokens") or before.get("tokens"),
        "heads_before": heads.get("before"),
        "heads_after": heads.get("after"),
        "cached_layers_before": before.get("cached_layers"),
        "cached_layers_after": after.get("cached_layers"),
        "dtype_before": before.get("dtype"),
        "dtype_after": after.get("dtype"),
        "sliding_layers": after.get("sliding_layers"),
        "state_bytes_before": before.get("state_bytes"),
        "state_bytes_after": after.get("state_bytes"),
    }
    ratios = {
        name: ratio(kv[f"{size}_before"], kv[f"{size}_after"])
        for name, size in (
            ("ratio", "bytes_per_token"), ("measured_ratio", "measured_bytes_per_token"),
            ("measured_bytes_ratio", "measured_bytes"),
        )
    }  # fmt: skip
    return {"kv": kv | ratios | {"long_context": with_ratio(run.convert.get("kv_bytes_of_long_context"))}}


def ratio(before: float | None, after: float | None) -> float | None:
    """How many times smaller; None unless both are known."""
    return before / after if before and after else None


def with_ratio(long: Json | None) -> Json | None:
    """The cache of a long context (models/shape.py), and how many times smaller it is."""
    return {**long, "ratio": ratio(long["before"], long["after"])} if long else None


def how_long(kv: Json) -> str:
    """What stands behind `1.83x smaller`: ` up to 512 tokens, the window; 1.25x smaller at 32,768`."""
    if not (long := kv.get("long_context")):
        return ""
    window = f" up to {integer(long['window'])} tokens, the window of its sliding layers"
    return f"{window}; {smaller(long['ratio'])} at {integer(long['tokens'])}"


def show(report: Json) -> Sequence[Block]:
    """The table."""
    kv = report["kv"]

    def row(name: str, key: str, factor: str | None = None) -> Row:
        last = smaller(kv[factor]) if factor else ""
        return Row([name, integer(kv[f"{key}_before"]), integer(kv[f"{key}_after"]), last])

    columns = [Column("", text=True), Column("before"), Column("after"), Column("ratio", text=True)]
    rows = [
        row("bytes per token, computed", "bytes_per_token", "ratio"),
        row("bytes per token, measured", "measured_bytes_per_token", "measured_ratio"),
        row(f"live bytes at {kv['measured_tokens'] or '-'} tokens", "measured_bytes", "measured_bytes_ratio"),
        *_long(kv["long_context"]),
        row("layers that cache", "cached_layers"),
        *([row("state of layers without attention, bytes", "state_bytes")] if kv["state_bytes_after"] else []),
        *([row("KV heads of a layer", "heads")] if kv["heads_before"] != kv["heads_after"] else []),
        Row(["number format", kv["dtype_before"] or "-", kv["dtype_after"] or "-", ""]),
    ]
    measured = [
        "Measured: the live tensors of ",
        code("past_key_values"),
        " after a real ",
        code("generate"),
        ", at two lengths.",
    ]
    return [Table(columns, rows), Paragraph(measured, "note")]


def _long(long: Json | None) -> list[Row]:
    if not long:
        return []
    name = f"bytes at {integer(long['tokens'])} tokens, computed (sliding layers keep {integer(long['window'])})"
    return [Row([name, integer(long["before"]), integer(long["after"]), smaller(long["ratio"])])]


register(Section("kv", place=50, title="KV cache", collect=collect, show=show))
