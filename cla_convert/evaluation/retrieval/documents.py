"""The documents of the retrieval tasks: prompts of a given number of tokens, with the fact at a given depth.

A document is {length, depth, sample, tokens, prompt, answer}: `tokens` of prompt and answer together are at most
`length` and as near to it as whole sentences allow; depth 0 puts the fact before all filling sentences, 1 after them.
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import InputError, UsageError
from ...models.export import load_tokenizer
from ...recipe import Evaluate
from ..tasks.pack import Rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_PASSKEY_INTRODUCTION = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information there."
)
_PASSKEY_FILLER = [
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
]
_NEEDLE_INTRODUCTION = "A special magic number is hidden within the following text. Memorize it. I will ask for it."
_CITIES = ["Lisbon", "Oslo", "Nairobi", "Lima", "Hanoi", "Dublin", "Quito", "Riga", "Tunis", "Vienna", "Perth", "Seoul"]

_TOKENS_A_SENTENCE = 20  # a first guess

Count = Callable[[str], int]


@dataclass(frozen=True)
class Parts:
    """What a document is made of."""

    introduction: str
    fact: str
    question: str
    answer: str
    filler: Callable[[int], str]
    """The i-th filling sentence."""

    def prompt(self, sentences: int, depth: float) -> str:
        """The prompt with so many filling sentences."""
        filler = [self.filler(i) for i in range(sentences)]
        cut = round(depth * sentences)
        body = " ".join([*filler[:cut], self.fact, *filler[cut:]])
        return f"{self.introduction}\n{body}\n{self.question}"


def retrieval_rows(name: str, spec: Evaluate, seed: int, model_dir: Path) -> Rows:
    """The documents that a specification asks for, for the tokenizer and context of a model.

    Raises:
        UsageError: a length is more than the model is fed.
        InputError: a length, or all that the model is fed, has no room for the question alone.
    """
    from ..context import context_of

    context, tokenizer, asked = context_of(model_dir, spec.max_length), load_tokenizer(model_dir), spec.retrieval
    lengths = asked.lengths or _with_room(name, tokenizer, context)
    if max(lengths) > context:
        raise UsageError(
            f"{name}: a context of {max(lengths)} tokens does not fit",
            why=f"The model is fed at most {context} (eval.max_length, or what it was built for).",
            fix="Lower eval.retrieval.lengths, or raise eval.max_length if the model allows it.",
        )
    return documents(name, tokenizer, lengths=lengths, depths=asked.depths, samples=asked.samples, seed=seed)


def _with_room(name: str, tokenizer: "PreTrainedTokenizerBase", context: int) -> list[int]:
    """A quarter, a half and all of a context, those with room for the question. Raises InputError if there are none."""
    needed = max(_alone(_MAKE[name](random.Random(n)), _counter(tokenizer)) for n in range(4 * len(_CITIES)))
    lengths = [length for length in (context // 4, context // 2, context) if length >= needed]
    if not lengths:
        raise InputError(
            f"{name} does not fit into a context of {context} tokens",
            why=f"The question alone takes {needed}, more than eval.max_length, or what the model was built for.",
            fix=f"Leave {name} out of eval.tasks.",
        )
    return lengths


def documents(
    name: str, tokenizer: "PreTrainedTokenizerBase", *, lengths: list[int], depths: list[float], samples: int, seed: int
) -> Rows:
    """All documents of a task, sample by sample over the whole grid, so that the first n are spread over it.

    Args:
        name: passkey or needle.
        tokenizer: of transformers; decides how many sentences fit.
        lengths: tokens of prompt and answer.
        depths: 0 to 1.
        samples: documents for every length and depth.
        seed: of keys and haystacks; a document depends on it, on its place in the grid and on nothing else.

    Raises:
        InputError: a length has no room for the question alone.
    """
    make, count = _MAKE[name], _counter(tokenizer)
    rows = Rows()
    for sample in range(samples):
        for length in lengths:
            for depth in depths:
                parts = make(random.Random(f"{seed}-{name}-{length}-{depth}-{sample}"))
                prompt, tokens = _longest(parts, depth, length, count)
                rows.append({"length": length, "depth": depth, "sample": sample, "tokens": tokens,
                             "prompt": prompt, "answer": parts.answer})  # fmt: skip
    return rows


def _passkey(rng: random.Random) -> Parts:
    """Five digits said twice, inside five sentences repeated over and over (Mohtashami and Jaggi 2023)."""
    key = str(rng.randint(10_000, 99_999))
    return Parts(
        _PASSKEY_INTRODUCTION,
        f"The pass key is {key}. Remember it. {key} is the pass key.",
        "What is the pass key? The pass key is",
        key,
        lambda i: _PASSKEY_FILLER[i % len(_PASSKEY_FILLER)],
    )


def _needle(rng: random.Random) -> Parts:
    """Seven digits said once, inside the prose of old books."""
    city, number, haystack = rng.choice(_CITIES), str(rng.randint(1_000_000, 9_999_999)), _sentences()
    start = rng.randrange(len(haystack))
    return Parts(
        _NEEDLE_INTRODUCTION,
        f"The special magic number for {city} is {number}.",
        f"What is the special magic number for {city}? The special magic number for {city} is",
        number,
        lambda i: haystack[(start + i) % len(haystack)],
    )


_MAKE = {"passkey": _passkey, "needle": _needle}


def _counter(tokenizer: "PreTrainedTokenizerBase") -> Count:
    """Tokens of a text, each counted once."""

    @cache
    def count(text: str) -> int:
        return len(tokenizer(text)["input_ids"])

    return count


def _alone(parts: Parts, count: Count) -> int:
    """Tokens of a document without a haystack."""
    return count(f"{parts.prompt(0, 0.0)} {parts.answer}")


def _longest(parts: Parts, depth: float, length: int, count: Count) -> tuple[str, int]:
    """The longest prompt that fits with its answer into `length` tokens, and the tokens of both."""

    def whole(sentences: int) -> int:
        return count(f"{parts.prompt(sentences, depth)} {parts.answer}")

    if whole(0) > length:
        raise InputError(
            f"eval.retrieval.lengths: {length} tokens are too few for a document",
            why=f"The question alone takes {whole(0)}.",
            fix=f"Leave {length} out, or name no lengths: those that the model's context has room for are taken.",
        )
    sentences = 0
    for _ in range(8):  # tokens a sentence so far say how many more will fit; this settles within a few steps
        tokens_each = (whole(sentences) - whole(0)) / sentences if sentences else _TOKENS_A_SENTENCE
        more = int((length - whole(sentences)) / tokens_each)
        sentences = max(0, sentences + more)
        if more == 0:
            break
    while whole(sentences) > length:
        sentences -= 1
    return parts.prompt(sentences, depth), whole(sentences)


@lru_cache(maxsize=1)
def _sentences() -> list[str]:
    """The prose of the books in the shipped sample, sentence by sentence."""
    import pyarrow.parquet as parquet

    path = files("cla_convert") / "data" / "sample.parquet"
    with path.open("rb") as file:
        table = parquet.read_table(file, columns=["text", "source"], filters=[("source", "==", "classic_books")])
    text = " ".join(" ".join(piece.replace("#", " ").split()) for piece in table.column("text").to_pylist())
    return re.split(r"(?<=[.!?]) ", text)
