"""Documents whose answer turned from right to wrong, or back: what a mean over documents hides."""

from ..evaluation.samples import CHOICE
from .run_folder import Json, RunFiles

SHOWN = 3
"""Examples in each direction and task."""
CUT = 280
"""Characters of a prompt (its end) and of a choice (its start) that are shown."""


def find_flips(run: RunFiles, tasks: dict[str, dict[str, Json]], point: str | None) -> dict[str, Json]:
    """{task: {metric, lost, gained, examples {lost: [...], gained: [...]}}} between `before` and `point`.

    Counted on the task's primary metric. An example holds doc_id and, where the task file kept them, the end of the
    prompt and the choices: text, target, and per point the log-likelihood (nats) and whether the model chose it.
    """
    found = {}
    for task, metrics in tasks.items():
        metric = next(
            (name for name, row in metrics.items() if row.get("primary") and row.get("kind") == "binary"), None
        )
        before, after = run.task_file("before", task), run.task_file(point or "", task)
        if metric is None or before is None or after is None:
            continue
        pairs = list(zip(before["samples"], after["samples"], strict=True))
        examples = {
            "lost": [_example(a, b, metric) for a, b in pairs if _right(a, metric) and not _right(b, metric)],
            "gained": [_example(a, b, metric) for a, b in pairs if _right(b, metric) and not _right(a, metric)],
        }
        counts = {direction: len(rows) for direction, rows in examples.items()}
        if any(counts.values()):
            shown = {direction: rows[:SHOWN] for direction, rows in examples.items()}
            found[task] = {"metric": metric, "n": len(pairs), **counts, "examples": shown}
    return found


def _right(sample: Json, metric: str) -> bool:
    return sample["metrics"].get(metric) == 1


def _example(before: Json, after: Json, metric: str) -> Json:
    shown: Json = {"doc_id": before["doc_id"], "prompt": _end(before.get("prompt")), "choices": []}
    texts = before.get("choices") or []
    sides = {"before": before, "after": after}
    if not texts or not all(len(sample.get("loglikelihoods") or []) == len(texts) for sample in sides.values()):
        return shown
    scores = {side: sample["loglikelihoods"] for side, sample in sides.items()}
    chosen = {side: _chosen(scores[side], texts, metric) for side in sides}
    # The right one is what the right side chose: tasks name their target by number, by letter or by text.
    target = chosen["before" if _right(before, metric) else "after"]
    if chosen["before"] == chosen["after"]:  # not told by these numbers
        chosen, target = {"before": None, "after": None}, None
    shown["choices"] = [
        {"text": _start(text), "target": index == target}
        | {side: scores[side][index] for side in sides}
        | {f"chosen_{side}": index == number for side, number in chosen.items()}
        for index, text in enumerate(texts)
    ]
    return shown


def _chosen(scores: list[float], texts: list[str], metric: str) -> int | None:
    """What the model answers: the likeliest choice, per character where the metric says so (as lm-eval does)."""
    if metric == "acc_norm" and any(len(text) >= CHOICE for text in texts):
        return None  # shortened in the file: its true length is not known here
    lengths = [max(len(text.strip()), 1) if metric == "acc_norm" else 1 for text in texts]
    rates = [score / length for score, length in zip(scores, lengths, strict=True)]
    return rates.index(max(rates))


def _start(choice: str) -> str:
    text = " ".join(choice.split())
    return text if len(text) <= CUT else f"{text[:CUT]} ..."


def _end(prompt: str | None) -> str | None:
    text = " ".join((prompt or "").split())
    return (text if len(text) <= CUT else f"... {text[-CUT:]}") or None
