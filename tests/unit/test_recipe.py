"""The recipe: numbers, overrides, origins, refusals."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from cla_convert.errors import UsageError
from cla_convert.recipe import FREE, NAMED, PLACES, Train, on_resume, parse_count, parse_size
from cla_convert.recipe_file import load_recipe, read_yaml, validate
from cla_convert.recipes import find_recipe, list_recipes, reference
from cla_convert.training.schedule import check_steps


@pytest.mark.parametrize(
    ("text", "value"), [("26M", 26_000_000), ("64k", 64_000), ("2B", 2 * 10**9), ("1.5M", 1_500_000), ("1_000", 1000)]
)
def test_counts(text, value):
    assert parse_count(text) == value


def test_sizes():
    assert parse_size("5GB") == 5 * 10**9
    assert parse_size("2GiB") == 2 * 2**30
    with pytest.raises(ValueError):
        parse_size("5 apples")


def test_override_beats_recipe_beats_default(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("train: {tokens: 1M, loss: cross_entropy}\nseed: 3\n")
    resolved = load_recipe(path, ["train.tokens=26M", "convert.sharing=[[0],[1,2]]"])
    assert resolved.recipe.train.tokens == 26_000_000
    assert resolved.recipe.convert.sharing == [[0], [1, 2]]
    assert resolved.origins["train.tokens"] == "--set"
    assert resolved.origins["train.loss"] == "recipe"
    table = resolved.table()
    (told_tokens,) = [line.split() for line in table.splitlines() if line.startswith("train.tokens")]
    assert told_tokens == ["train.tokens", "--set", "26000000"]
    assert "train.clip" not in table and "other settings have their defaults" in table
    # A run's own recipe.yaml names every setting; what is said is what differs, and what was typed.
    path.write_text(yaml.safe_dump(resolved.recipe.model_dump(mode="json")))
    told = [line.split()[0] for line in load_recipe(path, ["eval.margin=0.01"]).table().splitlines()]
    assert told[:-1] == ["convert.sharing", "train.tokens", "train.loss", "eval.margin", "seed"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.tokns=1", "Did you mean 'tokens'"),
        ("trian.tokens=1", "Did you mean 'train'"),
        ("train.tokens=lots", "26M"),
        ("train.learning_rate=-1", "greater than 0"),
        ("data.sources=[{pth: a}]", "Did you mean 'path'"),
        (
            "data.sources=[{path: a, dataset: b}]",
            "one of `path`, `dataset` and `generate`; not path and dataset",
        ),
        ("data.sources=[{dataset: b, generate: 2M}]", "not dataset and generate"),
        ("data.sources=[{text_field: body}]", "none is given"),
        ("data.sources=[{path: a, split: test}]", "split: not for a source with `path`"),
        ("data.sources=[{generate: 2M, text_field: body}]", "text_field: not for a source with `generate`"),
        ("data.sources=[{generate: lots}]", "26M"),
        ("data.sources=[{generate: {tokens: 2M, temprature: 1}}]", "Did you mean 'temperature'"),
        ("data.sources=[{generate: {start: bos}}]", "data.sources.0.generate.start"),
        ("data.sources=[{generate: {start: separator, openings: a.txt}}]", "openings are for `start: prefix`"),
        ("train.tokens", "a.b=value"),
        ("convert.init=average", "'first'"),
        ("eval.perplexity=[{name: wikitext, path: a.txt}]", "give the text another name"),
    ],
)
def test_refusals(override, message):
    with pytest.raises(UsageError) as caught:
        load_recipe(None, [override])
    assert message in str(caught.value)


def test_a_number_alone_says_how_much_to_generate():
    short, long = (
        load_recipe(None, [f"data.sources=[{{generate: {value}}}]"]).recipe.data.sources[0]
        for value in ("2M", "{tokens: 2M}")
    )
    assert short == long and short.generate is not None and short.generate.tokens == 2_000_000


@pytest.mark.parametrize(
    ("setting", "fix"), [("train.optimizer=muon", "AdamW is"), ("train.document_masking=flex", "Use true")]
)
def test_removed_settings_say_why_and_what_instead(setting, fix):
    with pytest.raises(UsageError) as caught:
        load_recipe(None, [setting])
    assert setting.replace("=", ": ") in caught.value.what and caught.value.why and fix in caught.value.fix


def test_what_an_earlier_release_wrote_is_a_recipe():
    assert validate({"train": {"optimizer": "adamw", "document_masking": True}}).train.document_masking
    with pytest.raises(UsageError, match="unknown key 'train.optimizer'"):
        validate({"train": {"optimizer": "sgd"}})


def test_a_resolved_recipe_is_a_recipe():
    sources = "data.sources=[{path: a}, {dataset: b/c, split: test, revision: v1}, {generate: 2M, weight: 3}]"
    recipe = load_recipe(None, [sources]).recipe
    assert validate(recipe.model_dump(mode="json")) == recipe


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(UsageError, match="Cannot read"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(UsageError, match="not valid YAML"):
        load_recipe(tmp_path / "bad.yaml")
    with pytest.raises(UsageError, match="Did you mean 'demo'"):
        find_recipe("dmo")


@pytest.mark.parametrize(
    ("text", "line", "why"),
    [
        ("train:\n  clip: 1\n  clip: 2\n", 3, "`clip` was given in line 2 already"),
        ("seed: 1\ndata:\n  sources:\n    - {path: a, path: b}\n", 4, "`path` was given in line 4 already"),
        ("source:\n  model: my\n seed: 3\n", 3, "another column"),
        ("source:\n\tmodel: my\n", 2, "indented with a tab"),
        ("source: {model: my\ntrain: {}\n", 1, "`{` that opens here is not closed"),
        ("seed: 1\ndata: {sources: [a\n", 2, "`[` that opens here is not closed"),
        ("seed: 1\ndata: [\n", 3, "a bracket is not closed"),
        ('source:\n  model: "my\n', 2, "quotation mark that opens here"),
        ("source:\n  model: my: own\n", 2, "A second `: `"),
        ("source:\n  model: *my\n", 2, "begins with `*`"),
        ("source:\n  model: !my own\n", 2, "begins with `!`"),
        ("source:\n  model: @my\n", 2, "a mark that YAML keeps"),
        ("source:\n  model: \u0007\n", 2, "control character"),
        ("seed: 1\n---\nseed: 2\n", 2, "begins a second recipe"),
        ("? [a]\n: b\n", 1, "A name is a list"),
        ("seed: 1\nmodel\ndevice: cpu\n", 2, "`name: value`"),
        ("seed: 1\ndevice: %s\n" % ("1" * 5000), 2, "number cannot be read"),
        ("seed: 1\nclip: !!int x\n", 2, "number cannot be read"),
        ("source:\n  model: my\n  revision:x\n", 3, "space is missing after the colon"),
        ("train:\n  tokens:1M\n\n  # few\n  clip: 2\n", 2, "space is missing after the colon"),
        ("train:\n  tokens:1M\n  seed:3\n  clip: 2\n", 2, "space is missing after the colon"),
        ("source:\n  model: C:\\my\n   revision: x\n", 3, "A second `: `"),
        ("seed: 1\n2: 3\n", 2, "The name `2` is a number"),
        ("seed: 1\nnull: 3\n", 2, "The name `null` is"),
        ("seed: 1\ntrain: {yes: 3}\n", 2, "The name `yes` is"),
        ("source:\n  model: my\n\u00a0\u00a0revision: x\n", 3, "looks blank"),
        ("[" * 10_000, None, "too deep"),
    ],
)  # fmt: skip
def test_broken_yaml_is_told_by_its_line_in_words_of_our_own(tmp_path, text, line, why):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        load_recipe(path)
    assert caught.value.why.startswith(f"{path}:{line}: " if line else "") and why in caught.value.why
    assert "mine.yaml' is not valid YAML" in caught.value.what and caught.value.fix
    assert not re.search(r"expected|scanning|parsing|token|mapping|<|unicode", caught.value.why + caught.value.fix)


def test_a_name_twice_in_set_is_no_value_either():
    with pytest.raises(UsageError, match="`tokens` was given in line 1 already"):
        load_recipe(None, ["train={tokens: 1k, tokens: 2k}"])


def test_merged_sections_and_what_looks_like_a_date_are_read(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("train: &it {seed: 1}\nsource: {revision: 2024-13-45}\ndata: {<<: *it, seed: 2}\n")
    tree = read_yaml(path)
    assert tree["data"] == {"seed": 2} and tree["source"] == {"revision": "2024-13-45"}


def test_what_an_option_gave_is_told_by_the_option(tmp_path):
    resolved = load_recipe(None, ["train.tokens=1M"], {"train.tokens": "26M", "source.model": "my"})
    assert resolved.recipe.train.tokens == 26_000_000
    assert resolved.origins == {"train.tokens": "--tokens", "source.model": "MODEL"}


@pytest.mark.parametrize("name", list_recipes())
def test_every_shipped_recipe_is_valid(name):
    recipe = load_recipe(find_recipe(name)).recipe
    assert bool(recipe.source.model) == (name != "default") and recipe.train.tokens  # the default is for any model
    text = find_recipe(name).read_text(encoding="utf-8")
    assert f"cla-convert run {name} " in text, "its head names it"
    head = text.partition("\n\n")[0]
    said = {"Not yet run", "Measured", "A demonstration, not a result", "Any supported model"}
    assert sum(words in head for words in said) == 1, "its head says whether it was run"


def test_every_shipped_recipe_has_its_costs():
    page = (Path(__file__).parents[2] / "docs" / "costs.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\S+)`", page, re.MULTILINE)) == set(list_recipes()) - {"default", "demo"}


def test_the_reference_page_is_the_schema():
    page = Path(__file__).parents[2] / "docs" / "recipe.md"
    assert page.read_text(encoding="utf-8") == reference(), "run: cla-convert recipes reference > docs/recipe.md"


@pytest.mark.parametrize(
    ("name", "mark"),
    [
        ("eval.limit", FREE), ("eval.retrieval.samples", FREE), ("device", FREE), ("train.spike", FREE),
        ("train.keep_checkpoints_after_success", FREE), ("train.clip", NAMED), ("train.learning_rates.shared", NAMED),
        ("data.held_out", NAMED), ("train.batch_tokens", PLACES), ("seed", None), ("convert.init", None),
        ("source.model", None), ("no.such.setting", None),
    ],
)  # fmt: skip
def test_what_may_change_on_resume(name, mark):
    assert on_resume(name) is mark


@pytest.mark.parametrize(
    ("train", "why"),
    [
        ({"tokens": 1024, "batch_tokens": 512, "sequence_length": 1024}, "batch_tokens is 512, less than one sequence"),
        ({"tokens": 1023, "sequence_length": 1024}, "tokens is 1023, less than one sequence .sequence_length: 1024"),
        ({"tokens": 26}, "less than one sequence .*; 26M is 26 million"),
        (
            {"tokens": 2000, "batch_tokens": 1000, "sequence_length": 256},
            r"batch_tokens is 1000, no multiple of sequence_length \(256\): 768 and 1024 are",
        ),
        ({"tokens": 2000, "sequence_length": 100}, "16300 and 16400 are"),
    ],
)
def test_a_budget_and_a_step_are_whole_sequences(train, why):
    with pytest.raises(UsageError, match=why):
        validate({"train": train})
    validate({"train": train | {"tokens": 0}})  # nothing is trained


@pytest.mark.parametrize(
    ("train", "warning"),
    [
        ({"tokens": 12_288, "sequence_length": 256, "batch_tokens": 2048}, "6 optimiser steps are few"),
        ({"tokens": 20 * 1024, "sequence_length": 64, "batch_tokens": 1024}, ""),
        ({"tokens": 5 * 64, "sequence_length": 64, "batch_tokens": 64}, ""),  # there are no smaller ones
        ({"tokens": 0}, ""),
    ],
)
def test_few_steps_are_warned_of(train, warning, capsys):
    check_steps(Train(**train))
    said = capsys.readouterr().err
    assert warning in said and bool(said) == bool(warning)


def test_mistakes_are_told_with_file_and_line_in_words_of_our_own(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("source:\n  model: my\ntrain:\n  tokens: many\n  sequence_length: 3.5\n")
    with pytest.raises(UsageError) as caught:
        load_recipe(path, ["train.lr=3"])
    first, second, third = caught.value.why.splitlines()
    assert first.startswith(f"{path}:4: train.tokens: 'many' is not a number of tokens")
    assert second.strip() == f"{path}:5: train.sequence_length: must be a whole number (got 3.5)"
    assert third.strip().startswith("--set: unknown key 'train.lr'")
    path.write_text(
        "data:\n  held_out: 0.1\n  sources:\n    - path: a\n    - path: b\n      weight: much\n    - {path:my}\n"
    )
    with pytest.raises(UsageError) as caught:
        load_recipe(path)
    assert f"{path}:6: data.sources.1.weight: must be a number" in caught.value.why
    assert f"{path}:7: unknown key 'data.sources.2.path:my': a space is missing after the colon" in caught.value.why


@pytest.mark.parametrize(
    ("text", "line", "why"),
    [
        ("source:\n  model:my\n", 2, "source: must be a section: .*; a space is missing after the colon"),
        ("seed: 1\nsource:\n\n  # mine\n  model:my\n  revision:x\n", 5, "source: .*a space is missing"),
        ("train:\n  - tokens: 1M\n", 2, "train: must be a section"),
        ("train:\n\nseed: 1\n", 1, r"train: must be a section.*\(got nothing\)"),
        ("train: |\n  tokens: 1M\n", 1, "train: must be a section: lines of `name: value` .got"),
        ("train:\n  betas:\n    0.9\n", 3, "train.betas: must be a list"),
        ("train:\n  tokens:\n    many\n", 3, "train.tokens: 'many' is not a number"),
        ("train:\n  tokens:\n    - 1\n", 3, "train.tokens: must be a whole number"),
        ("train:\n  batch_tokens: 5\n  tokens: 1M\n", 1, "train: batch_tokens is 5"),
        ("train:\n  klip:\n    2\n", 2, "unknown key 'train.klip'"),
        ("seed: 1\nmodel: my\n", 2, "unknown key 'model'. It belongs below `source:`"),
        ("source:\n  model:\n    a: b\n", 3, "source.model: must be text"),
        ("data:\n  sources:\n    -path: a\n", 3, "data.sources: must be a list"),
        ("data:\n  sources:\n    path:a\n", 3, "data.sources: must be a list; a space is missing"),
        ("data:\n  sources:\n    -\n      path:a\n", 4, "data.sources.0: must be a section.*a space is missing"),
        ("data:\n  sources:\n    - path: a\n    -\n", 4, r"data.sources.1: must be a section.*\(got nothing\)"),
        ("data:\n  sources:\n    - generate:\n        length:5\n", 4, "'length:5' is not a number of tokens"),
        ("data:\n  sources:\n    - weight:\n        1\n", 3, "give exactly one of"),
        ("convert:\n  sharing:\n    - [0]\n    - 1,2\n", 4, "convert.sharing.1: must be a list"),
        ("eval:\n  perplexity:\n    - name: x\n", 3, "eval.perplexity.0.path: is missing"),
        ("train:\n  tokens: yes\n", 2, "train.tokens: must not be true or false"),
        ("source:\n  revision:\n    no\n", 3, "source.revision: must not be .* nor yes or no; put it into quotes"),
        ("source:\n  revision: 2024\n", 2, r"source.revision: must be text; put it into quotes \(got 2024\)"),
        ("source:\n  revision: {a: 1}\n", 2, r"source.revision: must be text \(got"),
        ("eval:\n  tasks: [1.5]\n", 2, r"eval.tasks.0: must be text; put it into quotes \(got 1.5\)"),
        ("train:\n  clip: .inf\n", 2, "train.clip: must be a finite number"),
    ],
)  # fmt: skip
def test_every_mistake_has_its_own_line_and_one_line(tmp_path, text, line, why):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        load_recipe(path)
    assert caught.value.what == "The recipe is not valid"
    assert re.fullmatch(f"{path}:{line}: .*{why}.*", caught.value.why), caught.value.why


def test_what_is_wrong_of_a_command_line_alone_is_not_called_a_recipe(tmp_path):
    with pytest.raises(UsageError) as caught:
        load_recipe(None, [], {"convert.kv_heads": 0})
    assert caught.value.what == "--kv-heads: must be 1 or more (got 0)" and not caught.value.why
    path = tmp_path / "mine.yaml"
    path.write_text("seed: 1\n")
    with pytest.raises(UsageError, match=r"\A--set: train.clip: must be a number \(got 'x'\)\Z"):
        load_recipe(path, ["train.clip=x"])
    with pytest.raises(UsageError, match=r"\AThe command line is not valid\n--tokens: .*\n +--set: train.clip: "):
        load_recipe(path, ["train.clip=x"], {"train.tokens": "x"})
    path.write_text("seed: x\n")
    with pytest.raises(UsageError, match=r"\AThe recipe is not valid\n--set: train.clip: .*\n.*mine.yaml:1: seed: "):
        load_recipe(path, ["train.clip=x"])


@pytest.mark.parametrize(
    ("text", "name", "place"),
    [
        ("source: {model: a/b}", "source.model", "a/b"),
        ("source: {model: ./a}", "source.model", "./a"),
        ("train: {teacher: a}", "train.teacher", "a"),
        ("data: {sources: [{path: 'a/*.txt'}]}", "data.sources[].path", "a/*.txt"),
        ("data: {sources: [{generate: {openings: a}}]}", "data.sources[].generate.openings", "a"),
        ("data: {sources: [{dataset: ./a}]}", "data.sources[].dataset", "./a"),
        ("eval: {task_data: a}", "eval.task_data", "a"),
        ("eval: {perplexity: [{name: x, path: a/b/c.txt}]}", "eval.perplexity[].path", "a/b/c.txt"),
    ],
)
def test_a_path_that_was_meant_from_the_folder_of_the_recipe_is_told_so(tmp_path, monkeypatch, text, name, place):
    recipe = Path("recipes") / "mine.yaml"
    (tmp_path / "recipes" / "a" / "b").mkdir(parents=True)
    for file in ("a/x.txt", "a/b/c.txt", "a/config.json", "a/b/config.json"):
        (tmp_path / "recipes" / file).write_text("text")
    (tmp_path / recipe).write_text(text)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=f"^{re.escape(f'{name}: there is no {place!r} in {tmp_path}')}\n") as caught:
        load_recipe(recipe)
    assert str(Path("recipes") / place) in caught.value.fix
    with pytest.raises(UsageError, match="recipes/a"):
        load_recipe(tmp_path / recipe)
    (tmp_path / "a").symlink_to("recipes/a")
    load_recipe(recipe)
    (tmp_path / "a").unlink()
    monkeypatch.chdir(tmp_path / "recipes")
    load_recipe("mine.yaml")


@pytest.mark.parametrize(
    "text",
    ["source: {model: a/b}", "train: {teacher: a/b}", "data: {sources: [{dataset: a/b, revision: main}]}"],
)
def test_a_folder_beside_the_recipe_takes_no_name_from_the_hub(tmp_path, monkeypatch, text):
    (tmp_path / "recipes" / "a" / "b").mkdir(parents=True)
    (tmp_path / "recipes" / "mine.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    load_recipe("recipes/mine.yaml")
    (tmp_path / "recipes" / "a" / "b" / "config.json").touch()
    if "dataset" not in text:
        with pytest.raises(UsageError, match=r"for the hub's, --set \S+=a/b\."):
            load_recipe("recipes/mine.yaml")
        load_recipe("recipes/mine.yaml", [f"{text.replace(': {', '.').replace(': ', '=').rstrip('}')}"])


def test_a_path_of_the_command_line_counts_from_where_one_is_and_a_hub_id_is_none(tmp_path, monkeypatch):
    (tmp_path / "recipes" / "a").mkdir(parents=True)
    (tmp_path / "recipes" / "mine.yaml").write_text("source: {model: owner/name}")
    monkeypatch.chdir(tmp_path)
    load_recipe("recipes/mine.yaml", ["source.model=a"])


def test_text_that_is_a_number_to_yaml_can_be_set_as_it_is_told():
    for value in ("2024", "no"):
        with pytest.raises(UsageError) as caught:
            load_recipe(None, [f"source.revision={value}"])
        words = shlex.split(caught.value.what.rpartition(": ")[2])
        assert words == ["--set", 'source.revision="..."']
        assert load_recipe(None, [words[1].replace("...", value)]).recipe.source.revision == value
    with pytest.raises(UsageError, match="nor yes or no$"):  # a number, which no quotes make of it
        load_recipe(None, ["train.tokens=yes"])


@pytest.mark.parametrize(
    ("sets", "options", "said"),
    [
        (["train.sequence_length=9000"], {}, "--set: train: batch_tokens is 16384, no multiple of sequence_length"),
        (["train={tokens: 26}"], {}, "--set: train: tokens is 26, less"),
        (["data.sources=[{weight: 2}]"], {}, "--set: data.sources.0: give exactly one of"),
        (["data.sources=[{path: a, weight: x}]"], {}, "--set: data.sources.0.weight: must be a number"),
        (["convert.kv_budget=0.5"], {"convert.sharing": "cla2"}, "--set: convert: kv_budget is for"),
        ([], {"convert.kv_budget": 0.5, "convert.sharing": "cla2"}, "--kv-budget: kv_budget is for"),
        ([], {"convert.sharing": "cla2", "convert.kv_budget": 0.5}, "--kv-budget: kv_budget is for"),
        ([], {"train.tokens": 100}, "--tokens: tokens is 100, less"),
    ],
)
def test_the_file_is_not_blamed_for_the_command_line(tmp_path, sets, options, said):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "data:\n  sources:\n    - path: a\ntrain:\n  tokens: 1M\n  sequence_length: 512\nconvert:\n  init: mean\n"
    )
    with pytest.raises(UsageError) as caught:
        load_recipe(path, sets, options)
    assert caught.value.what.startswith(said) and str(path) not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "given", "form"),
    [
        ("eval.tasks", "piqa", "[piqa]"),
        ("eval.retrieval.lengths", "512", "[512]"),
        ("data.sources", "corpus/", "[{path: corpus/}]"),
        ("data.sources", "[corpus/]", "[{path: corpus/}]"),
        ("eval.perplexity", "law.txt", "[{name: law, path: law.txt}]"),
        ("eval.perplexity", "[my law.txt]", "[{name: my-law, path: my law.txt}]"),
        ("eval.prompts", "It's late", "[It's late]"),
        ("data.sources", "[{path: a, weight: 2}, b]", "[{path: a, weight: 2}, {path: b}]"),
        ("data.sources", "a, b", "[{path: 'a, b'}]"),
        ("data.sources", "'#1 {x}.txt'", "[{path: '#1 {x}.txt'}]"),
    ],
)
def test_a_list_of_which_only_the_content_was_given_is_shown(tmp_path, name, given, form):
    with pytest.raises(UsageError) as caught:
        load_recipe(None, [f"{name}={given}"])
    command = caught.value.what.rpartition(": --set ")[2]
    assert shlex.split(command) == [f"{name}={form}"] and not caught.value.fix
    load_recipe(None, [f"{name}={form}"])
    path, (*sections, last) = tmp_path / "mine.yaml", name.split(".")
    path.write_text(
        "".join(f"{'  ' * i}{s}:\n" for i, s in enumerate(sections)) + f"{'  ' * len(sections)}{last}: {given}"
    )
    with pytest.raises(UsageError, match=re.escape(f": {last}: {form}")):
        load_recipe(path)
    path.write_text(path.read_text().replace(given, form))
    load_recipe(path)


def test_of_several_words_in_a_list_of_sections_all_are_shown():
    with pytest.raises(UsageError) as caught:
        load_recipe(None, ["data.sources=[a, b]"])
    assert caught.value.why.count(": --set 'data.sources=[{path: a}, {path: b}]'") == 2


@pytest.mark.parametrize("given", ["eval.gate=5", "data.sources=5", "train.betas=0.9", "data.sources='path:a'"])
def test_no_list_is_shown_that_would_not_be_taken_either(given):
    with pytest.raises(UsageError) as caught:
        load_recipe(None, [given])
    assert "--set '" not in caught.value.what


def test_the_list_of_settings_is_named_only_where_it_helps():
    for mistake, helps in (("train.clip=x", ""), ("train.klip=1", ""), ("train.wrong=1", "recipes reference")):
        with pytest.raises(UsageError) as caught:
            load_recipe(None, [mistake])
        assert helps in caught.value.fix and bool(helps) == bool(caught.value.fix)


@pytest.mark.parametrize(
    ("given", "there"), [("mine.yml", "mine.yaml"), ("mine", "mine.yml"), ("mine.json", "mine.yaml")]
)
def test_a_recipe_of_another_ending_is_named(tmp_path, given, there):
    (tmp_path / there).write_text("seed: 1\n")
    with pytest.raises(UsageError, match=f"Did you mean '{re.escape(str(tmp_path / there))}'"):
        load_recipe(find_recipe(str(tmp_path / given)))


def test_a_copied_recipe_replaces_nothing(tmp_path):
    from cla_convert.cli.recipes import recipes_cp

    (tmp_path / "demo.yaml").write_text("edited: true")
    for place in (tmp_path, tmp_path / "demo.yaml"):
        with pytest.raises(UsageError, match="demo.yaml exists"):
            recipes_cp("demo", place)
    assert (tmp_path / "demo.yaml").read_text() == "edited: true"
    with pytest.raises(UsageError, match="There is no folder"):
        recipes_cp("demo", tmp_path / "no" / "such.yaml")
