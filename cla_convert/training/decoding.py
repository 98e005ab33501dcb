"""Sampling many texts at once, one token a step for all rows, every step a replay of one CUDA graph.

A row never waits for others: where its text ends, the next one begins in the same row, in the same key/value cache, and
sees nothing of what stands before it. So every step of every row counts, no text is left out for being long, and all
rows write at the same place of the cache. What is not the same for all (where a row's text began, what it still has to
read of its prompt) is kept in tensors, so that a step has no branches and can be recorded.

The model is transformers' own, with whatever attention it has; masks come from here, because they depend on more than a
cache knows. Attention goes over a part of the cache that doubles as the rows grow, one graph for each size.
"""

from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache, StaticLayer

from ..console import say
from ..models.kinds import SLIDING
from ..models.shape import AttentionShape
from ..preflight import check_apart

if TYPE_CHECKING:
    from transformers import PreTrainedModel


SMALLEST = 128
"""Cached positions that attention goes over at first; doubled until they are all."""


@dataclass(frozen=True)
class Prompts:
    """What texts begin with, and in which order a row takes them."""

    tokens: Tensor
    """int64 [n, longest], padded."""
    lengths: Tensor
    """int64 [n]."""
    after: Tensor
    """Which prompt is the next in the same row, int64 [n]."""
    opens: Tensor
    """Whether it begins a text; otherwise the text before goes on behind it (a turn of a conversation), bool [n]."""

    def to(self, device: str) -> "Prompts":
        """The same on a device."""
        return Prompts(*(getattr(self, field.name).to(device) for field in fields(self)))


@dataclass(frozen=True)
class Choice:
    """How a token is chosen."""

    vocabulary: int
    """Tokens there are: rows of the embedding beyond them are there for alignment only."""
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def restrict(self, scores: Tensor) -> Tensor:
        """-inf for the tokens [n, vocabulary] that top-k and top-p leave out."""
        if 0 < self.top_k < scores.shape[-1]:
            least = scores.topk(self.top_k).values[:, -1:]
            scores = scores.masked_fill(scores < least, -torch.inf)
        if self.top_p < 1:
            ordered = scores.sort(descending=True).values
            probabilities = ordered.softmax(-1)
            beyond = probabilities.cumsum(-1) - probabilities >= self.top_p
            least = ordered.masked_fill(beyond, torch.inf).amin(-1, keepdim=True)
            scores = scores.masked_fill(scores < least, -torch.inf)
        return scores


@dataclass(frozen=True)
class Drawn:
    """Rows of texts, each filled to its end; the last text of a row is cut there."""

    tokens: Tensor
    """int64 [rows, length]."""
    logprobs: Tensor
    """Of sampled tokens under the model itself, at temperature 1; 0 for those of prompts. float32 [rows, length]."""
    sampled: Tensor
    """Whether a token was sampled, bool [rows, length]."""
    begins: Tensor
    """Whether a text begins with a token, bool [rows, length]."""


