"""What `cla-convert bench` measured, as rows and sentences for every page that shows it."""

import statistics

from ..console import human_bytes
from .content import Block, Bullets, Column, Row, Table
from .formats import as_many, hardware_line, integer, layer_bytes, rate, size, smaller, times
from .run_folder import Json

FEWEST_TURNS = 3
"""For a ratio. With one or two turns two copies of one model have come out 2 to 3 times apart on a shared machine."""


def described(bench: Json) -> Json:
    """bench.json with what its numbers come to: table (see `speed_table`), gains, and notes."""
    source, converted = (bench["models"][name] for name in ("source", "converted"))

    def gain(one: float | None, other: float | None) -> float | None:
        return one / other if one and other else None

    gains = {
        "kv": gain(source["kv"]["bytes_per_token"], converted["kv"]["bytes_per_token"]),
        "batch": gain(converted["largest_batch"], source["largest_batch"]),
        "context": gain(converted["longest_context"], source["longest_context"]),
    }
    return bench | {"table": speed_table(bench), "gains": gains, "notes": bench_notes(bench)}


def _state(*models: Json) -> list[Row]:
    """What layers without attention keep of a sequence, where there are some."""
    kept = [one["kv"].get("state_bytes") or 0 for one in models]
    name = "state of layers without attention, bytes a sequence"
    return [Row([name, *map(integer, kept), ""])] if any(kept) else []


def bench_blocks(bench: Json) -> list[Block]:
    """The tables of memory and of speed, and the notes, of what `described` returns."""
    source, converted, gains = bench["models"]["source"], bench["models"]["converted"], bench["gains"]
    memory = [
        Row(["KV bytes per token, measured", *(integer(one["kv"]["bytes_per_token"]) for one in (source, converted)),
             smaller(gains["kv"])]),
        Row([f"layers that cache, of {source['kv']['layers']}",
             *(layer_bytes(one["kv"]["layer_bytes_per_token"]) for one in (source, converted)), ""]),
        *_state(source, converted),
        Row(["weights", *(size(one["weight_bytes"]) for one in (source, converted)), ""]),
        Row([f"largest batch of {source['length']} tokens in {size(bench['memory']['bytes'])}",
             *(integer(one["largest_batch"]) for one in (source, converted)), as_many(gains["batch"])]),
        Row(["longest context there, one sequence", *(integer(one["longest_context"]) for one in (source, converted)),
             as_many(gains["context"])]),
    ]  # fmt: skip
    heading = f"{bench['dtype']} on {bench['device']}"
    columns = [Column(heading, text=True), Column("source"), Column("converted"), Column("ratio", text=True)]
    rows = [
        Row([row["phase"], str(row["batch"]), rate(row.get("source")), rate(row.get("converted")),
             str(row["turns"] or ""), times(row["ratio"])])
        for row in bench["table"]
    ]  # fmt: skip
    names = [
        Column("tokens/s", text=True),
        *map(Column, ("batch", "source", "converted", "turns", "converted / source")),
    ]
    return [Table(columns, memory), Table(names, rows), Bullets(bench["notes"], "note")]


def speed_table(bench: Json) -> list[Json]:
    """One row per phase and batch: phase, batch, source, converted (their rows of `bench`), turns, ratio.

    The ratio is the median over repetitions of converted to source, two runs that followed each other: what else the
    machine did meanwhile falls out. None with fewer than `FEWEST_TURNS`.
    """
    found: dict[tuple[str, int], Json] = {}
    for row in bench["speed"]:
        found.setdefault((row["phase"], row["batch"]), {})[row["model"]] = row
    table = []
    for (phase, batch), models in sorted(found.items(), key=lambda item: (item[0][0] != "prefill", item[0][1])):
        ours, theirs = (models[name].get("runs", []) for name in ("converted", "source"))
        ratios = [a / b for a, b in zip(ours, theirs, strict=False)]
        ratio = statistics.median(ratios) if len(ratios) >= FEWEST_TURNS else None
        table.append({"phase": phase, "batch": batch, **models, "turns": max(len(ours), len(theirs)), "ratio": ratio})
    return table


def bench_notes(bench: Json) -> list[str]:
    """What the tables mean, and what sharing does not speed up."""
    notes = [
        f"Memory: {human_bytes(bench['memory']['bytes'])} for each model, {bench['memory']['meaning']}"
        + (" The largest batch and context are found to within 1%." if bench["memory"]["enforced"] else ""),
        "Speed: median over turns, lowest to highest in brackets; the two models take turns, and the ratio is the "
        "median over turns. The same shapes run once untimed before. Decoding starts with "
        f"{bench['prompt']} tokens in the cache and generates {bench['new']}, with the dynamic cache of transformers, "
        "which copies itself at every step.",
        "Sharing does not speed up prefill: only the key and value projections of consumer layers are saved. Nor does "
        "decoding at the same batch read fewer keys and values: every layer still reads its owner's. What is gained "
        "there comes from writing and copying less. What sharing buys is a larger batch, or a longer context, in the "
        "same memory.",
    ]
    if bench.get("cut"):
        notes.append(
            f"Cut short, to end within {bench['seconds']:g} s of timing: {'; '.join(bench['cut'])}. "
            "A figure of one or two turns may be off by whatever else the machine did, so it takes "
            f"{FEWEST_TURNS} for a ratio: raise --seconds."
        )
    if equal := at_equal_memory(bench):
        batches = [bench["models"][name]["largest_batch"] for name in ("source", "converted")]
        notes.insert(
            0,
            f"In the same memory: batch {batches[0]} -> {batches[1]}, decoding {equal['source']:,.0f} -> "
            f"{equal['converted']:,.0f} tokens/s"
            + (f" ({equal['ratio']:.2f}x)." if equal["ratio"] else ", too few turns for a ratio."),
        )
    if bench.get("hardware"):
        notes.append(f"Measured on {hardware_line(bench['hardware'])}; torch {bench['versions'].get('torch')}.")
    built_for = bench["models"]["converted"]["max_position_embeddings"]
    if built_for and built_for < bench["models"]["converted"]["longest_context"]:
        notes.append(f"Longest contexts are what the memory holds; the model was built for {built_for:,} tokens.")
    return notes


def at_equal_memory(bench: Json) -> Json | None:
    """Decoding rate of each model at the largest batch that fits it, and their ratio; None if one was not timed."""
    rows = [
        row
        for row in bench["speed"]
        if row["phase"] == "decode" and row["fits"] and row["batch"] == bench["models"][row["model"]]["largest_batch"]
    ]
    if len(rows) != 2:
        return None
    rates = {row["model"]: row["tokens_per_second"] for row in rows}
    enough = min(len(row["runs"]) for row in rows) >= FEWEST_TURNS
    return {**rates, "ratio": rates["converted"] / rates["source"] if enough else None}
