"""The generated documents of passkey and needle, and how they are scored."""

import re
from pathlib import Path

import pytest

from cla_convert.errors import InputError, UsageError
from cla_convert.evaluation.prepare import prepare
from cla_convert.evaluation.quiet import quiet
from cla_convert.evaluation.retrieval.documents import documents
from cla_convert.evaluation.retrieval.scoring import process_results
from cla_convert.evaluation.samples import grid
from cla_convert.recipe import Evaluate
from tests.conftest import byte_tokenizer, save_tiny_llama

GRID = dict(lengths=[500, 900], depths=[0.0, 0.5, 1.0], samples=2, seed=0)


class WordTokenizer:
    """One token a word: another tokenizer than bytes."""

    def __call__(self, text: str) -> dict:
        return {"input_ids": text.split()}


@pytest.mark.parametrize("name", ["passkey", "needle"])
@pytest.mark.parametrize("tokenizer", [byte_tokenizer(), WordTokenizer()])
def test_prompt_and_answer_fill_the_length_and_never_exceed_it(name: str, tokenizer):
    for row in documents(name, tokenizer, **GRID):
        used = len(tokenizer(f"{row['prompt']} {row['answer']}")["input_ids"])
        assert used == row["tokens"] <= row["length"]
        if name == "passkey":  # its longest sentence has 21 characters
            assert used > row["length"] - 25


@pytest.mark.parametrize("name", ["passkey", "needle"])
def test_the_fact_stands_at_its_depth_and_nowhere_else(name: str):
    for row in documents(name, WordTokenizer(), lengths=[2000], depths=[0.0, 0.25, 0.5, 1.0], samples=2, seed=3):
        head, tail = row["prompt"].split("\n")[1], row["prompt"].split("\n")[2]
        assert row["answer"] in head and row["answer"] not in tail
        before, after = head.split("The pass key is" if name == "passkey" else "The special magic number")[0], head
        share = len(re.split("[.!?] ", before)) / len(re.split("[.!?] ", after))
        assert share == pytest.approx(row["depth"], abs=0.03)


def test_documents_depend_on_the_seed_and_their_place_only():
    more = documents("needle", byte_tokenizer(), **(GRID | {"samples": 3}))
    assert documents("needle", byte_tokenizer(), **GRID) == more[:12]
    other = documents("needle", byte_tokenizer(), **(GRID | {"seed": 1}))
    assert not {row["prompt"] for row in other} & {row["prompt"] for row in more}
    assert {(row["length"], row["depth"]) for row in more[:6]} == {(n, d) for n in (500, 900) for d in (0.0, 0.5, 1.0)}


def test_a_length_without_room_for_the_question_is_refused():
    with pytest.raises(InputError, match="100 tokens are too few"):
        documents("passkey", byte_tokenizer(), **(GRID | {"lengths": [100]}))


def test_requests_ask_for_a_space_and_the_digits(tiny_llama: Path):
    spec = Evaluate(tasks=["passkey", "needle"], limit=1, retrieval={"lengths": [450], "samples": 1})
    with quiet():
        for task in prepare(spec, 0, tiny_llama):
            assert task.frozen["source"] == "generated"
            assert task.frozen["n"] == 5  # the grid, whatever the limit of the other tasks
            for instance in task.tasks["tasks"][task.name].instances:
                prompt, answer = instance.args
                assert prompt.endswith(" is") and answer == f" {instance.doc['answer']}" and answer[1:].isdigit()


def test_lengths_follow_the_context_of_the_model(tmp_path: Path):
    model = save_tiny_llama(tmp_path, max_position_embeddings=1600)
    spec = Evaluate(tasks=["passkey"], retrieval={"depths": [0.5], "samples": 1})
    with quiet():
        (task,) = prepare(spec, 0, model)
    assert [doc["length"] for doc in task.tasks["tasks"]["passkey"].eval_docs] == [400, 800, 1600]
    for changes in ({"retrieval": {"lengths": [1700]}}, {"max_length": 700, "retrieval": {"lengths": [800]}}):
        with pytest.raises(UsageError, match="does not fit"), quiet():
            prepare(Evaluate(tasks=["passkey"], **changes), 0, model)


@pytest.mark.parametrize("name", ["passkey", "needle"])
def test_a_short_context_gets_the_lengths_that_it_has_room_for(tmp_path: Path, name: str):
    model = save_tiny_llama(tmp_path, max_position_embeddings=512)
    spec = Evaluate(tasks=[name], retrieval={"depths": [0.5], "samples": 1})
    with quiet():
        (task,) = prepare(spec, 0, model)  # 128 tokens have no room
        assert [doc["length"] for doc in task.tasks["tasks"][name].eval_docs] == [256, 512]
        with pytest.raises(InputError, match=f"{name} does not fit into a context of 100 tokens") as caught:
            prepare(Evaluate(tasks=[name], max_length=100), 0, model)
        assert f"Leave {name} out" in caught.value.fix
        with pytest.raises(InputError, match=r"eval\.retrieval\.lengths: 100 tokens are too few"):
            prepare(Evaluate(tasks=[name], retrieval={"lengths": [512, 100]}), 0, model)


def test_without_a_model_the_names_are_known_and_nothing_is_built():
    assert [task.name for task in prepare(Evaluate(tasks=["passkey", "piqa"], limit=1), 0)] == ["piqa"]


def test_score_and_grid():
    assert process_results({}, [(-0.5, True)]) == {"acc": 1.0, "loglikelihood": -0.5}
    assert process_results({}, [(-9.0, False)])["acc"] == 0.0
    samples = [
        {"doc": {"length": n, "depth": 0.5}, "acc": acc, "loglikelihood": nats}
        for n, acc, nats in [(512, 1.0, -1.0), (512, 0.0, -3.0), (256, 1.0, -0.5)]
    ]
    assert grid("generated", {"passkey": samples}) == {
        "grid": [
            {"length": 256, "depth": 0.5, "n": 1, "acc": 1.0, "loglikelihood": -0.5},
            {"length": 512, "depth": 0.5, "n": 2, "acc": 0.5, "loglikelihood": -2.0},
        ]
    }
    assert grid("lm-eval", {"passkey": samples}) == {}
