"""Tables in plain text: whole words, and never wider than the screen."""

from pathlib import Path

import pytest

from cla_convert.conversion.inspect import inspect_model
from cla_convert.conversion.inspect import render as render_model
from cla_convert.evaluation.results import render as render_scores
from cla_convert.report.render import render_bench
from cla_convert.tables import table

from ..tiny import save_tiny
from .run_files import bench_result

WIDTHS = (40, 60, 80, 120)
TITLES, ROWS = ["what it is", "number"], [["a b", "1"], ["some words more", "22 (3 - 4)"]]


def test_a_table_with_room_is_aligned() -> None:
    assert table(TITLES, ROWS, numbers=[False, True], width=80).split("\n") == [
        "what it is           number",
        "a b                       1",
        "some words more  22 (3 - 4)",
    ]


def test_cells_break_between_words_where_there_is_less() -> None:
    assert table(TITLES, ROWS, numbers=[False, True], width=18).split("\n") == [
        "what it     number",
        "is",
        "a b              1",
        "some       22 (3 -",
        "words           4)",
        "more",
    ]


def test_a_row_without_room_is_a_list() -> None:
    assert table(TITLES, ROWS, numbers=[False, True], width=11).split("\n") == [
        "a b", "  number: 1", "some words", "    more", "  number:", "    22 (3 -", "    4)",
    ]  # fmt: skip


@pytest.mark.parametrize("width", WIDTHS)
def test_what_verbs_print_is_as_wide_as_the_screen(tmp_path: Path, width: int) -> None:
    bench = bench_result()
    scores = {
        "tasks": {"hellaswag_of_a_longer_name": {"acc_norm": 0.5, "brier_score": 12345.678}},
        "stderr": {}, "n": {"hellaswag_of_a_longer_name": 10000}, "specification_hash": "a" * 64, "seconds": 3,
        "specification": {"tasks": {"hellaswag_of_a_longer_name": {"chat_template": "b" * 64}}},
        "texts": {"t": {"name": "held_out", "tokens": 5, "perplexity": 3.0, "bits_per_byte": 1.0}},
    }  # fmt: skip
    described = inspect_model(str(save_tiny("gemma3", tmp_path / "m")))
    tables = {
        "bench": "\n".join(line for line in render_bench(bench, width).split("\n") if not line.startswith("- ")),
        "eval": render_scores(scores, width),
        "inspect": render_model(described, width=width).partition("cla2")[2].partition("--kv-heads")[0],
    }
    for name, text in tables.items():
        assert text.strip() and max(map(len, text.split("\n"))) <= width, name
        assert "|" not in text, name
