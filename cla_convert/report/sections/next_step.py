"""One line on what to do next, with the command, chosen by the state of the run."""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from ...amounts import passes
from ...conversion.heads_first import EVIDENCE, heads_first
from ...effort import MANY_PASSES
from ...evaluation.missing import told
from ...evaluation.verdict import NOT_JUDGED
from ..content import Block, Listing, Paragraph
from ..formats import count, duration, integer, number
from ..run_folder import Json, RunFiles
from ..section import Material, Section, register
from ..text import strong

_RECOVERS = 26_000_000
"""Tokens with which the figures of the README were reached; fewer than a tenth say little about a curve."""
_DAY = 86_400
"""Seconds."""
_FLAT = 0.005
"""A validation perplexity that fell by less, as a share, between its last two checks has flattened."""
_LESS = 0.75
"""Of the bytes a token, to try next where the margins hold."""
_PACK = 250
"""Rows a task in the offline pack."""


def collect(material: Material, report: Json) -> Json:
    """next {state, text, command}."""
    return {"next": choose(report, material.run)}


def choose(report: Json, run: RunFiles) -> Json:
    """What to do next.

    Returns:
        state: finish, more_rows, more_tokens, lower_rate, another_map, bench or smaller_cache; text: one sentence or
        two; command: what does it, or None where no recipe is known.
    """
    status, train = report["status"], report["train"]
    found = (train or {}).get("curve")
    if report["incomplete"]:
        text = f"Finish the evaluation ({told(report['incomplete'])}): the same command goes on where it stopped."
        return _step(run, "finish", text)
    if status == "not_measured":
        text = "The run is not finished: the same command goes on where it stopped."
        if report["compared"]:
            text = "Nothing that has a margin was measured: name tasks in eval.tasks, and evaluate again."
        return _step(run, "finish", text)
    if report["compared"] in report["stale"]:
        return _step(run, "finish", "The model is not the one that was measured: the same command measures it anew.")
    if status == "within_margin":
        return _more_saved(report, run)
    if status == "inconclusive":
        return _more_rows(report, run)
    if not train:
        text = f"Nothing was uptrained yet. {count(_RECOVERS)} tokens are what the README's figures took."
        return _trained_on(run, "more_tokens", text, _RECOVERS, {})
    if found and found["last"] > found["first"]:
        return _lower_rate(report, run, found)
    if found and train["tokens"] >= _RECOVERS / 10 and found["last"] > (1 - _FLAT) * found["previous"]:
        return _another_map(report, run, found)
    return _more_tokens(train, run, found)


def _more_tokens(train: Json, run: RunFiles, found: Json | None) -> Json:
    tokens = train["tokens"]
    wanted = _RECOVERS if tokens < _RECOVERS / 10 else 4 * tokens
    known = ""
    if found:
        fell = found["last"] < (1 - _FLAT) * found["previous"]
        known = (
            f": {count(tokens)} took the validation perplexity from {number(found['first'])} to {number(found['last'])}"
        )
        if found["regained"] is not None:
            known += f" (source {number(found['source'])}), {100 * found['regained']:.0f}% of what converting had added"
        known += ", and it was still falling" if fell else ""
    return _trained_on(run, "more_tokens", f"Train on more tokens{known}.", wanted, train)


def _lower_rate(report: Json, run: RunFiles, found: Json) -> Json:
    rose = f"rose from {number(found['first'])} to {number(found['last'])}"
    if report["train"]["tokens"] < _RECOVERS / 10:
        trained = count(report["train"]["tokens"])
        text = f"Train on more tokens: in {trained} the validation perplexity {rose}, too few to settle."
        return _trained_on(run, "more_tokens", text, _RECOVERS, report["train"])
    text = f"The validation perplexity {rose}: train with a lower learning rate."
    if not (sets := _third_of_rates(report["train"], run.recipe.get("train") or {})):
        text = f"The validation perplexity {rose}: train with a lower train.learning_rate; what it was is not recorded."
        return {"state": "lower_rate", "text": text, "command": None}
    return _step(run, "lower_rate", text, "slower", *sets)


