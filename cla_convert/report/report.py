"""Build report.json, report.md and report.html from the files of a run folder; needs no torch, no model, no network.

    read the run folder -> every section collects its numbers (report.json) -> every section shows them, in blocks
    -> both pages from the same blocks

Any subset of the stages may have run. A number that was not measured is null in the JSON and a dash in the text.
"""

from collections.abc import Sequence
from pathlib import Path

from ..files import plain, write_bytes, write_json
from .figures import to_png, to_svg
from .render import render_html, render_markdown
from .run_folder import Json, RunFiles, explained, read_run_folder
from .section import Material, Picture, in_collection_order, in_page_order

WIDE, NARROW = 8.4, 3.5
"""Inches of a picture on a desk and on a phone, where the same text is then as large."""


def build_report(run_dir: Path, others: Sequence[Path] = ()) -> Json:
    """Write report.json, report.md, report.html and the pictures (*.png) into `run_dir`; return the report.

    Args:
        run_dir: the run to report on.
        others: further run folders to compare it with; they are only read.

    Raises:
        InputError: one of the folders is not a run folder, or a file in it does not hold what a stage leaves.
        UsageError: the same, of its recipe.
    """
    run, *rest = (read_run_folder(Path(folder)) for folder in (run_dir, *others))
    with explained(run_dir):
        report = collect(run, rest)
        drawn = pictures(run, report)
        report = plain({**report, "plots": {name: run.files.picture(name).name for name in drawn}})
        pngs = {name: to_png(picture.draw(WIDE)) for name, picture in drawn.items()}
        texts = {"md": render_markdown(report), "html": render_html(report, _svgs(drawn))}
    write_json(run.files.report, report)
    for name, png in pngs.items():
        write_bytes(run.files.picture(name), png)
    for name, text in texts.items():
        write_bytes(run.files.pages[name], text.encode("utf-8", errors="backslashreplace"))
    return report


def collect(run: RunFiles, others: Sequence[RunFiles] = ()) -> Json:
    """Everything the report says, as one JSON object (the keys that tools may read)."""
    material, report = Material(run, others), {}
    for section in in_collection_order():
        report |= section.collect(material, report)
    return report


def pictures(run: RunFiles, report: Json) -> dict[str, Picture]:
    """The pictures that there are numbers for."""
    return {name: one for section in in_page_order() for name, one in section.draw(run, report).items()}


def _svgs(drawn: dict[str, Picture]) -> dict[str, str]:
    found = {}
    for name, picture in drawn.items():
        if name != "sharing":  # which the page draws by itself
            found[name] = to_svg(picture.draw(WIDE), name, picture.alt, "wide")
            found[f"{name}-narrow"] = to_svg(picture.draw(NARROW), f"{name}-narrow", picture.alt, "narrow")
    return found
