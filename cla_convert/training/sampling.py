"""Text from the source model itself, for those who have no corpus of their own.

Distilling on the teacher's own samples needs no data (LLM-QAT, Liu et al. 2023, arXiv 2305.17888), and at temperature
1 they have the teacher's distribution. Sampling takes long, so no more is sampled than is asked for, and every batch is
kept at once, under a name that says what it depends on: an interrupted run, or a longer one, continues where the whole
batches end.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import StoppingCriteria

from ..console import progress, say
from ..errors import InputError
from ..files import read_json
from ..models.export import load_model
from ..models.fingerprint import fingerprint
from ..recipe import Generate
from .sources import Document
from .tokenise import leading

_FORMAT = 2  # raise it when the same settings would give other samples


@dataclass(frozen=True)
class SourceModel:
    """The model that `generate` samples from."""

    folder: Path
    device: str
    cache: Path
    """Where batches of samples are kept."""

    def fingerprint(self) -> str:
        """Identifies the weights, and what ends a text."""
        return f"{fingerprint(self.folder)} {self.ends()}"

    def ends(self) -> list[int]:
        """Tokens that end a text according to the model's generation settings."""
        settings = read_json(self.folder / "generation_config.json") or read_json(self.folder / "config.json") or {}
        named = settings.get("eos_token_id")
        return [named] if isinstance(named, int) else named or []


def sampled(
    model: SourceModel, tokenizer: Any, settings: Generate, seed: int, wanted: Callable[[], int]
) -> Iterator[list[Document]]:
    """Batches of documents of token ids, up to `settings.tokens` in all.

    They are the same for the same model, settings, seed and answers of `wanted`; of other answers the first batches
    are the same, as far as they are whole.

    Args:
        model: the source model; loaded only if there is something to sample.
        tokenizer: its tokenizer.
        settings: how to sample.
        seed: seed of the sampling.
        wanted: how many more tokens the caller is going to take, asked before every batch. The last ones have as many
            documents as that should come to, by the mean length so far.

    Raises:
        InputError: the model has fewer positions than a document is long, or memory is too small for the batch.
    """
    folder = model.cache / _key(model, tokenizer, settings, seed)
    folder.mkdir(parents=True, exist_ok=True)
    sampler, done, count, number = None, 0, 0, 0
    with progress(min(wanted(), settings.tokens), "sampling", unit="tok") as bar:
        while done < settings.tokens:
            mean = done / count if count else settings.length
            needed = min(wanted(), settings.tokens - done)
            size = min(settings.batch_size, int(needed / mean) + 1)
            path = folder / f"{number:06d}-{size}.npz"  # another size: other samples
            if not path.exists():
                sampler = sampler or _Sampler(model, tokenizer, settings)
                _keep(path, sampler.sample(size, _seed(seed, number), bar))
                bar.update(done - bar.n)  # what was counted on the way includes padding
            batch = []
            for index, ids in enumerate(_kept(path)):
                if (ids := ids[: settings.tokens - done]).size:
                    done += ids.size
                    batch.append(Document(ids, f"{folder.name}/{number}/{index}"))
            bar.update(done - bar.n)
            yield batch
            count, number = count + size, number + 1


class _Sampler:
    """The loaded model and what is fixed about its sampling."""

    def __init__(self, model: SourceModel, tokenizer: Any, settings: Generate) -> None:
        self.tokenizer, self.settings, self.device = tokenizer, settings, model.device
        dtype = torch.bfloat16 if model.device.startswith("cuda") else torch.float32
        self.model: Any = load_model(model.folder, dtype=dtype, device=model.device)
        longest = getattr(self.model.config, "max_position_embeddings", None)
        if longest and settings.length > longest:
            raise InputError(
                f"generate.length is {settings.length}, more than the model's {longest} positions",
                fix="Lower generate.length.",
            )
        eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self.ends = list(dict.fromkeys([*eos, *model.ends()]))
        # Its own settings (repetition penalty, top-k, ...) would bend the distribution that is to be recovered.
        self.model.generation_config = type(self.model.generation_config)()
        say(f"sampling text from {model.folder.name}: {settings.length} tokens at most a document, on {model.device}")

    def sample(self, count: int, seed: int, bar: Any) -> list[np.ndarray]:
        """`count` documents of token ids [n], n at most settings.length, ended by EOS where the model ended them."""
        settings, vocabulary = self.settings, self.model.get_output_embeddings().weight.shape[0]
        devices = [self.device] if self.device.startswith("cuda") else []
        with torch.random.fork_rng(devices), torch.inference_mode():
            torch.manual_seed(seed)
            prompt = self._prompt(count).to(self.device)
            try:
                rows = self.model.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    max_length=settings.length,
                    do_sample=True,
                    temperature=settings.temperature,
                    top_p=settings.top_p,
                    top_k=settings.top_k,
                    eos_token_id=self.ends or None,
                    pad_token_id=(self.ends or [0])[0],
                    # Rows of the embedding that no token uses are there for alignment only.
                    suppress_tokens=list(range(len(self.tokenizer), vocabulary)) or None,
                    stopping_criteria=[_Progress(bar)],
                )
            except torch.OutOfMemoryError as error:
                raise InputError(
                    f"Sampling {count} documents of {settings.length} tokens at a time does not fit into memory",
                    fix="Lower generate.batch_size.",
                ) from error
        return [self._until_end(row, prompt.shape[1]) for row in rows.cpu().numpy()]

    def _prompt(self, count: int) -> torch.Tensor:
        """First tokens of `count` documents [count, 1 or 2]."""
        before = leading(self.tokenizer)
        if self.settings.start == "bos":
            token = self.tokenizer.bos_token_id
            before = [token if token is not None else (self.ends or [0])[0]]
        prompt = torch.tensor(before, dtype=torch.int64).expand(count, -1)
        if self.settings.start == "bos":
            return prompt
        special = set(self.tokenizer.all_special_ids)
        usual = torch.tensor([token for token in range(len(self.tokenizer)) if token not in special])
        return torch.cat([prompt, usual[torch.randint(len(usual), (count, 1))]], dim=1)

    def _until_end(self, row: np.ndarray, prompt: int) -> np.ndarray:
        """A row up to and with its first end; what follows is padding."""
        ends = np.flatnonzero(np.isin(row[prompt:], self.ends))
        return row[: prompt + ends[0] + 1] if ends.size else row


class _Progress(StoppingCriteria):
    """Moves the bar with every step of `generate`, and never stops it."""

    def __init__(self, bar: Any) -> None:
        self.bar = bar

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """No row is done for this reason."""
        self.bar.update(len(input_ids))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _key(model: SourceModel, tokenizer: Any, settings: Generate, seed: int) -> str:
    chosen = settings.model_dump(mode="json", exclude={"tokens", "batch_size"})
    parts = [_FORMAT, model.fingerprint(), chosen, seed, leading(tokenizer), tokenizer.all_special_ids]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]


def _seed(seed: int, number: int) -> int:
    """Seed of a batch: the batches of one run, and those of neighbouring seeds, have nothing in common."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {number}".encode(), digest_size=7).digest(), "big")


def _keep(path: Path, documents: list[np.ndarray]) -> None:
    """Publish a batch by rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        np.savez(file, ids=np.concatenate(documents), lengths=[document.size for document in documents])
    temporary.replace(path)


def _kept(path: Path) -> list[np.ndarray]:
    with np.load(path) as batch:
        return np.split(batch["ids"], np.cumsum(batch["lengths"])[:-1])
