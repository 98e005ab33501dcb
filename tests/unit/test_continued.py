"""What a user is told to do about a checkpoint of another run is something that can be done."""

from typing import Any

import pytest

from cla_convert.recipe import is_setting
from cla_convert.training.continued import differences, not_settings, refused, ways_on

IDENTITY = {"train.clip": 1.0, "train.batch_tokens": 512, "model": "a", "teacher": "b", "data": "c", "seed": 0}
STREAMS = "train.hidden_distance"


def after(allowed: tuple[str, ...] = (), **changed: Any) -> str:
    wrong = refused(differences(IDENTITY, IDENTITY | changed), allowed)
    return ways_on([one["name"] for one in wrong]) if wrong else ""


@pytest.mark.parametrize(
    ("changed", "first"),
    [
        ({"train.clip": 2.0}, "Set train.clip back to resume, accept it with --allow-change train.clip, give"),
        ({"data": "d"}, "Put the text and its settings (data) back as before to resume, accept it with --allow-"),
        ({"teacher": "d"}, "Put the teacher back as before to resume, accept it with --allow-change teacher, "),
        ({"model": "d"}, "Put the model to train back as before to resume, give another folder, or start over"),
        ({"train.batch_tokens": 256}, "Set train.batch_tokens back to resume, give another folder, or"),
        ({STREAMS: "new"}, f"Accept it with --allow-change {STREAMS}, give another folder, or start over"),
        ({STREAMS: "new", "seed": 1}, f"Accept them with --allow-change seed --allow-change {STREAMS}, give"),
        ({STREAMS: "new", "model": "d"}, f"Put the model to train back as before and accept {STREAMS} with --allow-"),
    ],
)  # fmt: skip
def test_only_what_can_be_done_is_asked_for(changed: dict[str, Any], first: str) -> None:
    assert after(**changed).startswith(first)
    accepted = after(("train", "seed", "data", "teacher", "model"), **changed)
    assert bool(accepted) == ("model" in changed or "train.batch_tokens" in changed)


def test_what_comes_and_goes_with_a_setting_is_told_as_the_setting() -> None:
    saved = IDENTITY | {STREAMS: "new", "train.hidden_weight": 1.0}
    assert [one["name"] for one in differences(saved, IDENTITY | {"train.hidden_weight": 0.0})] == [
        "train.hidden_weight"
    ]
    older = {name: value for name, value in saved.items() if name != STREAMS}
    assert [one["name"] for one in differences(older, saved | {"train.clip": 2.0})] == ["train.clip", STREAMS]


def test_what_this_version_decides_is_said_to_be_no_setting() -> None:
    assert "No setting: train.hidden_distance; this version" in not_settings(["train.clip", STREAMS])
    assert not not_settings(["train.clip", "data", "model", "teacher", "seed", "device", "train.learning_rates"])


@pytest.mark.parametrize("name", ["train", "train.clip", "data", "eval.retrieval.samples", "seed"])
def test_a_setting_is_known_by_its_name(name: str) -> None:
    assert is_setting(name) and not is_setting(f"{name}.no_such")
