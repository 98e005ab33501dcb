"""Tasks that hide an answer in a long context: accuracy by length of the context and depth of the answer."""

from collections.abc import Sequence

from ...evaluation.statistics import wilson
from ..content import Block, Cell, Column, Group, Heading, Paragraph, Row, Table
from ..formats import integer, number, percent, percent_interval
from ..run_folder import POINTS, Json
from ..section import Material, Section, register


def collect(material: Material, report: Json) -> Json:
    """grids {task: {point: table}} of the tasks whose result files hold a grid of {length, depth, n, acc}."""
    run = material.run
    found = {task: {p: (run.task_file(p, task) or {}).get("grid") for p in POINTS} for task in report["tasks"]}
    tables = {task: {p: _table(grid) for p, grid in grids.items() if grid} for task, grids in found.items()}
    return {"grids": {task: by_point for task, by_point in tables.items() if by_point}}


def _table(grid: list[Json]) -> Json:
    """lengths, and rows of {depth, cells}; a cell that was not measured is None."""
    lengths, depths = (sorted({cell[key] for cell in grid}) for key in ("length", "depth"))
    cells = {(cell["depth"], cell["length"]): cell | {"ci95": wilson(cell["acc"], cell["n"])} for cell in grid}
    return {
        "lengths": lengths,
        "rows": [{"depth": depth, "cells": [cells.get((depth, length)) for length in lengths]} for depth in depths],
    }


def show(report: Json) -> Sequence[Block]:
    """A heat map a task and point."""
    blocks: list[Block] = []
    for task, tables in report["grids"].items():
        blocks += [Heading(task), Group([_map(point, table) for point, table in tables.items()])]
    meaning = (
        "Per cent found, by length of the context in tokens (across) and by where in it the answer stood (down; 0% is "
        "the start)."
    )
    return [*blocks, Paragraph(meaning, "note")] if blocks else []


def _map(point: str, table: Json) -> Table:
    columns = [Column("depth, % \\ tokens", text=True), *(Column(integer(length)) for length in table["lengths"])]
    rows = [Row([f"{percent(row['depth'])}", *map(_cell, row["cells"])]) for row in table["rows"]]
    return Table(columns, rows, "map", point)


def _cell(cell: Json | None) -> Cell:
    if cell is None:
        return Cell("-", share=0.0)
    title = f"{cell['n']} documents of {cell['length']} tokens, 95% interval {percent_interval(cell['ci95'])}%"
    if cell.get("loglikelihood") is not None:
        title += f"; mean log-likelihood of the answer {number(cell['loglikelihood'], 3)} nats"
    return Cell(percent(cell["acc"]), share=float(cell["acc"]), title=title)


register(
    Section(
        "long-context", place=45, title="Found in a long context", collect=collect, show=show, needs=("accuracy",)
    )
)  # fmt: skip