_TRAINED = {"all": ("shared", "attention", "other"), "attention": ("shared", "attention"), "shared": ("shared",)}
"""What is trained (train.parameters) -> its parts (training/optimizer.py)."""


def _third_of_rates(train: Json, settings: Json) -> list[str]:
    """A third of the peak rates that were used, of those that anything was trained at; empty where none is known."""
    used, rates = train.get("learning_rate", settings.get("learning_rate")), train.get("learning_rates")
    rates = (settings.get("learning_rates") or {}) if rates is None else rates
    if not isinstance(used, float):
        return []
    trained = _TRAINED.get(settings.get("parameters", "all"), ())
    names = {part if part in rates or part != "shared" else "attention" for part in trained}
    parts = ", ".join(f"{name}: {rate / 3:.2g}" for name, rate in rates.items() if name in names)
    sets = [f"train.learning_rate={used / 3:.2g}"] if not names <= rates.keys() else []
    return [*sets, f"train.learning_rates={{{parts}}}"] if parts else sets


def _another_map(report: Json, run: RunFiles, found: Json) -> Json:
    share = 1 / report["kv"]["ratio"] if report["kv"]["ratio"] else 0.5
    budget = round((1 + share) / 2, 2)
    text = (
        f"The curve has flattened at a validation perplexity of {number(found['last'])} "
        f"(source {number(found['source'])}): share fewer "
        f"layers, here with {100 * budget:.0f}% of the KV cache instead of {100 * share:.0f}%."
    )
    return _mapped(run, "another_map", text, budget)


def _more_saved(report: Json, run: RunFiles) -> Json:
    if not report["bench"]:
        model = run.files.training.model if report["compared"] == "after" else run.files.converted
        source = report["source"].get("model") or "SOURCE"
        command = shlex.join(["cla-convert", "bench", str(source), str(model), "--out", str(run.path)])
        text = "The margins hold: measure what it saves on your machine."
        return {"state": "bench", "text": text, "command": command}
    if pooled := _heads_pooled(report["kv"], run):
        return pooled
    text = "The margins hold: try to share more layers."
    sharing = report["converted"].get("sharing")
    if isinstance(sharing, str) and (match := re.fullmatch(r"cla(?!1\b|1-)(\d+)(.*)", sharing)):
        name = f"cla{int(match[1]) + 1}{match[2]}"
        return _step(run, "smaller_cache", text, name, f"convert.sharing={name}", "convert.kv_budget=null")
    share = 1 / report["kv"]["ratio"] if report["kv"]["ratio"] else 0.5
    return _mapped(run, "smaller_cache", text, round(share * _LESS, 2))


def _heads_pooled(kv: Json, run: RunFiles) -> Json | None:
    """A smaller cache by fewer KV heads and no shared layers; None where their number does not come near to it."""
    heads, ratio = kv["heads_before"], kv["ratio"]
    count = heads_first(heads, ratio / _LESS) if heads and ratio else None
    if count is None:
        return None
    text = (
        f"The margins hold: pool {heads} KV heads into {count} and share no layers, for {100 * count / heads:.0f}% of "
        f"the cache: {EVIDENCE}."
    )
    wanted = {"kv_budget": "null", "sharing": "cla1", "kv_heads": count, "init": "calibrated"}
    return _step(run, "smaller_cache", text, f"heads{count}", *(f"convert.{key}={wanted[key]}" for key in wanted))


def _more_rows(report: Json, run: RunFiles) -> Json:
    """More of what the undecided measures are measured on: in the same run, or what a new one would need."""
    undecided = [row for row in report["judged"] if row["verdict"] == "inconclusive"]
    if not undecided:
        if named := [reason["scope"] for reason in report["gate"]["reasons"] if reason["code"] == NOT_JUDGED]:
            text = f"No metric of {', '.join(named)} has a margin: judge it yourself, or leave it out of eval.tasks."
            return {"state": "more_rows", "text": text, "command": None}
        return _step(run, "more_rows", "Something could not be compared (see the caveats): evaluate again.")
    found = [_more_of(row, report, run) for row in undecided]
    sets = list(dict.fromkeys(one for _, sets in found for one in sets))
    if sets:
        words = dict.fromkeys(words for words, sets in found if sets)
        return _step(run, "more_rows", f"Evaluate on {', '.join(words)} to tell.", "", *sets)
    wanted = ", ".join(dict.fromkeys(words for words, _ in found))
    text = f"What this run can measure was measured; to tell takes {wanted}."
    if all(row["scope"] == "held_out" for row in undecided) and (asked := _asked(run)) <= _held_out_tokens(run):
        return _step(run, "more_rows", text, "longer", f"train.validation_tokens={8 * asked}")
    return {"state": "more_rows", "text": text, "command": None}


