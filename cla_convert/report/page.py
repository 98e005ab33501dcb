"""report.json -> report.html: one file that needs no network and no script, in light and dark, on a desk and a phone.

Everything that came from outside (names, samples, settings) is escaped by Jinja's autoescape; only the style sheet and
the SVGs that matplotlib drew here, whose text it escaped itself, go in as they are.
"""

import jinja2
from markupsafe import Markup

from .bench import bench_notes, speed_table
from .render import environment
from .run_folder import POINTS, Json
from .sharing import sharing_groups

TONE = {"within_margin": "good", "margin_broken": "bad", "not_enough_rows": "unsure", "not_measured": "unsure"}
"""Status -> colour of the verdict."""


def render_page(report: Json, svgs: dict[str, str]) -> str:
    """The HTML page; `svgs` are the figures by name."""
    heading, sentence = _verdict(report)
    return page_environment().get_template("html/report.html.j2").render(
        report=report,
        svgs={name: Markup(svg) for name, svg in svgs.items()},
        tone=TONE[report["status"]],
        heading=heading,
        sentence=sentence,
        points=_points(report),
        groups=sharing_groups(report["converted"]),
        speed=speed_table(report["bench"]) if report["bench"] else [],
        notes=bench_notes(report["bench"]) if report["bench"] else [],
    )  # fmt: skip


def page_environment() -> jinja2.Environment:
    """The Markdown page's filters, with HTML escaping on."""
    env = environment()
    env.finalize = None
    env.autoescape = lambda name: name is not None and name.endswith(".html.j2")
    return env


def _verdict(report: Json) -> tuple[str, str]:
    """`Within the margin: after uptraining, ...` as heading and sentence."""
    heading, _, sentence = report["verdict"].partition(": ")
    return heading, sentence[:1].upper() + sentence[1:]


def _points(report: Json) -> list[str]:
    """The points that have a column: those at which anything was measured."""
    rows = [row for metrics in report["tasks"].values() for row in metrics.values()]
    rows += list(report["perplexity"].values())
    return [point for point in POINTS if any(row.get(point) is not None for row in rows)]
