"""lm-eval's output in compact form: scores by metric, and per document only what a paired comparison needs."""

import math
from typing import Any

PROMPT, CHOICE = 400, 400
"""Characters kept of a prompt (its end) and of a choice, for showing samples."""


def metric_name(key: str) -> str:
    """`acc,none` -> `acc`; a filter other than none stays: `exact_match,strict-match`."""
    return key.removesuffix(",none")


def scores(result: dict[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    """Split one task's lm-eval result into {metric: value} and {metric: standard error}."""
    values, errors = {}, {}
    for key, value in result.items():
        metric, comma, filter_name = key.partition(",")
        if not comma or not isinstance(value, (int, float)):
            continue  # alias, sample_len; a standard error of "N/A"
        if metric.endswith("_stderr"):
            if math.isnan(value):  # not known
                continue
            errors[metric_name(f"{metric.removesuffix('_stderr')},{filter_name}")] = float(value)
        else:
            values[metric_name(key)] = float(value)
    return values, errors


def compact(samples: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One entry a document (and filter), ordered by task and document.

    Entry: task, doc_id, doc_hash, prompt_hash, target_hash, metrics {name: 0/1, number, or [log-likelihood, units]},
    for multiple choice the log-likelihood of every choice in nats, and the end of the prompt and the choices to show.
    """
    entries = [_entry(task, sample) for task, rows in samples.items() for sample in rows]
    return sorted(entries, key=lambda entry: (entry["task"], entry["doc_id"], sorted(entry["metrics"])))


def _entry(task: str, sample: dict[str, Any]) -> dict[str, Any]:
    entry = {"task": task} | {key: sample[key] for key in ("doc_id", "doc_hash", "prompt_hash", "target_hash")}
    filter_name = sample.get("filter", "none")
    entry["metrics"] = {metric_name(f"{name},{filter_name}"): sample[name] for name in sample["metrics"]}
    likelihoods = [response[0] for response in sample["filtered_resps"] if isinstance(response, (list, tuple))]
    if len(likelihoods) > 1:
        entry["loglikelihoods"] = [float(value) for value in likelihoods]
        entry["target"] = sample["target"]
        entry |= _shown(sample["arguments"])
    return entry


def grid(source: str, samples: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """`{grid: [{length, depth, n, acc, loglikelihood}]}`, means per cell, for generated tasks; else nothing."""
    if source != "generated":
        return {}
    cells: dict[tuple[int, float], list[dict[str, Any]]] = {}
    for sample in (sample for rows in samples.values() for sample in rows):
        cells.setdefault((sample["doc"]["length"], sample["doc"]["depth"]), []).append(sample)
    means = [
        {"length": length, "depth": depth, "n": len(rows)}
        | {metric: sum(row[metric] for row in rows) / len(rows) for metric in ("acc", "loglikelihood")}
        for (length, depth), rows in sorted(cells.items())
    ]
    return {"grid": means}


def _shown(arguments: list[tuple[str, str]]) -> dict[str, Any]:
    """What a reader needs to see the question: the end of the prompt, and the choices.

    Most tasks ask one prompt with several continuations; winogrande asks several prompts with one continuation.
    """
    prompts, continuations = ([str(part) for part in parts] for parts in zip(*arguments, strict=True))
    if len(set(prompts)) > 1:
        return {"prompt": f"... {continuations[0].strip()}", "choices": [prompt[-CHOICE:] for prompt in prompts]}
    return {"prompt": prompts[0][-PROMPT:], "choices": [text[:CHOICE] for text in continuations]}
