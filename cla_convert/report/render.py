"""report.json -> report.md: formatting only, no number is computed here."""

from pathlib import Path

import jinja2

from . import formats
from .bench import bench_notes, speed_table
from .run_folder import Json
from .words import domain_note, gate_line, group_title, table_note, training_line

TEMPLATES = Path(__file__).parent / "templates"


def render(report: Json) -> str:
    """The page as Markdown that reads well unrendered."""
    return environment().get_template("report.md.j2").render(report=report, **_bench(report["bench"]))


def render_bench(bench: Json) -> str:
    """The tables of a bench alone, as Markdown that reads well in a terminal."""
    return environment().get_template("bench.md.j2").render(**_bench(bench)).strip()


def _bench(bench: Json | None) -> Json:
    return {"bench": bench, "speed": speed_table(bench), "notes": bench_notes(bench)} if bench else {"bench": None}


def environment() -> jinja2.Environment:
    """Jinja with the filters of `formats`, for Markdown: whatever a template prints is guarded (`formats.guarded`)."""
    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined, finalize=formats.guarded,
    )  # fmt: skip
    named = ["cell", "fenced", "quoted", "percent", "points", "points_interval", "number", "ratio", "factor", "times",
             "rate", "change", "cla_cost", "cost_interval", "found", "layer_bytes", "interval", "bracket", "count",
             "integer", "duration", "model_name", "changed", "yes_no"]  # fmt: skip
    env.filters |= {name: getattr(formats, name) for name in named}
    env.filters |= {"p": formats.p_value, "bytes": formats.size, "yaml": formats.to_yaml}
    env.filters |= {"groups": formats.groups_text, "hardware": formats.hardware_line}
    env.filters |= {"group_title": group_title, "table_note": table_note, "training_line": training_line}
    env.filters |= {"gate_line": gate_line, "domain_note": domain_note}
    env.tests["accuracy"] = formats.is_accuracy
    return env
