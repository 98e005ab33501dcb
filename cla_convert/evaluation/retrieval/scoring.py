"""How retrieval tasks are scored. Loaded by lm-eval by path, so it imports nothing of the package."""

from typing import Any


def process_results(_doc: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, float]:
    """acc: greedy decoding gives exactly the digits; loglikelihood: nats of the digits.

    lm-eval says whether every token of the answer is the most probable one given the prompt and the answer so far,
    which is the case exactly if greedy decoding produces it. So this is exact match of the generated digits, at the
    price of one forward pass, and base models need no stop rule. The log-likelihood moves long before accuracy does.
    """
    ((loglikelihood, greedy),) = results
    return {"acc": float(greedy), "loglikelihood": loglikelihood}
