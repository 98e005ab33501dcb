"""What is measured on plain text: held-out perplexity, agreement with the source model, perplexity of text files,
and what the model answers to a few prompts.

    point_dir/held_out.json            perplexity, nll (nats per token), tokens, text (its hash), windows
    point_dir/agreement.json           kl, top1, tokens, ci95 {kl, top1}, windows: see agreement.py; not for the source
    point_dir/agreement/<name>.json    the same on the beginning of a text file
    point_dir/domains.json             domains {name: perplexity, nll, tokens and, but for the source, kl, top1, ci95}
    point_dir/answers.json             answers [{prompt, text, cut}]: see answers.py
    point_dir/perplexity/<name>.json   name, path, sha256, characters, bytes, tokens, window, perplexity, nll,
                                       bits_per_byte, windows

`windows` holds [nats, tokens] of every row, for paired comparison. Every file carries the identity of what it was
measured on and under which settings, and is measured anew only when that changes.
"""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..console import progress, warn_once
from ..errors import InputError
from ..files import read_json, write_json
from ..models.export import load_tokenizer
from ..models.fingerprint import fingerprint
from ..models.placement import load_where_it_fits
from ..recipe import TextFile
from ..run_folder import PointFolder
from .agreement import agreement
from .answers import answers
from .batch import out_of_memory
from .context import CHARACTERS_PER_TOKEN, fed_tokens, generation_of
from .perplexity import Window, row_windows, totals
from .quiet import quiet
from .text_files import content_of, windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel


Json = dict[str, Any]

_MARKED_UP = (".json", ".csv", ".tsv", ".html", ".xml")


@dataclass(frozen=True)
class Texts:
    """What to measure, the same at every point."""

    files: list[TextFile] = field(default_factory=list)
    held_out: torch.Tensor | None = None
    """Rows of token ids [n, T]."""
    agreement_rows: torch.Tensor | None = None
    """Rows on which models are compared with the source."""
    compared: dict[str, torch.Tensor] = field(default_factory=dict)
    """Rows of the beginnings of `files`, by name, on which they are compared likewise."""
    source: Path | None = None
    domains: dict[str, torch.Tensor] = field(default_factory=dict)
    """Rows of the texts of each domain."""
    prompts: list[str] = field(default_factory=list)
    """To be answered."""
    answer_tokens: int = 40
    text: str = ""
    """Hash of the text that `held_out` is of."""


def check_texts(files: list[TextFile]) -> None:
    """Raise InputError for a text file that cannot be read or is empty; says which hold more than text."""
    for text in files:
        content_of(text)
        if text.path.lower().endswith(_MARKED_UP):
            warn_once(
                f"{text.path} is measured as it stands, with its markup. For the texts in it give jsonl or parquet, "
                "and their column as text_field"
            )


