"""bench.json, bench.md and bench.png."""

from pathlib import Path
from typing import Any

from ..files import write_bytes, write_json
from ..report.figures import to_png
from ..report.plots import draw_bench
from ..report.render import render_bench
from ..run_folder import RunFolder


def write_results(folder: Path, bench: dict[str, Any]) -> None:
    """Write what `bench` returned into `folder`. In a run folder, its report shows bench.json."""
    files = RunFolder(folder)
    picture = files.picture("bench")
    write_json(files.bench, bench)
    write_bytes(picture, to_png(draw_bench(bench)))
    page = f"# What sharing saves, measured\n\n{render_bench(bench)}\n\n![tokens per second]({picture.name})\n"
    write_bytes(files.bench_page, page.encode(errors="backslashreplace"))
