"""The table of supported families: where their attention lies, and the CLA code that replaces it. Imports no torch.

A new family is one row here and a tiny case in tests/tiny.py; `python -m cla_convert.models.generate` then writes its
two code files.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import InputError
from . import kinds
from .family_code import FROM_ATTENTION, FROM_CONFIG, Code, Fused
from .kinds import KindRule

if TYPE_CHECKING:
    from transformers import PreTrainedModel


CODE_PACKAGE = f"{__package__}.generated"
CODE_FOLDER = Path(__file__).parent / "generated"
KV_MODULES = ("k_proj", "v_proj", "k_norm")
"""What owners have and consumers lack, by its name inside the attention."""


class Place(NamedTuple):
    """Where a tensor of a layer belongs."""

    layer: int
    module: str
    """Name inside the attention, such as `k_proj`; empty for the rest of the layer."""
    part: str
    """What follows: `weight` or `bias`."""


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
    """Whether the attention has `q_norm` and `k_norm`."""
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
        return ("q_proj", "k_proj", "v_proj", self.o_proj, *(("q_norm", "k_norm") if self.qk_norm else ()))

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
        return f"{self.layers}.{layer}.{self.attention}.{module}.{part}"

    def place(self, name: str) -> Place | None:
        """The reverse of `tensor`, for any tensor of a layer; None outside the layers."""
        match = re.match(rf"{re.escape(self.layers)}\.([0-9]{{1,9}})\.(.*)", name)
        if match is None:
            return None
        inside = re.fullmatch(rf"{self.attention}\.(\w+)\.(\w+)", match[2])
        return Place(int(match[1]), inside[1] if inside else "", inside[2] if inside else match[2])


_CAUSAL = Requirement(
    "use_bidirectional_attention", False,
    "It attends in both directions (an encoder such as EmbeddingGemma), so it has no KV cache to make smaller.",
    "Give a causal language model.",
)  # fmt: skip
_MULTI_QUERY = Requirement(
    "multi_query", True,
    "With multi_query: false this family is multi-head attention, and interleaves the heads of q, k and v.",
    "Give a multi-query checkpoint (SantaCoder, StarCoder).",
)  # fmt: skip
_MINISTRAL = Requirement(
    "layer_types", False,
    "With layer_types, transformers loads a config.json of type 'mistral' as Ministral, whose layers see all of the "
    "text or a window in turns. There is no CLA code for that family.",
    "Supported are Mistral models all of whose layers attend alike.",
)  # fmt: skip
_QWEN = {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28}
_GEMMA = {"num_key_value_heads": 4, "head_dim": 256, "sliding_window": 4096}
_GPT2_KEYS = {"num_hidden_layers": "n_layer", "num_attention_heads": "n_head", "hidden_size": "n_embd"}

_PHI3_SIZES = Fused(
    "config.hidden_size, config.num_attention_heads * self.head_dim, bias=False",
    "config.hidden_size, config.num_key_value_heads * self.head_dim, bias=False",
)
_PHI3_PLAN = (
    ("self_attn.q_proj", "colwise", ""),
    ("self_attn.k_proj", "colwise", ""),
    ("self_attn.v_proj", "colwise", ""),
    ("self_attn.o_proj", "rowwise", ""),
    ("mlp.gate_up_proj", "colwise_gather_output", "as in Phi-3: the output is chunked"),
    ("mlp.down_proj", "rowwise_split_input", ""),
)
_DROPPED_OUT = "nn.functional.dropout({}, p=self.residual_dropout, training=self.training)"

_ROWS = [
    Family("llama", "Llama", Code("Llama")),
    Family(
        "mistral", "Mistral", Code("Mistral", arguments=(FROM_CONFIG,)), kinds.windowed,
        {"num_key_value_heads": 8, "sliding_window": 4096}, requires=(_MINISTRAL,),
    ),
    Family(
        "qwen2", "Qwen2", Code("Qwen2", arguments=(FROM_ATTENTION,), layer_types=True), kinds.late_windows, _QWEN,
    ),
    Family(
        "qwen3", "Qwen3", Code("Qwen3", arguments=(FROM_ATTENTION,), layer_types=True), kinds.late_windows,
        _QWEN | {"head_dim": 128}, qk_norm=True,
    ),
    Family(
        "gemma2", "Gemma2",
        Code("Gemma 2", arguments=(FROM_ATTENTION, "softcap=self.attn_logit_softcapping"), layer_types=True),
        kinds.alternating, _GEMMA, norms=SANDWICH, requires=(_CAUSAL,),
    ),
    Family(
        "gemma3_text", "Gemma3",
        Code(
            "Gemma 3", module="gemma3", model="TextModel", config="TextConfig", arguments=(FROM_ATTENTION,),
            layer_types=True,
        ),
        kinds.five_to_one, _GEMMA | {"num_attention_heads": 8, "hidden_size": 2304},
        qk_norm=True, norms=SANDWICH, requires=(_CAUSAL,),
    ),
    Family(
        "phi3", "Phi3",
        Code("Phi-3", fused=_PHI3_SIZES, arguments=(FROM_CONFIG,), tensor_parallel=_PHI3_PLAN),
        kinds.windowed, fused="qkv_proj",
    ),
    Family("olmo2", "Olmo2", Code("OLMo 2", norm_whole=True), qk_norm=True, norms=POST_NORM),
    Family("granite", "Granite", Code("Granite")),
    Family(
        "smollm3", "SmolLM3", Code("SmolLM3", rope="some", arguments=(FROM_ATTENTION,), layer_types=True),
        kinds.some_without_rope, {"num_key_value_heads": 4, "no_rope_layer_interval": 4},
    ),
    Family(
        "starcoder2", "Starcoder2", Code("StarCoder2", arguments=(FROM_CONFIG,), output=_DROPPED_OUT),
        kinds.windowed, {"num_key_value_heads": 2},
    ),
    Family(
        "gpt_bigcode", "GPTBigCode",
        Code(
            "GPTBigCode", layer="Block", dropout="attn_dropout", rope="none", output="self.resid_dropout({})",
            fused=Fused("self.embed_dim, self.embed_dim", "self.embed_dim, self.kv_dim"),
        ),
        defaults={"num_key_value_heads": 1}, layers="transformer.h", attention="attn",
        o_proj="c_proj", fused="c_attn", norms=LayerNorms("ln_1", "ln_2"), keys=_GPT2_KEYS, requires=(_MULTI_QUERY,),
    ),
    Family(
        "mixtral", "Mixtral", Code("Mixtral", arguments=(FROM_CONFIG,), experts=True), kinds.windowed,
        {"num_key_value_heads": 8},
    ),
    Family(
        "qwen3_moe", "Qwen3Moe", Code("Qwen3 MoE", arguments=(FROM_ATTENTION,), experts=True),
        kinds.optional_window, {"num_key_value_heads": 4, "sliding_window": 4096}, qk_norm=True,
    ),
]  # fmt: skip
FAMILIES = {family.model_type: family for family in _ROWS}

_SHARES_ALREADY = "Its last layers read the K/V of earlier ones as it is."
_LATENT = "It caches one compressed vector per token (multi-head latent attention) instead of keys and values."
REFUSED = {
    "falcon": "Its attention is code of its own in transformers, outside the attention interface that CLA code calls, "
    "and it copies K/V to every query head before caching them, so its cache is as large as with multi-head attention.",
    "gemma3n": _SHARES_ALREADY,
    "gemma3n_text": _SHARES_ALREADY,
    "gemma4": _SHARES_ALREADY,
    "gemma4_text": _SHARES_ALREADY,
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
}
"""Families that people ask for, and why there is no row for them."""


def family_like(model_type: str) -> Family:
    """The family of a plain or CLA model; for any other, Llama's, whose names are the usual ones."""
    return FAMILIES.get(model_type.removeprefix("cla_"), FAMILIES["llama"])


