"""Conversations of data sets are put into the model's own chat template."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from cla_convert import console
from cla_convert.conversations import Conversations
from cla_convert.errors import InputError
from cla_convert.recipe import Data, Generate, Recipe, TextSource
from cla_convert.stages.text import UNTAUGHT, say_untaught
from cla_convert.training.data import TokenStore, prepare_data
from cla_convert.training.mixture import share_of_chats
from cla_convert.training.text_size import tokens_there
from tests.conftest import byte_tokenizer

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}<|eos|>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
ASKED = [[("user", f"what is {i}?"), ("assistant", f"it is {i}")] for i in range(40)]
WRITTEN = {f"[user]what is {i}?<|eos|>[assistant]it is {i}<|eos|>" for i in range(40)}


def chatting() -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def turns(asked: list[tuple[str, str]], role: str = "role", content: str = "content") -> list[dict[str, str]]:
    return [{role: who, content: words} for who, words in asked]


def prepared(tmp_path: Path, source: TextSource, tokenizer: Any = None) -> TokenStore:
    return prepare_data(
        Data(sources=[source], held_out=0.2), tokenizer or chatting(), tokens=1_000_000, held_out_tokens=1_000_000,
        cache_dir=tmp_path / "cache", seed=0,
    )  # fmt: skip


def written(store: TokenStore) -> set[str]:
    text = "".join(byte_tokenizer().decode(side.tolist()) for side in (store.train, store.held_out))
    return {f"[user]{one}" for one in text.split("[user]") if one}


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "ShareGPT", "parts", "datasets"])
def test_every_conversation_is_what_the_template_writes(tmp_path: Path, kind: str) -> None:
    rows: list[Any] = [turns(asked) for asked in ASKED]
    if kind == "ShareGPT":
        names = {"user": "human", "assistant": "gpt"}
        rows = [turns([(names[who], words) for who, words in asked], "from", "value") for asked in ASKED]
    if kind == "parts":
        rows = [
            [{"role": who, "content": [{"type": "text", "text": words}]} for who, words in asked] for asked in ASKED
        ]
    (tmp_path / "chats").mkdir()
    if kind in ("parquet", "datasets"):
        pq.write_table(pa.table({"chat": rows}), tmp_path / "chats" / "train.parquet")
    else:
        (tmp_path / "chats" / "a.jsonl").write_text("\n".join(json.dumps({"chat": row}) for row in rows))
    where = {"dataset" if kind == "datasets" else "path": str(tmp_path / "chats")}
    store = prepared(tmp_path, TextSource(**where, messages_field="chat"))
    assert written(store) == WRITTEN
    assert store.info["conversations"] == 1 and store.held_out.size
    assert len(store.starts) == store.info["train"]["documents"]
    assert store.train[0] == byte_tokenizer()("[").input_ids[0]  # nothing in front that the template has not put there


def test_turns_that_the_template_does_not_take(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows: list[Any] = [
        turns([("system", "be brief"), *ASKED[0]]), [], [{"role": "user", "content": None}], None, turns(ASKED[1]),
        [*turns(ASKED[2]), {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}],
        [{"role": "user", "content": [{"type": "text", "text": "what is this?"}, {"type": "image"}]}],
        [{"role": "user", "content": [{"type": "text", "text": None}]}],
    ]  # fmt: skip
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"messages": row}) for row in rows))
    store = prepared(tmp_path, TextSource(path=str(tmp_path / "a.jsonl"), messages_field="messages"))
    assert written(store) == {f"[user]what is {i}?<|eos|>[assistant]it is {i}<|eos|>" for i in (0, 1)}
    tokens_there(Data(sources=[TextSource(path=str(tmp_path / "a.jsonl"), messages_field="messages")]), chatting(), 0)
    told = capsys.readouterr().err
    assert told.count("left out") == 1 and "row 2 of" in told  # whoever meets it first


@pytest.mark.parametrize("row", ["hello", [["user", "hello"]], [{"who": "user", "content": "hello"}], 7])
def test_what_is_no_conversation_is_refused(tmp_path: Path, row: Any) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": row}))
    with pytest.raises(InputError, match="row 1 of .* holds no conversation"):
        prepared(tmp_path, TextSource(path=str(tmp_path), messages_field="messages"))


def test_files_without_columns_and_columns_without_conversations_name_the_way(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(InputError, match="has no column 'messages'"):
        prepared(tmp_path, TextSource(path=str(tmp_path / "a.txt"), messages_field="messages"))
    (tmp_path / "b.jsonl").write_text(json.dumps({"messages": turns(ASKED[0])}))
    with pytest.raises(InputError, match="There is no column 'text'") as error:
        prepared(tmp_path, TextSource(path=str(tmp_path / "b.jsonl")))
    assert "`messages_field`" in str(error.value.fix)
    with pytest.raises(InputError, match="no chat template"):
        prepared(tmp_path, TextSource(path=str(tmp_path / "b.jsonl"), messages_field="messages"), byte_tokenizer())


def test_the_tokens_follow_the_template(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"messages": turns(asked)}) for asked in ASKED))
    source = TextSource(path=str(tmp_path / "a.jsonl"), messages_field="messages")
    other = chatting()
    other.chat_template = TEMPLATE.replace("[{{ m.role }}]", "<{{ m.role }}>")
    assert prepared(tmp_path, source).digest != prepared(tmp_path, source, other).digest


def test_a_template_that_names_the_day_writes_the_same_tomorrow() -> None:
    tokenizer = chatting()
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}" + TEMPLATE
    assert Conversations(tokenizer, "a").text(turns(ASKED[0]), "row 1").startswith("26 Jul 2024[user]")


def test_how_much_of_a_source_is_conversations(tmp_path: Path) -> None:
    assert share_of_chats(TextSource(path="a", messages_field="messages")) == 1
    assert share_of_chats(TextSource(path="a")) == 0
    assert share_of_chats(TextSource(generate=Generate(start="chat"))) == 1
    assert share_of_chats(TextSource(generate=Generate(start=["chat", "separator"]))) == 0.5
    assert share_of_chats(TextSource(generate=Generate())) == 0
    (tmp_path / "a.txt").write_text("hello")
    assert prepared(tmp_path, TextSource(path=str(tmp_path / "a.txt"))).info["conversations"] == 0
    plain = prepared(tmp_path / "other", TextSource(path=str(tmp_path / "a.txt")), byte_tokenizer())
    assert plain.info["conversations"] is None


def test_of_a_mixture_conversations_have_the_share_of_their_weight(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": f"{i} is a number"}) for i in range(400)))
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"messages": turns(asked)}) for asked in ASKED))
    data = Data(
        sources=[
            TextSource(path=str(tmp_path / "a.jsonl"), weight=1),
            TextSource(path=str(tmp_path / "b.jsonl"), messages_field="messages", weight=3),
        ]
    )
    store = prepare_data(data, chatting(), tokens=2000, held_out_tokens=200, cache_dir=tmp_path / "cache", seed=0)
    assert store.info["conversations"] == pytest.approx(0.75, abs=0.01)


def test_about_how_much_text_a_table_has_beside_its_other_columns(tmp_path: Path) -> None:
    rows = [json.dumps({"text": f"{i} is a number. " * 20, "about": "x" * 3000}) for i in range(400)]
    for name, opened in (("a.jsonl", open), ("b.jsonl.gz", gzip.open)):
        with opened(tmp_path / name, "wt") as file:
            file.write("\n".join(rows))
    plain, packed = (Data(sources=[TextSource(path=str(tmp_path / name))]) for name in ("a.jsonl", "b.jsonl.gz"))
    real = sum(len(byte_tokenizer()(json.loads(row)["text"]).input_ids) + 1 for row in rows)
    assert tokens_there(plain, byte_tokenizer(), 0) == pytest.approx(real, rel=0.1)
    assert real / 100 < (tokens_there(packed, byte_tokenizer(), 0) or 0) < real  # how well gzip does is a guess


@pytest.mark.parametrize(("name", "told"), [("b.jsonl", "not UTF-8"), ("b.jsonl.gz", "")])
def test_what_cannot_be_read_is_told_whichever_file_is_looked_at(tmp_path: Path, name: str, told: str):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "hello"}))
    data = gzip.compress(b"{}" * 999)[:-20] if told == "" else '{"text": "\u00e9"}'.encode("latin-1")
    (tmp_path / name).write_bytes(data)
    for seed in range(4):  # the files in another order
        with pytest.raises(InputError) as error:
            tokens_there(Data(sources=[TextSource(path=str(tmp_path))]), byte_tokenizer(), seed)
        assert name in error.value.what and told in error.value.why


def test_a_column_with_a_dot_in_its_name_is_counted(tmp_path: Path) -> None:
    table = pa.table({"data.text": [f"{i} hello " * 50 for i in range(100)], "data": ["x" * 10_000] * 100})
    pq.write_table(table, tmp_path / "a.parquet", compression="none", use_dictionary=False)
    data = Data(sources=[TextSource(path=str(tmp_path / "a.parquet"), text_field="data.text")])
    assert tokens_there(data, byte_tokenizer(), 0) == pytest.approx(100 * 450, rel=0.1)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_about_how_much_they_are_is_known_beforehand(tmp_path: Path, kind: str) -> None:
    rows = [turns([(who, 20 * words) for who, words in asked]) for asked in ASKED]
    if kind == "parquet":
        pq.write_table(pa.table({"messages": rows}), tmp_path / "a.parquet", compression="none", use_dictionary=False)
    else:
        (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"messages": row}) for row in rows))
    source = TextSource(path=str(tmp_path), messages_field="messages")
    store = prepared(tmp_path / "tokens", source)
    recipe = Recipe.model_validate({"source": {"model": "a"}, "data": {"sources": [source.model_dump()]}})
    assert tokens_there(recipe.data, chatting(), 0) == pytest.approx(store.train.size + store.held_out.size, rel=0.3)


def test_an_instruct_model_that_is_trained_on_no_conversations_is_told_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("hello")
    (tmp_path / "b.jsonl").write_text(json.dumps({"messages": turns(ASKED[0])}))
    text, chats = {"path": str(tmp_path / "a.txt")}, {"path": str(tmp_path / "b.jsonl"), "messages_field": "messages"}
    budget = {"tokens": 4096, "sequence_length": 1024}
    for sources, train, tokenizer, told in (
        ([text], budget, chatting(), True),
        ([text, chats], budget, chatting(), False),
        ([text], {}, chatting(), False),
        ([text], budget, byte_tokenizer(), False),
    ):
        recipe = Recipe.model_validate({"source": {"model": "a"}, "data": {"sources": sources}, "train": train})
        console.TOLD.clear()
        say_untaught(recipe, tokenizer)
        say_untaught(recipe, tokenizer)
        assert capsys.readouterr().err.count(UNTAUGHT) == told


@pytest.mark.parametrize("given", [{"path": "a", "text_field": "body"}, {"generate": 2000}])
def test_settings_that_would_have_no_effect_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="not for a source with"):
        TextSource(**given, messages_field="messages")
