"""What a sceptical reader should know, each only where it applies."""

from collections.abc import Sequence
from typing import Any

from ...evaluation.stale import is_replaced, trained_from_another, unlike_control
from ..content import Block, Bullets
from ..formats import count
from ..invocations import invocations_of, mixed
from ..run_folder import Json, RunFiles
from ..section import Material, Section, register


def collect(material: Material, report: Json) -> Json:
    """caveats: sentences."""
    run, comparison = material.run, material.comparison
    return {
        "caveats": [
            *_comparability(run), *comparison["problems"], *_task_caveats(run, comparison), *_training_caveats(run),
            *_kv_caveats(report["kv"]), *(f"{said}." for said in run.convert.get("left_out") or []),
        ]
    }  # fmt: skip


def _comparability(run: RunFiles) -> list[str]:
    hashes = {point: result.get("specification_hash") for point, result in run.results.items()}
    found = []
    if len(set(hashes.values())) > 1:
        found.append("THE POINTS WERE NOT MEASURED ALIKE: their evaluation specifications differ. Evaluate them again.")
    if "vllm" in next((r.get("specification", {}).get("backend", {}) for r in run.results.values()), {}):
        found.append(
            "Tasks were scored with vLLM, through transformers' modelling code at every point; perplexity of texts, "
            "agreement and the KV cache were measured with transformers itself. Stock vLLM does not save the memory."
        )
    if is_replaced(run.files):
        found.append(
            "THE CONVERTED MODEL IS NOT THE RUN'S OWN ANY MORE: the map and the sizes here are of the one that it "
            "replaced."
        )
    if trained_from_another(run.files.training, run.files.converted):
        found.append(
            "THE UPTRAINED MODEL BEGAN AS ANOTHER CONVERSION than the one that is here: `after` is not what training "
            "made of `converted`."
        )
    if several := mixed(invocations_of(run)):
        found.append(
            f"Its stages were not all made with the same {', '.join(several)}: How to reproduce says which with which."
        )
    quantization = (run.convert.get("source") or {}).get("quantization")
    if quantization:
        found.append(
            f"The source file is quantised ({quantization}). Every number here is about the dequantised model: "
            "'before' is not the original full-precision model, and what quantisation cost is in all three columns."
        )
    return found


def _task_caveats(run: RunFiles, comparison: Json) -> list[str]:
    specifications = next((result.get("specification", {}) for result in run.results.values()), {})
    tasks: dict[str, Any] = specifications.get("tasks", {})
    packed = [name for name, task in tasks.items() if task.get("source") == "offline pack" and name != "wikitext"]
    found = []
    if packed:
        counts = sorted({tasks[name]["n"] for name in packed})
        found.append(
            f"Accuracies are on {' to '.join(map(str, counts))} rows a task, from the 250-row samples of the offline "
            f"pack ({', '.join(packed)}): good for before against after, not for comparing with published scores."
        )
    if in_turns := [name for name, task in tasks.items() if task.get("chat_template")]:
        found.append(
            f"Asked as turns of a conversation, by the model's chat template ({', '.join(in_turns)}): these scores are "
            "not comparable with those of plain prompts."
        )
    if shortened := _shortened(run, tasks):
        found.append(
            "Requests that were longer than the model is fed (eval.max_length, or its context) lost their start: "
            f"{', '.join(shortened)}."
        )
    if "boolq" in packed:
        found.append("boolq passages lack the article title that the stock task puts in front.")
    if "wikitext" in tasks and tasks["wikitext"].get("source") == "offline pack" and tasks["wikitext"]["n"] < 62:
        found.append(
            f"wikitext is the {tasks['wikitext']['n']} shortest of the 62 pages of the wikitext-2 test set; short "
            "pages give less context and a higher perplexity than the published figure over all pages."
        )
    corrected = any("p_holm" in row for metrics in comparison["tasks"].values() for row in metrics.values())
    if tasks and not corrected:
        found.append("Several metrics are tested at once; p-values are not corrected for that.")
    return found


def _shortened(run: RunFiles, tasks: Json) -> list[str]:
    """`boolq 2 of 500`: the most at any point."""
    most: dict[str, int] = {}
    for result in run.results.values():
        for name, number in (result.get("truncated") or {}).items():
            most[name] = max(number, most.get(name, 0))
    return [f"{name} {number:,} of {tasks.get(name, {}).get('requests', 0):,}" for name, number in most.items()]


def _training_caveats(run: RunFiles) -> list[str]:
    if not run.train:
        return ["Nothing was uptrained: the last column is the model right after conversion."] if run.convert else []
    found = []
    # the same rows are not measured again of a model that stayed: only the last point tells what is held out now
    trained, text = run.train.get("data_digest"), run.held_out.get(run.last_point, {}).get("text")
    if trained and text and text != trained:
        found.append(
            "HELD-OUT TEXT IS NOT OF THE TEXT THAT WAS TRAINED ON: data.sources gave other tokens by then. The model "
            "may have seen it."
        )
    if (run.recipe.get("train") or {}).get("loss") == "cross_entropy" and "control" not in run.results:
        found.append(
            "Trained with cross-entropy: held-out perplexity then mixes recovery with learning the new text, and can "
            "fall below the source's. Only a source model trained on the same tokens (train.control: true) separates "
            "the two."
        )
    auto_rates = (run.recipe.get("train") or {}).get("learning_rate", "auto") == "auto"
    if unlike := unlike_control(run.files, auto_rates=auto_rates):
        found.append(f"THE CONTROL WAS NOT TRAINED ALIKE: {', '.join(unlike)} differ, so CLA cost is not CLA's alone.")
    for source in (run.train.get("data") or {}).get("sources", []):
        if unread := source.get("passed_over"):
            kinds = ", ".join(f"{n} {ending or 'without an ending'}" for ending, n in unread.items())
            found.append(f"Of the text in {source['name']} these files were not read: {kinds}.")
    if (run.train.get("data") or {}).get("conversations") == 0:
        found.append(
            "The model has a chat template, and none of the training text is conversations: it may follow instructions "
            "far worse than before, which no table here shows (docs/uptraining.md, Instruct models)."
        )
    tokens = run.train.get("tokens")
    if tokens and tokens < 10_000_000:
        found.append(f"{count(tokens)} training tokens show that the path works; recovery takes far more.")
    return found


def _kv_caveats(kv: Json) -> list[str]:
    found = []
    if kv["dtype_before"] and kv["dtype_after"] and kv["dtype_before"] != kv["dtype_after"]:
        found.append(
            f"The measured caches hold {kv['dtype_before']} before and {kv['dtype_after']} after: part of the "
            "difference in measured bytes is the number format, not the sharing."
        )
    if kv["sliding_layers"]:
        found.append(
            f"{kv['sliding_layers']} layers have a sliding window and stop growing once it is full: bytes per token "
            f"are measured up to {2 * (kv['measured_tokens'] or 0)} tokens."
        )
    return found


def show(report: Json) -> Sequence[Block]:
    """A list."""
    return [Bullets(report["caveats"] or ["Nothing was evaluated."])]


register(Section("caveats", place=85, title="Read this before quoting", collect=collect, show=show, needs=("kv",)))