def measure_texts(
    texts: Texts, model_dir: Path, point_dir: Path, common: Json, identity: str, *, device: str, label: str = ""
) -> dict[str, Json]:
    """Measure what is missing in `point_dir`; return everything by file name without ending, without the windows.

    What is there and was not asked for is removed: it would be compared and judged, whatever model it is of.

    Args:
        texts: what to measure.
        model_dir: the model of this point.
        point_dir: receives the files.
        common: batch_size, kind of device, dtype and whatever else fixes the measurement.
        identity: the model's fingerprint.
        device: where to measure.
        label: what the progress bar calls this model.

    Raises:
        BatchTooLarge: out of memory.
    """
    found: dict[str, Json] = {}
    size = common["batch_size"]

    @cache
    def load(folder: Path) -> Any:
        return load_where_it_fits(folder, dtype=common["dtype"], device=device)

    def once(name: str, key: Any, rows: int, measure: Callable[[], Json]) -> None:
        path = PointFolder(point_dir).measured(name)
        digest = hashlib.sha256(json.dumps([identity, common, key], sort_keys=True).encode()).hexdigest()
        found[name] = read_json(path) or {}
        if found[name].get("identity") != digest:
            what = f"{label}: {name}".removeprefix(": ").replace("_", "-")
            with out_of_memory(), quiet(), progress(rows, what, unit="row", counts="rows"):
                found[name] = {**measure(), "identity": digest}
            write_json(path, found[name], indent=None)

    if (rows := texts.held_out) is not None:
        once(
            "held_out", digest_of(rows), len(rows),
            lambda: {**_scored(row_windows(load(model_dir), rows, batch_size=size)), "text": texts.text},
        )  # fmt: skip
    source = texts.source
    other = None if source == model_dir else source
    compared = {f"agreement/{name}": part for name, part in texts.compared.items()}
    if texts.agreement_rows is not None:
        compared["agreement"] = texts.agreement_rows
    if other:
        for name, part in compared.items():
            once(
                name, [digest_of(part), fingerprint(other)], len(part),
                lambda part=part: agreement(load(model_dir), load(other), part, batch_size=size),
            )  # fmt: skip
    if texts.domains:
        key = [{name: digest_of(rows) for name, rows in texts.domains.items()}, source and fingerprint(source)]
        count = sum(map(len, texts.domains.values()))
        once(
            "domains", key, count,
            lambda: _domains(load(model_dir), load(other) if other else None, texts.domains, size),
        )  # fmt: skip
    if texts.prompts:
        key = [texts.prompts, texts.answer_tokens, generation_of(model_dir)]
        once(
            "answers", key, len(texts.prompts),
            lambda: answers(load(model_dir), load_tokenizer(model_dir), texts.prompts, texts.answer_tokens),
        )  # fmt: skip
    for text in texts.files:
        content = content_of(text)
        exclude = {"text_field"}  # the content tells
        count = max(1, content.characters // (CHARACTERS_PER_TOKEN * text.window))
        once(
            f"perplexity/{text.name}", [text.model_dump(exclude=exclude), *content.identity], count,
            lambda text=text: text_perplexity(load(model_dir), model_dir, text, size),
        )  # fmt: skip
    PointFolder(point_dir).keep_texts(found)
    return {name: {k: v for k, v in one.items() if k not in ("windows", "identity")} for name, one in found.items()}


def text_perplexity(model: "PreTrainedModel", model_dir: Path, text: TextFile, batch_size: int) -> Json:
    """Perplexity per token and bits per byte of a text file, see the head of this file.

    Windows do not overlap; each starts with the tokenizer's BOS (EOS where it has none), as in lm-eval, so that every
    token of the text is predicted exactly once and bits per byte count every byte of it.

    Raises:
        InputError: the window is longer than the model's context.
    """
    if fed_tokens(model.config, text.window) < text.window:
        raise InputError(
            f"eval.perplexity {text.name}: a window of {text.window} tokens does not fit",
            why=f"The model was built for {fed_tokens(model.config, text.window)}.",
        )
    content, found = content_of(text), list[Window]()
    for rows in windows(text, load_tokenizer(model_dir), batch_size * _BATCHES):
        found += row_windows(model, rows, batch_size=batch_size)
    scored = _scored(found)
    return {
        "name": text.name, "path": text.path, "sha256": content.sha256,
        "characters": content.characters, "bytes": content.bytes, "window": text.window,
        "bits_per_byte": scored["nll"] * scored["tokens"] / math.log(2) / content.bytes, **scored,
    }  # fmt: skip


_BATCHES = 64
"""Batches of a text whose tokens are in memory together."""


def _domains(
    model: "PreTrainedModel", source: "PreTrainedModel | None", domains: dict[str, torch.Tensor], batch_size: int
) -> Json:
    """Perplexity on each domain and, with a source, agreement with it."""

    def one(rows: torch.Tensor) -> Json:
        if source is None:
            return {**totals(row_windows(model, rows, batch_size=batch_size)), "tokens": rows.numel()}
        found = agreement(model, source, rows, batch_size=batch_size)
        return {key: value for key, value in found.items() if key != "windows"}

    return {"domains": {name: one(rows) for name, rows in domains.items()}}


def _scored(found: list[Window]) -> Json:
    return {**totals(found), "windows": found}


def digest_of(rows: torch.Tensor) -> str:
    """sha256 of the shape and the content."""
    return hashlib.sha256(str(tuple(rows.shape)).encode() + rows.contiguous().numpy().tobytes()).hexdigest()
