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
    pretrained: str | None = None
    """What the name of its PreTrainedModel begins with, where it is not the row's prefix."""
    causal: bool = True
    """Has a causal language model; a language model that exists inside a larger one only has none."""
    oldest: str = OLDEST
    """Release of transformers that its modelling files work with at least."""
    dropout: str | None = "attention_dropout"
    """The attention's own, by its name in it; None where it has none."""
    rope: str = "all"
    """Which layers rotate queries and keys: all, none, or the condition, such as `self.use_rope`."""
    norm_whole: bool = False
    """Queries and keys are normed over all heads at once, not per head."""
    norm_rotated: bool = False
    """Queries and keys are normed after RoPE, not before."""
    queries: tuple[str, ...] = ()
    """Lines for what happens to `query` last of all."""
    functions: tuple[str, ...] = ()
    """Further functions of the module that the attention calls."""
    fused: Fused | None = None
    arguments: tuple[str, ...] = ()
    """Further arguments of the attention function."""
    output: str = "{}"
    """What happens to the output of the attention's last projection."""
    layer_forward: tuple[str, ...] = ()
    """Lines of the layer's `forward`, where that of transformers does not hand all it is given to the attention."""
    experts: bool = False
    """Has experts."""
    stored_apart: bool = True
    """Checkpoints store the experts otherwise than the model holds them."""
    router: str = "TopKRouter"
    """What chooses among them."""
    layer_types: bool = False
    """The configuration lists the kind of each layer, and they may differ."""
    tensor_parallel: tuple[tuple[str, str, str], ...] = ()
    """Lines of `base_model_tp_plan` (name, plan, comment) where splitting the fused projection changes it."""

    @property
    def rotates(self) -> bool:
        """Whether any layer has RoPE."""
        return self.rope != "none"

    @property
    def rotates_if(self) -> str | None:
        """The condition under which a layer rotates, if not all or none do."""
        return None if self.rope in ("all", "none") else self.rope
