"""The sentences of a report: the verdict and the caveats, both derived from the numbers."""

from typing import Any

from .formats import change, count, duration, number
from .run_folder import Json, RunFiles

_STATUS = {
    "within_margin": "Within the margin",
    "margin_broken": "Worse than the margin allows",
    "not_enough_rows": "Not enough rows to tell",
}


def verdict_line(summary: Json | None, perplexity: dict[str, Json], point: str | None) -> str:
    """One sentence or two that a reader may quote: the accuracy verdict, then how perplexity moved."""
    stage = {"after": "after uptraining", "converted": "right after conversion"}.get(point or "", "")
    if summary is None:
        opening = "No verdict on accuracy: the source and the converted model were not both evaluated"
    else:
        low, high = (100 * value for value in summary["ci95"])
        opening = (
            f"{_STATUS[summary['verdict']]}: {stage}, mean accuracy over {len(summary['tasks'])} tasks "
            f"({summary['n']} documents) changed by {100 * summary['delta']:+.1f} points "
            f"(95% CI {low:+.1f} to {high:+.1f}; margin {100 * summary['margin']:g})"
        )
    changes = [f"{name} {row['before']:.4g} -> {_last(row):.4g} ({change(row['relative'])})"
               for name, row in perplexity.items() if row["relative"] is not None]  # fmt: skip
    ending = f"Perplexity: {', '.join(changes)}." if changes else "Perplexity was not measured at both points."
    return f"{opening}. {ending}"


def table_note(report: Json) -> str:
    """What the columns of the accuracy table mean."""
    control = " Control: the source model uptrained on the same tokens; CLA cost is after minus control." if (
        report["control"] and report["control"]["kind"] == "trained"
    ) else ""  # fmt: skip
    corrected = any("p_holm" in row for metrics in report["tasks"].values() for row in metrics.values())
    holm = ", for a task's main metric corrected over the tasks (Holm)" if corrected else ""
    return (
        "Per cent correct on the same documents. Before: the source model. Converted: K/V shared, nothing trained yet. "
        f"After: uptrained.{control} The delta is {report['compared'] or 'the last point'} minus before, paired by "
        f"document; p: exact McNemar test{holm}."
    )


def domain_note(report: Json) -> str:
    """What the columns of the table of domains mean."""
    tokens = sorted({row["tokens"] for row in report["domains"].values() if row["tokens"]})
    amount = " to ".join(count(n) for n in dict.fromkeys((tokens[0], tokens[-1]))) if tokens else "some"
    few = " So few tokens give an indication, not a measurement." if tokens and tokens[0] < 4096 else ""
    return (
        f"{amount} tokens a domain, shipped with cla-convert. KL from the source model, nats per token. Recovered: the "
        "share of the KL after conversion that training took away. Trained on such text: its rows are as near to the "
        f"training text as that text's own held-out rows.{few}"
    )


def gate_line(gate: Json) -> str:
    """What the quality gate found: whether it lets this model pass, and why not."""
    state = "passed, strictly too" if gate["strict_passed"] else "passed, not strictly" if gate["passed"] else "failed"
    reasons = [
        f"{reason['scope']}: {reason.get('why') or reason['code'].replace('_', ' ')}" for reason in gate["reasons"]
    ]
    return f"Quality gate: {state}" + (f" ({'; '.join(reasons)})." if reasons else ".")


def training_line(train: Json) -> str:
    """`26M tokens in 400 steps, 3 min 45 s (116k tokens/s), loss distill, 1.2 -> 0.31, on cuda in bfloat16.`"""
    text = f"{count(train['tokens'])} tokens"
    if train.get("steps") is not None:
        text += f" in {train['steps']} steps"
    if train.get("seconds") is not None:
        text += f", {duration(train['seconds'])}"
    if train.get("tokens_per_second") is not None:
        text += f" ({number(train['tokens_per_second'], 3)} tokens/s)"
    text += f", loss {train.get('objective') or train.get('loss_name') or 'not recorded'}"
    if isinstance(train.get("loss"), (int, float)):
        first = f"{number(train['first_loss'])} -> " if train.get("first_loss") is not None else ""
        text += f", {first}{number(train['loss'])}"
    return f"{text}, on {train.get('device') or 'an unrecorded device'}" + (
        f" in {train['precision']}." if train.get("precision") else "."
    )


def group_title(group: Json) -> str:
    """What a group of the sharing map says under the mouse."""
    if len(group["layers"]) == 1:
        return f"layer {group['owner']} shares with no other"
    text = f"layer {group['owner']} owns, {', '.join(str(i) for i in group['layers'] if i != group['owner'])} read"
    if group["damage"] is not None:
        text += f"; damage {group['damage']:.3g}"
    if group["captured_k"] is not None:
        text += f"; {100 * group['captured_k']:.1f}% of keys, {100 * group['captured_v']:.1f}% of values kept"
    return text


def _last(row: Json) -> float:
    return row["after"] if row["after"] is not None else row["converted"]


def control_statement(control: Json, perplexity: dict[str, Json]) -> str:
    """What CLA cost apart from what the data taught: the uptrained model against the control."""
    if control["kind"] == "source":
        return (
            "The control is the source model itself: distilling it from itself starts at a KL of 0 and stays there. "
            "CLA cost = after - before."
        )
    parts = []
    if summary := control["mean_accuracy"]:
        low, high = (100 * value for value in summary["ci95"])
        parts.append(f"mean accuracy {100 * summary['delta']:+.1f} points (95% CI {low:+.1f} to {high:+.1f})")
    parts += [f"{name} perplexity {row['control']:.4g} -> {row['after']:.4g} ({change(row['cla_cost_relative'])})"
              for name, row in perplexity.items() if row["cla_cost_relative"] is not None]  # fmt: skip
    return f"CLA cost = after - control: {', '.join(parts) or 'not measured yet'}."


def caveats(run: RunFiles, kv: Json, comparison: Json) -> list[str]:
    """What a sceptical reader should know, each only where it applies."""
    return [
        *_comparability(run), *comparison["problems"], *_task_caveats(run, comparison), *_training_caveats(run),
        *_kv_caveats(kv),
    ]  # fmt: skip


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


def _training_caveats(run: RunFiles) -> list[str]:
    if not run.train:
        return ["Nothing was uptrained: the last column is the model right after conversion."] if run.convert else []
    found = []
    if (run.recipe.get("train") or {}).get("loss") == "cross_entropy" and "control" not in run.results:
        found.append(
            "Trained with cross-entropy: held-out perplexity then mixes recovery with learning the new text, and can "
            "fall below the source's. Only a source model trained on the same tokens (train.control: true) separates "
            "the two."
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
