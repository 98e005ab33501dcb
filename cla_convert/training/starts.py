"""What sampled texts begin with: the model's own separator, a random token, a real opening, or a user's turn.

`separator` needs the token that the model was pretrained to begin documents with. Tokenizers do not say which one it
is: the BOS of an instruct model may open a turn of a chat (SmolLM2-Instruct: `<|im_start|>`), its EOS may close one. So
the model is asked: behind the right token it expects the first words of real documents best.
"""

from collections.abc import Collection
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..errors import InputError
from ..models.turns import written
from ..recipe import Generate, TextSource
from .decoding import Prompts
from .sources import documents
from .tokenise import leading

OPENINGS = Path(__file__).parent.parent / "data" / "openings.parquet"
"""How documents of many kinds begin (cla_convert/data/README.md)."""
MOST_OPENINGS = 20_000
_USUAL = ("<|endoftext|>", "<|end_of_text|>", "<|begin_of_text|>", "<s>", "</s>", "<bos>", "<eos>", "[BOS]", "[EOS]")
"""Names that tokenizers give to what stands between documents."""
_ASKED = 48
_FIRST = 12
"""Tokens of an opening whose loss counts: further on, the text itself says enough."""
_A_ROW = 8
"""Prompts for each row of a batch; one with more texts goes on with its neighbour's."""


def openings(settings: Generate) -> list[str]:
    """Beginnings of real documents: those of `settings.openings`, or those shipped. Raises InputError."""
    if settings.openings is None:
        return pq.read_table(OPENINGS, columns=["text"])["text"].to_pylist()
    texts = (str(document.content) for document in documents(TextSource(path=settings.openings), seed=0))
    return [text[:400] for text in islice(texts, MOST_OPENINGS)]


def candidates(tokenizer: Any) -> list[int]:
    """Tokens that may stand between documents."""
    known = tokenizer.get_vocab()
    named = [known[name] for name in _USUAL if name in known]
    own = [*leading(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id]
    return list(dict.fromkeys(token for token in [*own, *named] if token is not None))


@torch.inference_mode()
def separator_losses(model: Any, tokenizer: Any) -> dict[int, float]:
    """Candidate -> mean loss of the first tokens of a few real documents behind it, in nats."""
    texts = openings(Generate())[:_ASKED]
    encoded = (tokenizer(text, add_special_tokens=False).input_ids[:_FIRST] for text in texts)
    rows = torch.tensor([ids for ids in encoded if len(ids) == _FIRST], device=model.device)
    losses = {}
    for token in candidates(tokenizer):
        ids = torch.cat([rows.new_full((len(rows), 1), token), rows], dim=1)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        losses[token] = round(cross_entropy(logits.flatten(0, 1), rows.flatten()).item(), 4)
    return losses


class Starts:
    """Makes the prompts of a batch."""

    def __init__(self, tokenizer: Any, settings: Generate, separator: int, ends: Collection[int]) -> None:
        """Raises InputError: no openings to be read, or no chat template."""
        self._separator, self._longest_opening = separator, settings.opening_tokens
        self._kinds = settings.starts
        special = set(tokenizer.all_special_ids)
        self._usual = np.array([token for token in range(len(tokenizer)) if token not in special])
        self._openings: list[list[int]] = []
        if "prefix" in self._kinds:
            texts = openings(settings)
            encoded = tokenizer(texts, add_special_tokens=False).input_ids if texts else []
            self._openings = [ids[: settings.opening_tokens] for ids in encoded if ids]
            if not self._openings:
                raise InputError(f"No openings in {settings.openings!r}", "Every document is empty.")
        self._turns = chat_turns(tokenizer, ends) if "chat" in self._kinds else ([], [])

    def draw(self, rows: int, seed: int) -> tuple[Prompts, Tensor]:
        """Prompts for so many rows, and the one that each begins with; the same for a seed."""
        random = np.random.default_rng(seed)
        texts: list[tuple[list[int], bool]] = []
        first = []
        for number in range(rows * _A_ROW):
            if number % _A_ROW == 0:
                first.append(len(texts))
            kind = self._kinds[(number + number // _A_ROW) % len(self._kinds)]  # rows begin with different kinds
            texts += self._text(kind, random)
        longest = self._longest()
        tokens = torch.zeros(len(texts), longest, dtype=torch.int64)
        for row, (ids, _) in zip(tokens, texts, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        lengths = torch.tensor([len(ids) for ids, _ in texts])
        after = (torch.arange(len(texts)) + 1) % len(texts)
        return Prompts(tokens, lengths, after, torch.tensor([opens for _, opens in texts])), torch.tensor(first)

    def _text(self, kind: str, random: np.random.Generator) -> list[tuple[list[int], bool]]:
        """The prompt of a text, or those of its turns, and whether each begins a text."""
        if kind == "chat":
            opening, answer = self._turns
            return [(opening, True), (answer, False)]
        if kind == "separator":
            return [([self._separator], True)]
        if kind == "random":
            return [([self._separator, int(random.choice(self._usual))], True)]
        opening = self._openings[random.integers(len(self._openings))]
        return [([self._separator, *opening[: random.integers(1, self._longest_opening + 1)]], True)]

    def _longest(self) -> int:
        """Of all prompts of these kinds, so that every batch has tensors of one size."""
        longest = {"separator": 1, "random": 2, "prefix": 1 + self._longest_opening}
        return max(longest.get(kind, max(map(len, self._turns), default=1)) for kind in self._kinds)


def chat_turns(tokenizer: Any, ends: Collection[int]) -> tuple[list[int], list[int]]:
    """What stands before a user's words, and between them (with their end) and the answer, by the chat template.

    A model that was tuned on conversations writes the user's part too when it is given the first (MAGPIE, Xu et al.
    2024, arXiv 2406.08464).

    Raises:
        InputError: there is no template, or it does not end a turn with a token that ends one for the model.
    """
    mark = "\u2402words\u2403"
    try:
        message = [{"role": "user", "content": mark}]
        text, _ = written(tokenizer, message, add_generation_prompt=True)
    except ValueError as error:
        raise InputError(
            "The model has no chat template", fix="Leave `chat` out of generate.start: this is no chat model."
        ) from error
    before, _, behind = text.partition(mark)
    opening, rest = (tokenizer(part, add_special_tokens=False).input_ids for part in (before, behind))
    ended = next((place for place, token in enumerate(rest) if token in ends), None)
    if ended is None or not opening or ended + 1 == len(rest):
        raise InputError(
            "generate.start: chat does not work with this model's chat template",
            "It ends the user's turn with no token that ends a text for the model, so nobody knows when to answer.",
            "Leave `chat` out of generate.start.",
        )
    return opening, rest[ended + 1 :]
