"""How much calibration is worth: tokens of text, and reconstruction steps for each group. Imports no torch."""

from dataclasses import dataclass

CPU_TOKENS = 24_576
"""Minutes for a 135M model on two cores."""
_LEAST_GPU_TOKENS = 65_536
_TOKEN_PARAMETERS = 3.5e14
"""Tokens times parameters of the model that take an H100 about 40 s: 2.6M tokens of a 135M model. The curve of quality
over text is steep until there (docs/how-it-works.md); an 8B model keeps to the least."""
_CPU_STEPS, _CPU_STEP = 20, 2048
_GPU_STEPS, _GPU_STEP = 60, 8192


@dataclass(frozen=True)
class Effort:
    """How much work block reconstruction may be."""

    steps: int
    """Of each group."""
    tokens_per_step: int

    @classmethod
    def for_text(cls, tokens: int, device: str) -> "Effort":
        """For so much calibration text. On a GPU, one step more for every step's worth of text beyond the least."""
        if not device.startswith("cuda"):
            return cls(_CPU_STEPS, _CPU_STEP)
        return cls(_GPU_STEPS + max(0, tokens - _LEAST_GPU_TOKENS) // _GPU_STEP, _GPU_STEP)


def affordable_tokens(parameters: int, device: str) -> int:
    """Calibration tokens that a model of so many parameters can afford on a device: what `tokens: auto` means."""
    if not device.startswith("cuda"):
        return CPU_TOKENS
    return max(_LEAST_GPU_TOKENS, int(_TOKEN_PARAMETERS / parameters))
