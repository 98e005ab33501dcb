"""Tables in plain text, no wider than a screen: cells break between words, and rows without room become lists."""

import textwrap
from collections.abc import Sequence

_GAP = "  "


def table(titles: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: Sequence[bool], width: int) -> str:
    """The columns under their titles; `numbers` says which of them stand at the right."""
    lines = [list(titles), *map(list, rows)]
    columns = list(zip(*lines, strict=True))
    least = [max(_longest_word(cell) for cell in column) for column in columns]
    widths = [max(map(len, column)) for column in columns]
    room = width - len(_GAP) * (len(columns) - 1)
    if sum(least) > room:
        return "\n".join(_listed(titles, row, width) for row in rows)
    while sum(widths) > room:  # the widest column that can give way does
        widest = max((i for i in range(len(widths)) if widths[i] > least[i]), key=lambda i: widths[i])
        widths[widest] -= 1
    return "\n".join(text for line in lines for text in _broken(line, widths, numbers))


def _longest_word(cell: str) -> int:
    return max(map(len, cell.split()), default=0)


def _broken(cells: Sequence[str], widths: Sequence[int], numbers: Sequence[bool]) -> list[str]:
    """The lines of a row; a cell of fewer lines than another ends earlier."""
    texts = [_wrapped(cell, width) or [""] for cell, width in zip(cells, widths, strict=True)]
    height = max(map(len, texts))
    columns = []
    for text, width, number in zip(texts, widths, numbers, strict=True):
        full = [*text, *[""] * (height - len(text))]
        columns.append([line.rjust(width) if number else line.ljust(width) for line in full])
    return [_GAP.join(line).rstrip() for line in zip(*columns, strict=True)]


def _listed(titles: Sequence[str], cells: Sequence[str], width: int) -> str:
    """A row as a list: its first cell, and below it the others by their titles."""
    told = [f"  {title}: {cell}".replace("  : ", "  ") for title, cell in zip(titles[1:], cells[1:], strict=True)]
    return "\n".join(line for text in (cells[0], *told) for line in _wrapped(text, width, "    "))


def _wrapped(text: str, width: int, indent: str = "") -> list[str]:
    return textwrap.wrap(text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
