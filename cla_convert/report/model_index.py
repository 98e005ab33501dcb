"""The measured numbers as the Hugging Face hub shows them beside a model card (`model-index`)."""

from typing import Any

from .formats import unit_of
from .run_folder import Json


def eval_results(report: Json, point: str) -> list[Any]:
    """What was measured at `point`, as `EvalResult`s of huggingface_hub; empty where nothing was.

    Accuracies are shares (0..1) as lm-eval gives them; the number of rows stands with each dataset, because a score on
    a sample must not be read as one on the whole set.
    """
    from huggingface_hub import EvalResult

    results = [
        _result(EvalResult, task, metric, row[point], row["n"])
        for task, metrics in report["tasks"].items()
        for metric, row in metrics.items()
        if unit_of(metric, row.get("kind")) in ("share", "number") and row[point] is not None
    ]
    return results + [
        _result(EvalResult, text, f"{row['unit']}_perplexity", row[point], row["n"])
        for text, row in report["perplexity"].items()
        if row[point] is not None
    ]


def _result(make: Any, dataset: str, metric: str, value: float, n: int | None) -> Any:
    return make(
        task_type="text-generation", dataset_type=dataset, dataset_name=dataset, dataset_args={"n": n} if n else None,
        metric_type=metric, metric_name=metric, metric_value=round(value, 6),
    )  # fmt: skip
