"""Stage 4, evaluate: measure the same things on the source, the converted and the uptrained model, and compare."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..console import progress, warn
from ..environment import cache_of, pick_device
from ..recipe import Recipe
from ..record import recorded
from ..results import Domains, KvCache, PointResult
from ..run_folder import RunFolder
from ..same_recipe import continue_under
from .text import text

if TYPE_CHECKING:
    from torch import Tensor

    from ..evaluation.texts import Texts
    from ..training.data import TokenStore


def evaluate(recipe: Recipe, folder: RunFolder) -> dict[str, PointResult]:
    """Measure every point of the run that is missing or was measured under other settings; compare before and after.

    Raises:
        UsageError: the folder is of another recipe, its `eval` section apart.
        UsageError, InputError: a task or a text cannot be had, or memory is too small for a single sequence.
    """
    continue_under(recipe, folder)
    with recorded(recipe, folder, "eval"):
        return _evaluate(recipe, folder)


def _evaluate(recipe: Recipe, folder: RunFolder) -> dict[str, PointResult]:
    from ..evaluation.comparison import write_comparison
    from ..evaluation.points import Conditions, evaluate_points
    from ..evaluation.verdict import Margins

    points, device = folder.points(recipe), pick_device(recipe.device)
    texts = texts_of(recipe, folder)
    conditions = Conditions(folder.evaluation.path, device, recipe.seed, texts, cache_dir=cache_of("eval"))
    results = evaluate_points(points, recipe.eval, conditions)
    with progress(len(points) + 1, "KV cache, statistics", unit="step", leave=False) as bar:
        for point, model in points.items():
            bar.note(point)
            measure_cache(folder, point, model, device)
            bar.update()
        bar.note("statistics")
        write_comparison(folder, margins=Margins.of(recipe.eval), seed=recipe.seed)
    return {point: PointResult.model_validate(result) for point, result in results.items()}


def measure_cache(folder: RunFolder, point: str, model: Path, device: str) -> KvCache:
    """The KV cache of a real `generate` at a point."""
    from ..evaluation.cache import measure_kv_cache
    from ..models.fingerprint import fingerprint

    stored, now = folder.evaluation.point(point).kv_cache, fingerprint(model)
    if (known := stored.read()) and known.model_fingerprint == now:
        return known
    found = measure_kv_cache(model, device=device)
    return stored.write(KvCache.model_validate(found | {"model_fingerprint": now}))


def texts_of(recipe: Recipe, folder: RunFolder) -> "Texts":
    """What is measured on plain text, the same at every point."""
    from ..evaluation.answers import unseen
    from ..evaluation.text_files import beginning
    from ..evaluation.texts import Texts
    from ..models.checkpoint import Checkpoint
    from ..models.export import load_tokenizer
    from ..preflight import fitted, fitted_rows
    from ..training.data import held_out_rows

    store, settings, source = text(recipe, folder), recipe.eval, folder.source(recipe)
    if trained_on_other(folder, store.digest):
        warn(
            "the recipe's text gives other tokens now than was trained on: data.sources have changed since, or another "
            "device takes another amount of it. What is held out now may be text that the model has seen"
        )
    config = Checkpoint.open(source).config
    rows, files = fitted_rows(held_out_rows(store, recipe.train), config), fitted(settings.perplexity, config)
    shared = settings.agreement_tokens
    if shared > rows.numel():
        warn(
            f"eval.agreement_tokens is {shared}, but of held-out text there are {rows.numel()} tokens, which KL and "
            "agreement are measured on (train.validation_tokens, data.held_out)"
        )
    part = rows[: max(1, shared // rows.shape[1])] if shared else None
    tokenizer = load_tokenizer(source)
    prompts = unseen(settings.prompts, tokenizer, store.train) if settings.prompts else []
    begun = {text.name: beginning(text, tokenizer, shared, store.first) for text in files if shared}
    compared = {name: some for name, some in begun.items() if some is not None}
    domains = _domains(recipe, folder, store, compared)
    return Texts(files, rows, part, compared, source, domains, prompts, settings.answer_tokens, store.digest)


def trained_on_other(folder: RunFolder, digest: str) -> bool:
    """Whether a model of the run was trained on other text than that of this digest."""
    done = (training.result.read() for training in (folder.training, folder.control))
    return any(result.data_digest != digest for result in done if result)


def _domains(recipe: Recipe, folder: RunFolder, store: "TokenStore", texts: "dict[str, Tensor]") -> "dict[str, Tensor]":
    """Rows of the domain pack. Records which of them, and of the rows of `texts`, the run's text touched."""
    from ..evaluation.domains.pack import domain_rows
    from ..models.checkpoint import Checkpoint
    from ..models.export import load_tokenizer

    source = folder.source(recipe)
    tokenizer, positions = load_tokenizer(source), Checkpoint.open(source).positions

    def rows_of(tokens: Any) -> "dict[str, Tensor]":
        device = pick_device(recipe.device)
        return domain_rows(tokenizer, tokens, device, first=store.first, positions=positions)

    rows = rows_of(recipe.eval.domain_tokens)
    # what is judged by its text alone costs little
    _record_touched(folder, store, lambda: rows_of(10**9) if rows else {}, texts)
    return rows


def _record_touched(
    folder: RunFolder, store: "TokenStore", domains: "Callable[[], dict[str, Tensor]]", texts: "dict[str, Tensor]"
) -> None:
    """Judge what has not been judged yet, as long as the text is here that the run was trained on."""
    from ..evaluation.domains.overlap import overlap
    from ..evaluation.domains.pack import WINDOW
    from ..evaluation.text_files import packed
    from ..evaluation.texts import digest_of

    def judged(rows: "dict[str, Tensor]") -> dict[str, Any]:
        return overlap(store.train, store.held_out, {name: part.numpy() for name, part in rows.items()})

    recorded = folder.evaluation.domains
    known = recorded.read()
    if known is not None and trained_on_other(folder, store.digest):
        return
    last = known if known is not None and known.text == store.digest else Domains(text=store.digest, domains={})
    whole = {} if last.domains else domains()
    found = judged(whole) if whole else last.domains
    seen: dict[str, Any] = {}
    for name, rows in texts.items():
        digest, length = digest_of(rows), min(WINDOW, rows.numel())
        seen[name] = last.texts.get(name, {})
        if seen[name].get("rows") != digest:
            seen[name] = {"rows": digest} | judged({name: packed(rows.flatten(), length, ())})[name]
    if (found or seen) and (found, seen) != (last.domains, last.texts):
        recorded.write(Domains(text=store.digest, domains=found, texts=seen))