def decoder_layers(model: "PreTrainedModel") -> Any:
    """The list of decoder layers of a loaded model, plain or CLA."""
    family = FAMILIES.get(model.config.model_type.removeprefix("cla_"))
    return model.get_submodule(family.layers) if family else model.base_model.layers


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a config.json. Raises InputError naming the architecture and those supported."""
    model_type = str(config.get("model_type", "(none)"))
    if model_type in FAMILIES:
        for key, value, why, fix in FAMILIES[model_type].requires:
            if bool(config.get(key, value)) != value:
                raise InputError(f"This model of type {model_type!r} is not supported", why=why, fix=fix)
        return FAMILIES[model_type]
    if any(model_type == family.cla_type for family in FAMILIES.values()):
        raise InputError(
            f"The model is already a Cross-Layer Attention model ({model_type})",
            why="Converting a converted model again would hide how much was lost.",
            fix="Start from its source model (see cla_manifest.json) with the sharing you want.",
        )
    named = config.get("architectures")
    architecture = ", ".join(map(str, named)) if named and isinstance(named, list) else "unknown architecture"
    raise InputError(
        f"Models of type {model_type[:100]!r} ({architecture[:200]}) are not supported",
        why=REFUSED.get(model_type, "Cross-Layer Attention needs modelling code for each family."),
        fix=f"Supported: {', '.join(FAMILIES)}.",
    )
