"""How much text is worth: tokens and reconstruction steps of calibration, passes of training. Imports no torch."""

from dataclasses import dataclass

MANY_PASSES = 4
"""Over a text: so many teach as new text does, about (Muennighoff et al. 2023, arXiv 2305.16264)."""


@dataclass(frozen=True)
class _Means:
    """What a kind of device can afford. Evidence: docs/how-it-works.md."""

    least: int
    """Tokens of calibration text, however large the model."""
    most: int
    """Likewise, however small."""
    token_parameters: float
    """Tokens times parameters of the model that are worth their time, between the two."""
    steps: int
    """Steps of block reconstruction of a group for the least text."""
    step: int
    """Tokens of a step."""
    more: int
    """Steps more for every further step's worth of text."""
    length: int
    """Tokens of a row: attention over longer ones would take most of a CPU's time."""


_GPU = _Means(least=65_536, most=2_600_000, token_parameters=3.5e14, steps=60, step=8192, more=1, length=1024)
"""A 135M model gets the most, 40 s of an H100, until where the curve of quality over text is steep; 8B the least."""
_CPU = _Means(least=24_576, most=40_960, token_parameters=5.53e12, steps=20, step=2048, more=2, length=512)
"""A 135M model gets the most, four and a half minutes of two slow cores."""


_STREAMS, _OF_MEMORY = 11, 0.5
"""What is kept of a token where three layers share: residual streams in bfloat16; and the share of a GPU for them."""


@dataclass(frozen=True)
class Effort:
    """How much work block reconstruction may be."""

    steps: int
    """Of each group."""
    tokens_per_step: int

    @classmethod
    def for_text(cls, tokens: int, device: str) -> "Effort":
        """For so much calibration text."""
        means = _means(device)
        return cls(means.steps + means.more * (max(0, tokens - means.least) // means.step), means.step)


def affordable_tokens(parameters: int, device: str, *, width: int = 0, memory: int | None = None) -> int:
    """Calibration tokens that a model can afford on a device: what `tokens: auto` means.

    Args:
        parameters: of the model.
        device: where the conversion runs.
        width: hidden size of the model.
        memory: bytes of the GPU. Residual streams that do not fit there are read from main memory all the time, which
            takes dozens of times as long.
    """
    means = _means(device)
    fitting = int(_OF_MEMORY * memory / (_STREAMS * 2 * width)) if memory and width else means.most
    return min(means.most, max(means.least, min(fitting, int(means.token_parameters / parameters))))


def affordable_length(device: str) -> int:
    """Tokens of a calibration row: what `sequence_length: auto` means."""
    return _means(device).length


def _means(device: str) -> _Means:
    return _GPU if device.startswith("cuda") else _CPU