def _more_of(row: Json, report: Json, run: RunFiles) -> tuple[str, list[str]]:
    """More of what a measure is measured on, in words, and the settings that bring it; none where none would."""
    settings = run.recipe.get("eval") or {}
    if row["measure"] == "accuracy":
        mean = report["mean_accuracy"]
        if sets := _unlimited(run, mean["tasks"]) or _full_sets(run, mean["tasks"]):
            return "more rows" + _rows_needed(row, mean), sets
        return "more tasks (eval.tasks)", []
    if row["measure"] == "kl":
        now, most = int(settings.get("agreement_tokens") or 8192), _held_out_tokens(run)
        if now < most:
            return "more text for the KL", [f"eval.agreement_tokens={min(8 * now, most)}"]
    if row["scope"] == "held_out":
        short = _asked(run) > _held_out_tokens(run)
        how = "there is no more in the data: more documents, or data.held_out" if short else "train.validation_tokens"
        return f"a new run with more held-out text ({how})", []
    if row["scope"] in report["tasks"]:
        sets = _unlimited(run, [row["scope"]]) or _full_sets(run, [row["scope"]])
        return f"all of {row['scope']}" if sets else f"text files beside {row['scope']} (eval.perplexity)", sets
    return f"a longer text than {row['scope']} (eval.perplexity)", []


def _held_out_tokens(run: RunFiles) -> int:
    """Held-out text of the run, in tokens: what was asked for, or what there was."""
    scored = run.held_out.get("before", {})
    there = (scored.get("tokens") or _asked(run)) + len(scored.get("windows") or [])  # the first of a row is not scored
    return min(_asked(run), there)


