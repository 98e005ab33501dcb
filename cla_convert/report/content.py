"""What a report is made of: blocks that know how they look as Markdown and as HTML.

A section says what it shows once, in these blocks; both pages are made from them. Whatever comes from outside (names,
questions, settings) is text: every block escapes what it is given, in both formats (text.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from markupsafe import Markup

from .text import Text, cell_in_markdown, fenced, guarded, in_html, in_markdown

Svgs = Mapping[str, str]
"""Pictures as SVG elements, by name."""


class Block(Protocol):
    """A part of a section."""

    def markdown(self) -> str:
        """As Markdown that reads well unrendered."""
        ...

    def html(self, svgs: Svgs) -> Markup:
        """As an HTML element."""
        ...


@dataclass(frozen=True)
class Paragraph:
    """Some sentences."""

    text: Text
    style: str = ""
    """note: smaller and paler."""

    def markdown(self) -> str:
        return in_markdown(self.text)

    def html(self, svgs: Svgs) -> Markup:
        return Markup('<p class="{}">{}</p>').format(self.style, in_html(self.text))


@dataclass(frozen=True)
class Heading:
    """The start of a part of a section."""

    text: Text

    def markdown(self) -> str:
        return f"### {in_markdown(self.text)}"

    def html(self, svgs: Svgs) -> Markup:
        return Markup("<h3>{}</h3>").format(in_html(self.text))


@dataclass(frozen=True)
class Bullets:
    """A list."""

    items: Sequence[Text]
    style: str = ""

    def markdown(self) -> str:
        return "\n".join(f"- {in_markdown(item)}" for item in self.items)

    def html(self, svgs: Svgs) -> Markup:
        items = Markup("").join(Markup("<li>{}</li>").format(in_html(item)) for item in self.items)
        return Markup('<ul class="bullets {}">{}</ul>').format(self.style, items)


@dataclass(frozen=True)
class Facts:
    """Names and what belongs to them."""

    pairs: Sequence[tuple[str, Text]]

    def markdown(self) -> str:
        return "\n".join(f"- {guarded(name)}: {in_markdown(text)}" for name, text in self.pairs)

    def html(self, svgs: Svgs) -> Markup:
        pairs = (Markup("<dt>{}</dt><dd>{}</dd>").format(name, in_html(text)) for name, text in self.pairs)
        return Markup('<dl class="facts">{}</dl>').format(Markup("").join(pairs))


@dataclass(frozen=True)
class Listing:
    """Code, settings, a command: every character as it is."""

    text: str

    def markdown(self) -> str:
        return fenced(self.text)

    def html(self, svgs: Svgs) -> Markup:
        return Markup("<pre>{}</pre>").format(self.text)


@dataclass(frozen=True)
class Figure:
    """A picture that the section draws (`Section.draw`)."""

    name: str
    alt: str
    caption: Text = ""

    def markdown(self) -> str:
        caption = f"\n\n{in_markdown(self.caption)}" if self.caption else ""
        return f"![{guarded(self.alt)}]({self.name}.png){caption}"

    def html(self, svgs: Svgs) -> Markup:
        # Drawn here, with every text in it escaped. The second one is for a phone: the same, with larger text.
        drawn = Markup("").join(Markup(svgs[name]) for name in (self.name, f"{self.name}-narrow") if name in svgs)
        caption = Markup("<figcaption>{}</figcaption>").format(in_html(self.caption)) if self.caption else ""
        return Markup("<figure>{}{}</figure>").format(drawn, caption)


@dataclass(frozen=True)
class Details:
    """What is folded away until somebody asks."""

    summary: Text
    blocks: Sequence[Block]

    def markdown(self) -> str:
        inner = "\n\n".join(block.markdown() for block in self.blocks)
        return f"<details><summary>{in_markdown(self.summary)}</summary>\n\n{inner}\n\n</details>"

    def html(self, svgs: Svgs) -> Markup:
        inner = Markup("\n").join(block.html(svgs) for block in self.blocks)
        return Markup("<details><summary>{}</summary>\n{}\n</details>").format(in_html(self.summary), inner)


@dataclass(frozen=True)
class Tile:
    """A number that is read first."""

    name: str
    value: str
    more: str = ""
    tone: str = ""


@dataclass(frozen=True)
class Tiles:
    """The numbers that are read first."""

    tiles: Sequence[Tile]

    def markdown(self) -> str:
        return "\n".join(f"- {guarded(t.name)}: **{guarded(t.value)}** {guarded(t.more)}".rstrip() for t in self.tiles)

    def html(self, svgs: Svgs) -> Markup:
        tile = Markup(
            '<div class="tile"><div class="name">{}</div><div class="value {}">{}</div><div class="more">{}</div></div>'
        )
        return Markup("\n").join(tile.format(t.name, t.tone, t.value, t.more) for t in self.tiles)


@dataclass(frozen=True)
class Column:
    """A column of a table."""

    title: str
    text: bool = False
    """Words, to be read from the left; else numbers."""
    quiet: bool = False
    long: bool = False
    """Needs a line of its own on a phone."""


@dataclass(frozen=True)
class Cell:
    """A cell with more to it than its text."""

    text: Text
    share: float | None = None
    """Of a heat map: how strong its colour is, 0 to 1."""
    title: str = ""
    """What it says under the mouse."""


@dataclass(frozen=True)
class Row:
    """A row; its first cell is its heading."""

    cells: Sequence[Text | Cell]
    style: str = ""
    """minor or sum."""


@dataclass(frozen=True)
class Table:
    """A table. On a phone every row becomes a card, so that nothing is cut off; a heat map scrolls."""

    columns: Sequence[Column]
    rows: Sequence[Row]
    style: str = "cards"
    """cards, cards wide (as wide as the page), or map."""
    caption: str = ""

    def markdown(self) -> str:
        lines = [self._line([cell_in_markdown(column.title) for column in self.columns])]
        lines.append("|" + "|".join("---" if column.text else "--:" for column in self.columns) + "|")
        for row in self.rows:
            texts = [cell_in_markdown(cell.text if isinstance(cell, Cell) else cell) for cell in row.cells]
            lines.append(self._line([f"**{texts[0]}**" if row.style == "sum" else texts[0], *texts[1:]]))
        table = "\n".join(lines)
        return f"{guarded(self.caption)}:\n\n{table}" if self.caption else table

    @staticmethod
    def _line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    def html(self, svgs: Svgs) -> Markup:
        head = Markup("").join(
            Markup('<th scope="col" class="{}">{}</th>').format("text" if column.text else "", column.title)
            for column in self.columns
        )
        rows = Markup("\n").join(map(self._row, self.rows))
        caption = Markup("<caption>{}</caption>").format(self.caption) if self.caption else ""
        return Markup(
            '<div class="scroll"><table class="{}">{}<thead><tr>{}</tr></thead>\n<tbody>\n{}\n</tbody></table></div>'
        ).format(self.style, caption, head, rows)

    def _row(self, row: Row) -> Markup:
        first, *rest = (cell if isinstance(cell, Cell) else Cell(cell) for cell in row.cells)
        cells = [Markup('<th scope="row">{}</th>').format(in_html(first.text))]
        cells += [self._cell(cell, column) for cell, column in zip(rest, self.columns[1:], strict=True)]
        return Markup('<tr class="{}">{}</tr>').format(row.style, Markup("").join(cells))

    def _cell(self, cell: Cell, column: Column) -> Markup:
        names = [name for name in ("text", "quiet", "long") if getattr(column, name)]
        share = Markup(' style="--share: {}"').format(round(cell.share, 3)) if cell.share is not None else ""
        title = Markup(' title="{}"').format(cell.title) if cell.title else ""
        return Markup('<td class="{}" data-label="{}"{}{}>{}</td>').format(
            " ".join(names), column.title, share, title, self._value(cell)
        )

    @staticmethod
    def _value(cell: Cell) -> Markup:
        """One element, so that it stays whole beside its name on a phone; nothing where there is nothing."""
        text = in_html(cell.text)
        return Markup("<span>{}</span>").format(text) if text else text


@dataclass(frozen=True)
class Group:
    """Blocks side by side where there is room."""

    blocks: Sequence[Block] = field(default_factory=list)

    def markdown(self) -> str:
        return "\n\n".join(block.markdown() for block in self.blocks)

    def html(self, svgs: Svgs) -> Markup:
        return Markup('<div class="group-of">{}</div>').format(Markup("\n").join(b.html(svgs) for b in self.blocks))
