"""The numbers that are read first."""

from collections.abc import Sequence

from ..content import Block, Tile, Tiles
from ..formats import change, count, duration, integer, number, percent, points, points_interval, times, titled
from ..run_folder import Json
from ..section import Section, register
from .kv import how_long
from .verdict import TONES


def show(report: Json) -> Sequence[Block]:
    """KV bytes, accuracy, two perplexities, the CLA cost and the training tokens: those that there are."""
    tones = {(row["scope"], row["measure"]): TONES[row["verdict"]] for row in report["judged"]}
    tiles = []
    if (kv := report["kv"])["ratio"]:
        sizes = f"{integer(kv['bytes_per_token_before'])} \u2192 {integer(kv['bytes_per_token_after'])} bytes per token"
        tiles.append(Tile("KV cache", times(kv["ratio"]), f"smaller{how_long(kv)}: {sizes}"))
    if mean := report["mean_accuracy"]:
        more = f"{percent(mean['before'])}% \u2192 {percent(mean['after'])}%, 95% CI {points_interval(mean['ci95'])}"
        tiles.append(Tile("Accuracy, points", points(mean["delta"]), more, tones.get(("mean", "accuracy"), "")))
    for name, row in list(report["perplexity"].items())[:2]:
        if row["relative"] is not None:
            more = f"perplexity {number(row['before'])} \u2192 {number(row['last'])}"
            tiles.append(
                Tile(titled(name).capitalize(), change(row["relative"]), more, tones.get((name, "perplexity"), ""))
            )
    if agreement := report["agreement"].get(report["compared_point"]):
        more = f"nats per token; {percent(agreement['top1'])}% the same most likely token"
        tiles.append(Tile("KL to the source", number(agreement["kl"], 3), more, tones.get(("held_out", "kl"), "")))
    if report["control"] and (cost := report["control"]["mean_accuracy"]):
        more = f"after \u2212 control, 95% CI {points_interval(cost['ci95'])}"
        tiles.append(Tile("CLA cost, points", points(cost["delta"]), more))
    if train := report["train"]:
        more = duration(train["seconds"]) if train.get("seconds") else ""
        more += f" on {train['device']}" if train.get("device") else ""
        tiles.append(Tile("Training tokens", count(train["tokens"]), more.strip()))
    return [Tiles(tiles)] if tiles else []


register(Section("tiles", place=10, show=show, style=lambda report: "tiles"))
