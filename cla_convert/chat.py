"""Talking to a model, or to two at once: what a conversion cost, as a person hears it.

Every model keeps its own conversation, because its own answers are part of it. Without a chat template a model
continues the text of the last line, and no conversation is kept.
"""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from io import TextIOWrapper
from pathlib import Path
from typing import Any, TextIO

from .console import say, warn
from .errors import InputError, UsageError, first_line
from .files import load_json
from .models.export import load_tokenizer
from .models.shape import positions_of
from .preflight import check_tokenizer
from .surrogates import replaced

RESET = "/reset"


@dataclass(frozen=True)
class Manner:
    """How models answer."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    """0: greedy, so that differences between models are theirs."""
    system: str | None = None
    """What the conversation begins with."""


@dataclass
class Speaker:
    """A model that answers, and the conversation it has had."""

    name: str
    model: Any
    tokenizer: Any
    manner: Manner
    turns: list[dict[str, str]] = field(default_factory=list)

    @classmethod
    def load(cls, name: str, folder: Path, *, device: str, dtype: str, manner: Manner) -> "Speaker":
        """Load a model folder, plain or CLA; code in it is never run.

        Raises:
            UsageError: there is a system prompt, and the chat template has no place for one.
            InputError: the model cannot be loaded, or its tokenizer is not its own.
        """
        from .models.placement import load_where_it_fits

        tokenizer = load_tokenizer(folder)
        check_tokenizer(tokenizer, load_json(folder / "config.json"))
        _check_system(name, tokenizer, manner.system)
        if not manner.system:  # one that takes it works
            _drop_broken_template(name, tokenizer)
        return cls(name, load_where_it_fits(folder, dtype=dtype, device=device), tokenizer, manner)

    @property
    def converses(self) -> bool:
        """Whether there is a chat template."""
        return bool(self.tokenizer.chat_template)

    def answer(self, text: str) -> str:
        """Answer, printing word by word, and return what was printed.

        Raises InputError for tokens that the model does not know, and where the chat template fails; then the question
        is forgotten.
        """
        import torch

        from .models.scoring import check_ids

        before = list(self.turns)
        try:
            prompt = self._prompt(text)
            check_ids(self.model, prompt["input_ids"])
        except InputError:
            self.turns[:] = before
            raise
        sampling = {"do_sample": True, "temperature": self.manner.temperature} if self.manner.temperature else {}
        streamer = _stream(self.tokenizer)
        with torch.inference_mode():
            self.model.generate(
                **prompt.to(self.model.device), max_new_tokens=self.manner.max_new_tokens, streamer=streamer,
                pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id or 0,
                num_beams=1, num_return_sequences=1,  # a generation config may ask for more, which cannot be streamed
                **(sampling or {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}),
            )  # fmt: skip
        if self.converses:
            self.turns.append({"role": "assistant", "content": streamer.text.strip()})
        if not streamer.text.strip():
            say(f"({self.name} says nothing: it ends its answer at once)")
        return streamer.text

    def _prompt(self, text: str) -> Any:
        """Token ids and mask of the conversation so far; what the context has no room for is forgotten."""
        if not self.converses:
            return self.tokenizer(text, return_tensors="pt")
        self.turns.append({"role": "user", "content": text})
        longest = getattr(self.model.config, "max_position_embeddings", None)
        while True:
            system = [{"role": "system", "content": self.manner.system}] if self.manner.system else []
            try:
                ids = self.tokenizer.apply_chat_template(
                    system + self.turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
                )
            except Exception as error:  # a template is a program of the model's
                raise InputError(
                    f"The chat template of {self.name} failed", first_line(error), f"{RESET} begins anew."
                ) from error
            if not longest or len(self.turns) == 1 or ids["input_ids"].shape[1] + self.manner.max_new_tokens <= longest:
                return ids
            del self.turns[:2]  # a question and its answer


def _check_system(name: str, tokenizer: Any, system: str | None) -> None:
    if not system:
        return
    turns = [{"role": "system", "content": system}, {"role": "user", "content": "Hello"}]
    why = "It has no chat template."
    try:
        if tokenizer.chat_template and system.strip() in tokenizer.apply_chat_template(turns, tokenize=False):
            return
        why = "Its chat template leaves system prompts out." if tokenizer.chat_template else why
    except Exception as error:  # a template may raise what it likes: Gemma 2's refuses the role
        why = f"Its chat template says: {first_line(error)}"
    raise UsageError(f"{name} takes no system prompt", why, "Leave --system out, and say it in the first question.")


def _drop_broken_template(name: str, tokenizer: Any) -> None:
    """Do without a chat template that refuses the simplest question; says so."""
    if not tokenizer.chat_template:
        return
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
    except Exception as error:  # as above
        warn(f"the chat template of {name} does not work ({first_line(error)}): {name} goes on without it")
        tokenizer.chat_template = None


def check_length(name: str, folder: Path, tokens: int) -> None:
    """Raise UsageError if an answer may be longer than all that the model in `folder` was built for."""
    longest = positions_of(load_json(folder / "config.json"))
    if longest and tokens >= longest:
        raise UsageError(
            f"--max-new-tokens {tokens} leaves no room for a question",
            why=f"{name} was built for {longest} tokens, question and answer together.",
            fix=f"Give {longest // 2} or less.",
        )


def chat(speakers: list[Speaker], lines: Iterable[str]) -> None:
    """Let every speaker answer every line; `/reset` begins anew. Answers go to stdout.

    A line that a model cannot take is forgotten, and the conversation goes on. Raises InputError in the end if there
    was one.
    """
    unanswered = 0
    if not all(speaker.converses for speaker in speakers):
        say("no chat template: each line is continued as text")
    for line in lines:
        if not (text := replaced(line.strip(), "a line")):  # a pipe may be no UTF-8
            continue
        if text == RESET:
            for speaker in speakers:
                speaker.turns.clear()
            continue
        for speaker in speakers:
            if len(speakers) > 1:
                print(f"[{speaker.name}] ", end="", flush=True)
            try:
                speaker.answer(text)
            except InputError as error:
                warn(str(error))
                unanswered += 1
            print(flush=True)
    if unanswered:
        raise InputError(f"{unanswered} {'answer is' if unanswered == 1 else 'answers are'} missing", "See above.")


def lines_of(stream: TextIO) -> Iterator[str]:
    """Lines as they are typed, after a prompt where somebody sits there to see it (stderr)."""
    if isinstance(stream, TextIOWrapper):
        stream.reconfigure(errors="surrogateescape")  # a pipe may be no UTF-8, which is an error in most locales
    asks = stream.isatty()
    while True:
        if asks:
            print("> ", end="", file=sys.stderr, flush=True)
        if not (line := stream.readline()):
            return
        yield line


def _stream(tokenizer: Any) -> Any:
    """What `generate` hands its tokens to: prints whole words as they come, and keeps them in `text`."""
    from transformers import TextStreamer

    class Stream(TextStreamer):
        text = ""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            self.text += text
            print(text, end="", flush=True)

    return Stream(tokenizer, skip_prompt=True, skip_special_tokens=True)