def _asked(run: RunFiles) -> int:
    """Held-out text that was asked for, in whole rows."""
    train = run.recipe.get("train") or {}
    tokens, row = int(train.get("validation_tokens") or 32_768), int(train.get("sequence_length") or 1024)
    return max(1, tokens // row) * row


def _unlimited(run: RunFiles, tasks: Sequence[str]) -> list[str]:
    """Settings that lift the limits under which tasks were measured, where these cut something."""
    settings, specification = run.recipe.get("eval") or {}, _specification(run, tasks)
    cut = [one for one in specification if one.get("limit") and one["n"] >= one["limit"] and not _whole_pack(one)]
    if not cut:
        return []
    return [f"eval.{name}={none}" for name, none in (("limit", "null"), ("limits", "{}")) if settings.get(name)]


def _full_sets(run: RunFiles, tasks: Sequence[str]) -> list[str]:
    """The setting that replaces the samples of the offline pack; its wikitext is whole."""
    sampled = [one for one in _specification(run, tasks) if one.get("source") == "offline pack"]
    return ["eval.offline_pack=false"] if sampled and tasks != ["wikitext"] else []


def _specification(run: RunFiles, tasks: Sequence[str]) -> list[Json]:
    known = run.results.get("before", {}).get("specification", {}).get("tasks", {})
    return [known[task] for task in tasks if task in known]


def _whole_pack(task: Json) -> bool:
    return task.get("source") == "offline pack" and task["n"] >= _PACK


def _rows_needed(row: Json, mean: Json) -> str:
    """How many rows a task would settle it if the difference stayed: intervals shrink with the root of their number."""
    half = (row["ci95"][1] - row["ci95"][0]) / 2
    missing = abs(row["delta"] + row["margin"])
    if missing < half / 100:
        return " (the loss is so near to the margin that no number of rows would do)"
    rows = mean["n"] / len(mean["tasks"]) * (half / missing) ** 2
    there_are = mean["n"] // len(mean["tasks"])
    return f" (about {integer(float(f'{rows:.1e}'))} a task would settle it at this difference; there are {there_are})"


def _trained_on(run: RunFiles, state: str, text: str, tokens: int, train: Json) -> Json:
    """More tokens, as far as the text and a day on this machine go; else what it would take, in words."""
    there, rate = train.get("text_tokens"), train.get("tokens_per_second")
    most, short = tokens, []
    if there and tokens > MANY_PASSES * there:
        most = min(most, MANY_PASSES * there)
        short.append(
            f"the text holds about {count(there)}, and {count(tokens)} would be {passes(tokens / there)} over "
            f"it: give more text (data.sources), {count(tokens / MANY_PASSES)} tokens or so"
        )
    if rate and tokens > _DAY * rate:
        most = min(most, round(_DAY * rate))
        took = f"{count(tokens)} take {tokens / rate / _DAY:.1f} days at the {number(rate, 3)} tokens/s of this machine"
        short.append(f"{took}: use a faster one")
    if short:
        text = f"{text} But {'; and '.join(short)}."
        if most < 2 * train.get("tokens", 0):
            return {"state": state, "text": text, "command": None}
        text += " What can be done here:"
    parts = [f"about {duration(most / rate)} at {number(rate, 3)} tokens/s"] if rate else []
    parts += [f"{passes(most / there)} over the text"] if there else []
    text += f" {count(most)} tokens are {', '.join(parts)}." if parts else ""
    amount = count(float(f"{most:.2g}")) if short else count(most)
    return _step(run, state, text, amount, f"train.tokens={amount}", *_fewer_checkpoints(run, most))


def _fewer_checkpoints(run: RunFiles, tokens: int) -> list[str]:
    """The setting that keeps a longer run from writing checkpoints all the time: a short one saves often."""
    every = (run.recipe.get("train") or {}).get("checkpoint_every") or tokens
    return [f"train.checkpoint_every={count(tokens // 20)}"] if tokens > 100 * every else []


def _mapped(run: RunFiles, state: str, text: str, budget: float) -> Json:
    sets = ["convert.sharing=auto", f"convert.kv_budget={budget:g}", "convert.init=calibrated"]
    return _step(run, state, text, f"kv{100 * budget:.0f}", *sets)


def _step(run: RunFiles, state: str, text: str, name: str = "", *sets: str) -> Json:
    """The recipe of this run with other settings: into another folder if it has a name, else into the same one."""
    recipe = run.files.recipe
    if not recipe.exists():
        return {"state": state, "text": text, "command": None}
    out = run.path
    if name:
        named = out if out.name not in ("", "..") else out.resolve()  # . and .. have no name beside them
        out = named.with_name(f"{named.name}-{name}")
    words = ["cla-convert", "run", str(recipe), "--out", str(out)]
    words += [word for one in sets for word in ("--set", one)]
    return {"state": state, "text": text, "command": shlex.join(words)}


def next_of_model(folder: Path, report: Json) -> Json:
    """The same for a model that was converted or uptrained by itself, outside of a run."""
    if report.get("train"):
        command = ["cla-convert", "eval", str(folder)]
        return {"state": "finish", "text": "Evaluate it; a run (cla-convert run) compares it with its source.",
                "command": shlex.join(command)}  # fmt: skip
    source = (report.get("source") or {}).get("model") or "SOURCE"
    command = ["cla-convert", "uptrain", str(folder), f"{folder}-uptrained", "--teacher", str(source)]
    text = "Uptrain it to recover the quality, on text as broad as what it is used for (data.sources)."
    return {"state": "more_tokens", "text": text, "command": shlex.join([*command, "--tokens", "26M"])}


def show(report: Json) -> Sequence[Block]:
    """The sentence and the command."""
    step = report["next"]
    command = [Listing(step["command"])] if step["command"] else []
    return [Paragraph([strong("Next:"), f" {step['text']}"]), *command]


register(
    Section(
        "next", place=7, collect=collect, show=show,
        needs=("verdict", "uptraining", "kv", "bench", "model", "accuracy", "control"),
    )
)  # fmt: skip