class Decoder:
    """Draws `rows` rows of `length` tokens as often as asked."""

    def __init__(
        self,
        model: "PreTrainedModel",
        shape: AttentionShape,
        rows: int,
        length: int,
        ends: Collection[int],
        choice: Choice,
        *,
        record: bool = True,
    ) -> None:
        """Allocate the cache.

        Args:
            model: a causal language model of transformers on its device, in eval mode.
            shape: of its attention.
            rows: texts that are written at the same time.
            length: tokens of a row.
            ends: tokens that end a text when they are sampled.
            choice: how a token is chosen.
            record: on a GPU, whether to record steps as CUDA graphs.

        Raises:
            InputError: the model has layers that no mask keeps from seeing the text before.
        """
        check_apart(shape, "Sampling", "Name a text instead.")
        device = model.device
        self._model, self._choice, self._device = model, choice, device
        self._rows, self._length = rows, length
        self._windowed = [kind.startswith(SLIDING) for kind in shape.kinds]
        self._window = shape.sliding_window
        self._sizes = _sizes(length)
        self._ends = torch.tensor(sorted(ends), dtype=torch.int64, device=device)
        self._at = torch.zeros(1, dtype=torch.int64, device=device)
        layers = [_Layer(length, self._at) for _ in shape.kinds]
        self._layers, self._cache = layers, Cache(layers=list(layers))
        self._tokens, self._start, self._prompt, self._read = (
            torch.zeros(size, dtype=torch.int64, device=device) for size in ((rows, length), rows, rows, rows)
        )
        self._logprobs = torch.zeros(rows, length, device=device)
        self._sampled, self._begins = (torch.zeros(rows, length, dtype=torch.bool, device=device) for _ in range(2))
        self._generator = torch.Generator(device)
        self._prompts: Prompts | None = None
        self._record = record and device.type == "cuda"
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}

    @torch.inference_mode()
    def draw(self, prompts: Prompts, first: Tensor, seed: int, bar: Any = None) -> Drawn:
        """Fill the rows; the same for the same arguments on the same device. The next call overwrites the result.

        Args:
            prompts: always so many and so long for one decoder.
            first: the prompt that each row begins with, int64 [rows].
            seed: of the sampling.
            bar: moved by the rows at every step.
        """
        prompts = prompts.to(str(self._device))
        if self._prompts is None:
            self._prompts = prompts
            self._begin(first)
            if self._record:
                self._record_steps()
        for field in fields(Prompts):
            getattr(self._prompts, field.name).copy_(getattr(prompts, field.name))
        self._begin(first)
        self._generator.manual_seed(seed)
        for at in range(self._length - 1):
            size = next(size for size in self._sizes if size > at)
            if graph := self._graphs.get(size):
                graph.replay()
            else:
                self._step(size)
            if bar is not None:
                bar.update(self._rows)
        return Drawn(self._tokens, self._logprobs, self._sampled, self._begins)

    def _begin(self, first: Tensor) -> None:
        """Put every row at its first token."""
        assert self._prompts is not None
        for state in (self._at, self._start, self._read, self._logprobs, self._sampled, self._begins):
            state.zero_()
        self._prompt.copy_(first)
        self._tokens[:, 0] = self._prompts.tokens[self._prompt, 0]
        self._begins[:, 0] = True

    def _record_steps(self) -> None:
        """Record a step over each size of the cache; if one cannot be recorded, steps run one kernel at a time."""
        stream, pool = torch.cuda.Stream(self._device), torch.cuda.graph_pool_handle()
        with torch.cuda.device(self._device):
            try:
                for size in self._sizes:
                    self._at.zero_()
                    stream.wait_stream(torch.cuda.current_stream())
                    with torch.cuda.stream(stream):
                        self._step(size)  # allocates what libraries allocate once
                    torch.cuda.current_stream().wait_stream(stream)
                    graph = torch.cuda.CUDAGraph()
                    graph.register_generator_state(self._generator)
                    with torch.cuda.graph(graph, pool=pool, stream=stream):
                        self._step(size)
                    self._graphs[size] = graph
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                torch.cuda.synchronize()
                self._graphs.clear()
                self._generator = torch.Generator(self._device)
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                say(f"this model's steps cannot be recorded as CUDA graphs, sampling is slower without: {reason}")

    def _step(self, size: int) -> None:
        """Read the tokens at `at`, write the next ones; attention goes over the first `size` positions."""
        prompts, at, after = self._prompts, self._at, self._at + 1
        assert prompts is not None
        fed = self._tokens.index_select(1, at)
        drawn, logprobs = self._choose(self._forward(fed, size))
        following = prompts.after[self._prompt]
        was_sampled = self._sampled.index_select(1, at)[:, 0]
        own = self._read + 1 >= prompts.lengths[self._prompt]  # the prompt is behind us: the token drawn counts
        over = was_sampled & self._is_end(fed[:, 0])
        # The separator that ends a text is the one that the next begins with.
        over |= own & self._is_end(drawn) & (drawn == prompts.tokens[following, 0])
        self._prompt.copy_(torch.where(over, following, self._prompt))
        self._read.copy_((self._read + 1).masked_fill(over, 0))
        begins = over & prompts.opens[self._prompt]
        self._start.copy_(torch.where(begins, after, self._start))
        prompted = self._read < prompts.lengths[self._prompt]
        given = prompts.tokens[self._prompt, self._read.clamp(max=prompts.tokens.shape[1] - 1)]
        for state, value in (
            (self._tokens, torch.where(prompted, given, drawn)),
            (self._logprobs, logprobs.masked_fill(prompted, 0)),
            (self._sampled, ~prompted),
            (self._begins, begins),
        ):
            state.index_copy_(1, after, value[:, None])
        self._at.add_(1)

    def _forward(self, fed: Tensor, size: int) -> Tensor:
        """Logits behind the tokens [rows, 1], float32 [rows, vocabulary]."""
        for layer in self._layers:
            layer.size = size
        output = self._model(
            input_ids=fed,
            attention_mask=self._masks(size),
            position_ids=(self._at - self._start)[:, None],
            past_key_values=self._cache,
            use_cache=True,
        )
        return output.logits[:, -1, : self._choice.vocabulary].float()

    def _masks(self, size: int) -> Any:
        """What each row sees of the first `size` positions, to be added to attention scores; by kind if need be."""
        slots = torch.arange(size, device=self._device)
        full = (slots >= self._start[:, None]) & (slots <= self._at)
        near = full & (slots > self._at - self._window) if self._window else full
        full_mask, near_mask = (
            torch.zeros(self._rows, 1, 1, size, dtype=self._model.dtype, device=self._device).masked_fill_(
                ~seen[:, None, None], -torch.inf
            )
            for seen in (full, near)
        )
        if all(self._windowed):
            return near_mask
        # A model whose layers are of two kinds takes a mask for each; one that knows of no kinds takes a mask alone.
        return {"full_attention": full_mask, SLIDING: near_mask} if any(self._windowed) else full_mask

    def _choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [rows] drawn from logits, and their log-probabilities before temperature, top-k and top-p."""
        choice = self._choice
        scores = choice.restrict(logits / choice.temperature if choice.temperature != 1 else logits)
        # argmax of p / e with e ~ Exp(1) is a draw from p, and needs no second pass over cumulated probabilities.
        noise = torch.empty_like(scores).exponential_(generator=self._generator).log_()
        drawn = torch.sub(scores, noise, out=noise).argmax(-1)
        return drawn, logits.gather(1, drawn[:, None])[:, 0] - logits.logsumexp(-1)

    def _is_end(self, tokens: Tensor) -> Tensor:
        return (tokens[:, None] == self._ends).any(1)


class _Layer(StaticLayer):
    """Keys and values of one layer: a step writes at `at`, attention reads the first `size` positions."""

    def __init__(self, length: int, at: Tensor) -> None:
        super().__init__(max_cache_len=length)
        self.size, self._at = length, at
        self._kept: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write one position, return all of the current size."""
        if self._kept is None:
            self._kept = self._room(key_states), self._room(value_states)
        keys, values = self._kept
        keys.index_copy_(2, self._at, key_states)
        values.index_copy_(2, self._at, value_states)
        return keys[:, :, : self.size], values[:, :, : self.size]

    def _room(self, states: Tensor) -> Tensor:
        rows, heads, _, channels = states.shape
        return states.new_zeros(rows, heads, self.max_cache_len, channels)

    def get_seq_length(self) -> int:
        """Nothing that a model may rely on: positions and masks are given to it."""
        return 0


def _sizes(length: int) -> list[int]:
    """Parts of the cache that attention goes over, ascending; the last is all of it."""
    sizes = [SMALLEST]
    while sizes[-1] < length:
        sizes.append(sizes[-1] * 2)
    return [*sizes[:-1], length]
