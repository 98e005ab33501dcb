"""report.json -> report.md and report.html, from what the sections show.

The page needs no network and no script, and reads in light and dark, on a desk and on a phone.
"""

from pathlib import Path

from markupsafe import Markup, escape

from ..tables import table
from .bench_tables import bench_blocks, described
from .content import Block, Cell, Svgs, Table
from .run_folder import Json
from .section import in_page_order
from .text import cell_in_markdown, in_markdown

_STYLE = Path(__file__).parent / "style.css"
_PAGE = Markup("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title} with Cross-Layer Attention</title>
<style>
{style}</style>
</head>
<body>
<main>
<header>
<p class="over">Cross-Layer Attention: before and after</p>
<h1>{title}</h1>
</header>
{sections}
<footer>Made with cla-convert from the files of the run folder. Nothing in this page is loaded from elsewhere.</footer>
</main>
</body>
</html>
""")


def render_markdown(report: Json) -> str:
    """The page as Markdown that reads well unrendered."""
    parts = [f"# {cell_in_markdown(report['title'])} with Cross-Layer Attention: before and after"]
    for section in in_page_order():
        if blocks := section.show(report):
            parts += [f"## {section.title}"] if section.title else []
            parts += [block.markdown() for block in blocks]
    return "\n\n".join(part for part in parts if part) + "\n"


def render_html(report: Json, svgs: Svgs) -> str:
    """The HTML page; `svgs` are the figures by name, in two widths."""
    shown = []
    for section in in_page_order():
        if blocks := section.show(report):
            title = Markup("<h2>{}</h2>\n").format(section.title) if section.title else ""
            inner = Markup("\n").join(block.html(svgs) for block in blocks)
            shown.append(
                Markup('<section id="{}" class="{}">\n{}{}\n</section>').format(
                    section.name, section.style(report), title, inner
                )
            )
    style = Markup(_STYLE.read_text(encoding="utf-8"))
    return str(_PAGE.format(title=escape(report["title"]), style=style, sections=Markup("\n").join(shown)))


def render_bench(bench: Json, width: int | None = None) -> str:
    """The tables of a bench alone, as Markdown; with a `width` as plain text for a screen that wide."""
    blocks = bench_blocks(described(bench))
    return "\n\n".join(block.markdown() if width is None else _on_screen(block, width) for block in blocks)


def _on_screen(block: Block, width: int) -> str:
    if not isinstance(block, Table):
        return block.markdown()
    rows = [[in_markdown(cell.text if isinstance(cell, Cell) else cell) for cell in row.cells] for row in block.rows]
    titles = [column.title for column in block.columns]
    return table(titles, rows, numbers=[not column.text for column in block.columns], width=width)
