"""The section `convert`."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ..named import OneOf
from ..registry import INITIALISATIONS, PATTERNS, registry_at
from .section import Count, Section, Size


class Calibration(Section):
    """Settings of `init: calibrated`."""

    tokens: Annotated[Count, Field(gt=0)] | Literal["auto"] = "auto"
    """Calibration tokens, taken from `data`. auto: what takes a minute or less on a data-centre GPU (2.6M for a 135M
    model, fewer for larger ones, 65,536 at least), or minutes on a CPU (40,960, and 24,576 of a larger one)."""
    sequence_length: Annotated[int, Field(ge=16)] | Literal["auto"] = "auto"
    """Length of a calibration sequence; at most what the model was built for. auto: 1024, and 512 on a CPU, whose time
    goes into attention otherwise."""
    steps: int | None = Field(default=None, ge=0)
    """Steps of block reconstruction (docs/how-it-works.md) of each group; 0: the closed form alone. None: 60 of 8192
    tokens, and more where there is more text (369 for 2.6M tokens); on a CPU 20 of 2048 (36 for 40,960 tokens). What a
    step takes grows with the cube of the hidden size, so a large model on a CPU may afford only a few."""


class Convert(Section):
    """Which layers share K/V, and what the shared projections start from."""

    sharing: Annotated[str | list[int] | list[list[int]], OneOf(PATTERNS)] = "cla2-keep-ends"
    """Pattern (docs/sharing.md), a list of groups [[0],[1,2],...], a list of owners, one per layer (kv_source_layers),
    or auto: the map that costs least under `kv_budget`, by measurements on calibration text."""
    kv_budget: float | None = Field(default=None, gt=0, le=1)
    """Share of the source's KV cache that `sharing: auto` may keep, by fewer layers and fewer heads (`kv_heads`)
    together; half of what the heads leave if not given."""
    kv_heads: int | None = Field(default=None, ge=1)
    """KV heads of every layer; a divisor of the source's, whose heads are pooled in the same step in which layers share
    (GQA; 1: MQA). With `sharing: cla1` nothing else is done. None: as many as the source has."""
    init: Annotated[str, OneOf(INITIALISATIONS)] = "calibrated"
    """What the shared projections start from."""
    calibration: Calibration = Calibration()
    """Settings of `init: calibrated`."""
    max_shard_size: Size = 5_000_000_000
    """Largest safetensors shard to write."""

    @property
    def needs_text(self) -> bool:
        """Whether `init` looks at calibration text."""
        return registry_at(INITIALISATIONS).named(self.init).needs_text

    @model_validator(mode="after")
    def _auto(self) -> "Convert":
        if self.kv_budget is not None and self.sharing != "auto":
            raise ValueError("kv_budget is for `sharing: auto`; a pattern or map says itself what it keeps")
        if self.sharing == "auto" and self.init != "calibrated":
            raise ValueError("`sharing: auto` measures calibrated pooling: `init` must be calibrated")
        return self
