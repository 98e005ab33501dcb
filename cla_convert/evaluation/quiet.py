"""Run lm-eval without its log lines and progress bars: this package reports in its own way. And without its delays."""

import logging
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any
from unittest.mock import patch

# transformers warns that a whole wikitext page is longer than the model's context; lm-eval cuts it into windows.
_NOISY = ("lm_eval", "datasets", "transformers.tokenization_utils_base", "transformers.generation", "root")


@contextmanager
def quiet() -> Iterator[None]:
    """Raise noisy loggers to ERROR, silence the bars of lm-eval's task building and of `datasets`, and compile the
    templates of a task once.
    """
    import datasets
    import lm_eval.api.metrics
    import lm_eval.api.task
    import lm_eval.utils

    levels = {name: logging.getLogger(name).level for name in _NOISY}
    bars = not datasets.are_progress_bars_disabled()
    with ExitStack() as stack:
        # `evaluate` builds the requests of a task under a bar that cannot be turned off by an argument.
        if hasattr(lm_eval.api.task, "tqdm"):
            stack.enter_context(patch.object(lm_eval.api.task, "tqdm", _no_bar))
        # Bootstrapped standard errors print to stdout and fork a pool, which hangs beside a process group.
        stack.enter_context(patch.object(lm_eval.api.metrics, "bootstrap_stderr", _no_stderr))
        # Every prompt, choice and answer of every document is compiled otherwise: two thirds of building a task.
        templates = lm_eval.utils.env
        stack.enter_context(patch.object(templates, "from_string", cache(templates.from_string)))
        datasets.disable_progress_bars()
        for name in _NOISY:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
            if bars:
                datasets.enable_progress_bars()


def _no_bar(items: Any, *_args: Any, **_options: Any) -> Any:
    return items


def _no_stderr(*_arguments: Any, **_options: Any) -> float:
    """Unknown: what is uncertain about a change, the paired comparison says."""
    return math.nan
