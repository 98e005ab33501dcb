"""What conversion must know of a family of models: the columns of the table in `family_rows`. Imports no torch."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from . import kinds
from .family_code import Code
from .kinds import KindRule

CODE_PACKAGE = f"{__package__}.generated"
CODE_FOLDER = Path(__file__).parent / "generated"


class Place(NamedTuple):
    """Where a tensor of a layer belongs."""

    layer: int
    module: str
    """Name inside the attention, such as `k_proj`; empty for the rest of the layer."""
    part: str
    """What follows: `weight` or `bias`; empty for a parameter of the attention itself."""


class LayerNorms(NamedTuple):
    """Names of the norms of a layer, by where they stand; None where a family has none."""

    before_attention: str | None = "input_layernorm"
    before_mlp: str | None = "post_attention_layernorm"
    after_attention: str | None = None
    """On what the attention adds to the residual stream."""
    after_mlp: str | None = None
    """On what the MLP adds."""


PRE_NORM = LayerNorms()
"""As in Llama: a norm before each branch."""
SANDWICH = LayerNorms(
    "input_layernorm", "pre_feedforward_layernorm", "post_attention_layernorm", "post_feedforward_layernorm"
)
"""As in Gemma 2 and 3: before and after."""
POST_NORM = LayerNorms(None, None, "post_attention_layernorm", "post_feedforward_layernorm")
"""As in OLMo 2: after each branch only."""


class Requirement(NamedTuple):
    """What a config.json must say for the family's CLA code to fit."""

    key: str
    value: bool
    """Also what transformers assumes where the key is missing."""
    why: str
    fix: str


@dataclass(frozen=True)
class Family:
    """One row: the transformers family and what conversion must know of it.

    The two code files `configuration_<cla_type>.py` and `modeling_<cla_type>.py` in `code_folder` are made from the row
    and copied into every output. In the CLA model q, k and v are always separate, as `q_proj`, `k_proj` and `v_proj`.
    """

    model_type: str
    class_prefix: str
    """The CLA classes are Cla<prefix>Config, ...DecoderLayer, ...Model and ...ForCausalLM."""
    code: Code
    """What its modelling files differ in."""
    kinds: KindRule = kinds.full
    """config.json (with `defaults`) -> attention kind of each layer."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What transformers assumes where a config.json leaves it out."""
    layers: str = "model.layers"
    """Name of the list of layers."""
    attention: str = "self_attn"
    """Name of the attention inside a layer."""
    o_proj: str = "o_proj"
    """Name of the output projection inside the attention."""
    qk_norm: bool = False
    """Whether queries and keys are normed."""
    qk_norm_names: tuple[str, str] = ("q_norm", "k_norm")
    """Names of these norms inside the attention."""
    sinks: bool = False
    """Whether each query head has a logit that no key belongs to (`sinks`)."""
    gated: bool = False
    """Whether each channel of a head is multiplied by a gate, whose rows follow those of the head in `q_proj`."""
    adjacent_pairs: bool = False
    """Whether RoPE turns neighbouring channels (0 and 1, 2 and 3, ...) together; else those of two halves."""
    half_tables: bool = False
    """Whether the tables of RoPE hold one number for both channels of a pair; else each of them twice."""
    parallel: bool = False
    """Whether the MLP reads what the attention reads, and both are added at once."""
    mlp: str = "mlp"
    """Name of the MLP, or what holds the experts, inside a layer."""
    fused: str | None = None
    """Name inside the attention of one projection whose rows are those of q, then k, then v."""
    norms: LayerNorms = PRE_NORM
    """Names of a layer's norms."""
    keys: Mapping[str, str] = field(default_factory=dict)
    """Usual key of a config.json -> this family's name for it."""
    requires: tuple[Requirement, ...] = ()
    code_folder: Path = CODE_FOLDER
    """Where its code files lie: the folder of `code_package`."""
    code_package: str = CODE_PACKAGE
    """What Python imports them from."""
    experts: bool = False
    """Whether its layers have experts (a mixture), which servers treat apart."""
    state: Callable[[Mapping[str, Any]], tuple[int, int]] | None = None
    """Of a hybrid: what each layer without keys and values keeps of a text (`models/states.py`)."""

    @property
    def cla_type(self) -> str:
        """`model_type` of the converted model."""
        return f"cla_{self.model_type}"

    @property
    def code_files(self) -> list[Path]:
        """The modelling code that ships in an output."""
        return [self.code_folder / f"{kind}_{self.cla_type}.py" for kind in ("configuration", "modeling")]

    @property
    def attention_modules(self) -> tuple[str, ...]:
        """Names inside the attention of all that calibrated pooling may change."""
        norms = self.qk_norm_names if self.qk_norm else ()
        return ("q_proj", "k_proj", "v_proj", self.o_proj, *norms, *(("sinks",) if self.sinks else ()))

    def norm_name(self, of: str) -> str:
        """Name inside the attention of the norm of the queries (`q`) or keys (`k`)."""
        return self.qk_norm_names["qk".index(of)]

    @property
    def kv_modules(self) -> tuple[str, ...]:
        """What owners have and consumers lack, by its name inside the attention."""
        return ("k_proj", "v_proj", *(self.qk_norm_names[1:] if self.qk_norm else ()))

    def class_name(self, kind: str) -> str:
        """`class_name("Config")` -> `ClaLlamaConfig`."""
        return f"Cla{self.class_prefix}{kind}"

    def auto_map(self) -> dict[str, str]:
        """The `auto_map` of config.json: which of the shipped classes the Auto classes load."""
        config, modeling = (file.stem for file in self.code_files)
        return {
            "AutoConfig": f"{config}.{self.class_name('Config')}",
            "AutoModel": f"{modeling}.{self.class_name('Model')}",
            "AutoModelForCausalLM": f"{modeling}.{self.class_name('ForCausalLM')}",
            "AutoModelForSequenceClassification": f"{modeling}.{self.class_name('ForSequenceClassification')}",
        }

    def key(self, usual: str) -> str:
        """This family's name for a usual key of a config.json."""
        return self.keys.get(usual, usual)

    @property
    def output_weight(self) -> str:
        """Name of W_O inside a layer."""
        return f"{self.attention}.{self.o_proj}.weight"

    def tensor(self, layer: int, module: str, part: str = "weight") -> str:
        """`tensor(3, "k_proj")` -> `model.layers.3.self_attn.k_proj.weight`."""
        return f"{self.layers}.{layer}.{self.attention}.{module}" + (f".{part}" if part else "")

    def place(self, name: str) -> Place | None:
        """The reverse of `tensor`, for any tensor of a layer; None outside the layers."""
        match = re.match(rf"{re.escape(self.layers)}\.([0-9]{{1,9}})\.(.*)", name)
        if match is None:
            return None
        inside = re.fullmatch(rf"{self.attention}\.(\w+)(?:\.(\w+))?", match[2])
        return Place(int(match[1]), *(inside[1], inside[2] or "") if inside else ("", match[2]))
