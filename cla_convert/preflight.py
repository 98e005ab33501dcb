"""What a tokenizer and lengths ask of a model, checked before work: errors that would otherwise come after hours."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .console import say, say_once, warn_once
from .effort import affordable_length
from .errors import InputError
from .models.probe import chat_of
from .models.shape import AttentionShape, positions_of, shape_of, size_of
from .recipe import Recipe, TextFile, TextSource

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


def check_tokenizer(tokenizer: "PreTrainedTokenizerBase", config: Mapping[str, Any]) -> None:
    """Raise InputError if text, or a conversation, can become token ids that the model's embedding does not have.

    Special tokens that stand in neither (such as those of images) only cause a warning.
    """
    rows = size_of(config, "vocab_size")
    beyond = {token: number for token, number in tokenizer.get_vocab().items() if rows and number >= rows}
    if not beyond:
        return
    own = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id, *tokenizer("a").input_ids]
    own += chat if isinstance(chat := chat_of(tokenizer), list) else []
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    wrong = {token: number for token, number in beyond.items() if number in own or number not in special}
    some = sorted((number, token) for token, number in (wrong or beyond).items())[:3]
    named = ", ".join(f"{token!r} ({number})" for number, token in some)
    if wrong:
        raise InputError(
            "The tokenizer is not the model's",
            why=f"Its embedding has {rows} rows; tokens beyond: {len(wrong)}, such as {named}.",
            fix="Use the tokenizer that belongs to the model, or enlarge its embedding (resize_token_embeddings).",
        )
    warn_once(f"special tokens that no text may hold: {named}. The model's embedding has {rows} rows, and not theirs")


def check_prefix(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raise InputError if evaluation has nothing to begin a text with."""
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise InputError(
            "The tokenizer has neither BOS nor EOS, so the model cannot be evaluated",
            why="lm-eval begins a text with one of them, to predict the first token from something.",
            fix="Name one in tokenizer_config.json (bos_token or eos_token).",
        )


def fitted(texts: list[TextFile], config: Mapping[str, Any]) -> list[TextFile]:
    """The texts with windows no longer than the model's context; a note says so of each that had a longer one."""
    longest, found = positions_of(config), list[TextFile]()
    for text in texts:
        if longest and text.window > longest:
            say(f"eval.perplexity {text.name}: windows of {longest} tokens, {_AS_BUILT} {text.window}")
            text = text.model_copy(update={"window": longest})
        found.append(text)
    return found


def fitted_rows(rows: "np.ndarray", config: Mapping[str, Any]) -> "Tensor":
    """The same of rows of held-out token ids [n, T]: of each its beginning."""
    import torch

    longest = positions_of(config)
    if longest and rows.shape[1] > longest:
        say(f"held-out text: windows of {longest} tokens, {_AS_BUILT} {rows.shape[1]}")
    return torch.from_numpy(rows)[:, :longest]


def fitted_source(source: TextSource, config: Mapping[str, Any]) -> TextSource:
    """The same of text that the model writes: in rows no longer than its context."""
    longest, wanted = positions_of(config), source.generate
    if not (wanted and longest and wanted.length > longest):
        return source
    say_once(f"sampling text in rows of {longest} tokens, {_AS_BUILT} {wanted.length}")
    return source.model_copy(update={"generate": wanted.model_copy(update={"length": longest})})


_AS_BUILT = "which is what the model was built for, and not of"


def check_lengths(recipe: Recipe, config: Mapping[str, Any]) -> None:
    """Raise InputError if training asks for more positions than the model has."""
    name, longest, length = "train.sequence_length", positions_of(config), recipe.train.sequence_length
    if recipe.train.tokens and longest and length > longest:
        raise InputError(
            f"{name} is {length}, more than the model's {longest} positions", fix=f"Lower {name} to {longest}."
        )


def check_packing(recipe: Recipe, config: Mapping[str, Any]) -> None:
    """Raise InputError if several texts of one row are to be kept apart in a model that cannot do so."""
    shape = shape_of(config)
    if recipe.train.document_masking and recipe.train.tokens:
        check_apart(shape, "train.document_masking", "Leave it out: documents are separated by EOS then.")
    for number, source in enumerate(recipe.data.sources):
        if source.generate:
            check_apart(shape, f"data.sources[{number}].generate", "Name a text instead, such as {path: my-corpus/}.")


def check_apart(shape: AttentionShape, setting: str, fix: str) -> None:
    """Raise InputError if texts in one row would see each other: masks reach attention, and no other layer."""
    if without := shape.num_layers - len(shape.kv_layers):
        raise InputError(
            f"{setting} does not work with models of type {shape.model_type!r}",
            why=f"It puts several texts into one row, and {without} layers without attention would carry what they "
            "remember of one text into the next.",
            fix=fix,
        )


def calibration_length(recipe: Recipe, config: Mapping[str, Any], device: str) -> int:
    """Tokens of a calibration row: no more than the model's context; a note says so, once, if more were asked for."""
    longest, wanted = positions_of(config), recipe.convert.calibration.sequence_length
    if wanted == "auto":
        return min(affordable_length(device), longest or affordable_length(device))
    if longest is None or wanted <= longest:
        return wanted
    say_once(f"calibrating on sequences of {longest} tokens, {_AS_BUILT} {wanted}")
    return longest


def check_evaluation(folder: Path) -> None:
    """Check the tokenizer of the model in `folder`. Raises InputError."""
    from .models.checkpoint import Checkpoint
    from .models.export import load_tokenizer

    tokenizer = load_tokenizer(folder)
    check_tokenizer(tokenizer, Checkpoint.open(folder).config)
    check_prefix(tokenizer)
