"""The measured numbers as `model-index`, the metadata that the Hugging Face hub shows beside a model card."""

from typing import Any

from .formats import is_accuracy
from .run_folder import Json


def model_index(report: Json, name: str, point: str) -> list[dict[str, Any]]:
    """What was measured at `point`, in the hub's format; empty where nothing was.

    Accuracies are shares (0..1) as lm-eval gives them; the number of rows stands with each dataset, because a score on
    a sample must not be read as one on the whole set.
    """
    from huggingface_hub.repocard_data import EvalResult, eval_results_to_model_index

    results = [
        _result(EvalResult, task, metric, row[point], row["n"])
        for task, metrics in report["tasks"].items()
        for metric, row in metrics.items()
        if is_accuracy(metric) and row[point] is not None
    ]
    results += [
        _result(EvalResult, text, f"{row['unit']}_perplexity", row[point], row["n"])
        for text, row in report["perplexity"].items()
        if row[point] is not None
    ]
    return eval_results_to_model_index(name, results) if results else []


def _result(make: Any, dataset: str, metric: str, value: float, n: int | None) -> Any:
    return make(
        task_type="text-generation", dataset_type=dataset, dataset_name=dataset, dataset_args={"n": n} if n else None,
        metric_type=metric, metric_name=metric, metric_value=round(value, 6),
    )  # fmt: skip
