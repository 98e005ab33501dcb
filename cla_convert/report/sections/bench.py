"""Memory and speed, as `cla-convert bench` measured them."""

from collections.abc import Mapping, Sequence
from functools import partial

from ..bench_tables import bench_blocks, described
from ..content import Block, Figure
from ..plots import draw_bench
from ..run_folder import Json, RunFiles
from ..section import Material, Picture, Section, register

ALT = "tokens per second over batch size"


def collect(material: Material, report: Json) -> Json:
    """bench: bench.json with the table, gains and notes; None where there is none."""
    return {"bench": described(material.run.bench) if material.run.bench else None}


def show(report: Json) -> Sequence[Block]:
    """The tables with the picture between them."""
    if not report["bench"]:
        return []
    memory, *rest = bench_blocks(report["bench"])
    figure = [Figure("bench", ALT)] if "bench" in report["plots"] else []
    return [memory, *figure, *rest]


def draw(run: RunFiles, report: Json) -> Mapping[str, Picture]:
    """Tokens per second over batch size."""
    return {"bench": Picture(ALT, partial(draw_bench, run.bench))} if run.bench else {}


register(Section("bench", place=65, title="Memory and speed", collect=collect, show=show, draw=draw))
