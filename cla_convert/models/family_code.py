"""What differs between the modelling files of the families: a row's part that fills the two templates."""

from dataclasses import dataclass

OLDEST, NEWEST = "5.16", "5.24"
"""Releases of transformers that the shipped code was tested with (`make test-versions`)."""

FROM_CONFIG = 'sliding_window=getattr(self.config, "sliding_window", None)'
FROM_ATTENTION = "sliding_window=self.sliding_window"


@dataclass(frozen=True)
class Fused:
    """Sizes of q, k and v where the family has one projection for all three; the CLA attention has each apart."""

    queries: str
    """Arguments of the `nn.Linear` that makes the queries."""
    keys: str
    """Arguments of those that make keys and values."""


@dataclass(frozen=True)
class Code:
    """Names in the family's transformers module, and how its attention is unlike Llama's."""

    name: str
    """As people write it."""
    module: str | None = None
    """`transformers.models.<module>.modeling_<module>`, where it is not the model type."""
    layer: str = "DecoderLayer"
    model: str = "Model"
    config: str = "Config"
    dropout: str = "attention_dropout"
    """The attention's own, by its name in it."""
    rope: str = "all"
    """Which layers rotate queries and keys: all, some (those with `use_rope`) or none."""
    norm_whole: bool = False
    """Queries and keys are normed over all heads at once, not per head."""
    fused: Fused | None = None
    arguments: tuple[str, ...] = ()
    """Further arguments of the attention function."""
    output: str = "{}"
    """What happens to the output of the attention's last projection."""
    experts: bool = False
    """Has experts, which checkpoints store one by one."""
    layer_types: bool = False
    """The configuration lists the kind of each layer, and they may differ."""
    tensor_parallel: tuple[tuple[str, str, str], ...] = ()
    """Lines of `base_model_tp_plan` (name, plan, comment) where splitting the fused projection changes it."""
