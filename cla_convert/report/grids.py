"""Tasks that hide an answer in a long context: accuracy by length of the context and depth of the answer."""

from .run_folder import POINTS, Json, RunFiles


def find_grids(run: RunFiles, tasks: Json) -> dict[str, dict[str, Json]]:
    """{task: {point: table}} of the tasks whose result files hold a grid of {length, depth, n, acc}."""
    found = {task: {point: (run.task_file(point, task) or {}).get("grid") for point in POINTS} for task in tasks}
    tables = {task: {p: _table(grid) for p, grid in grids.items() if grid} for task, grids in found.items()}
    return {task: by_point for task, by_point in tables.items() if by_point}


def _table(grid: list[Json]) -> Json:
    """lengths, and rows of {depth, cells}; a cell that was not measured is None."""
    lengths, depths = (sorted({cell[key] for cell in grid}) for key in ("length", "depth"))
    cells = {(cell["depth"], cell["length"]): cell for cell in grid}
    return {
        "lengths": lengths,
        "rows": [{"depth": depth, "cells": [cells.get((depth, length)) for length in lengths]} for depth in depths],
    }
