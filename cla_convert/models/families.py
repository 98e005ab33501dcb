"""The table of supported families, and what a config.json says about a model's attention. Imports no torch."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError

CODE_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class BlockNames:
    """Where a decoder layer keeps its parts, by their name inside the layer; None for what a family lacks."""

    attention: str = "self_attn"
    output: str = "o_proj"
    """Output projection, inside the attention."""
    norm_in: str | None = "input_layernorm"
    """Before the attention."""
    norm_mid: str | None = "post_attention_layernorm"
    """Between the residual after attention and the MLP."""
    norm_attention: str | None = None
    """On what the attention adds to the residual stream."""
    norm_mlp: str | None = None
    """On what the MLP adds."""

    @property
    def output_weight(self) -> str:
        """Name of W_O."""
        return f"{self.attention}.{self.output}.weight"


@dataclass(frozen=True)
class Family:
    """One row: the transformers family and the CLA code that replaces it.

    The two code files `configuration_<cla_type>.py` and `modeling_<cla_type>.py` lie beside this one and are copied
    into every output.
    """

    model_type: str
    class_prefix: str
    """Prefix of the transformers classes: `Llama` for LlamaConfig, LlamaModel and LlamaForCausalLM."""
    kv_projection: re.Pattern[str] = re.compile(r"^model\.layers\.(\d+)\.self_attn\.([kv]_proj\.(?:weight|bias))$")
    """Names of the tensors that owners have and consumers lack; group 1 is the layer, group 2 the rest."""
    attention: re.Pattern[str] = re.compile(r"^model\.layers\.(\d+)\.self_attn\.[qkvo]_proj\.")
    """Names of the tensors that calibrated pooling may change; group 1 is the layer."""
    layer: re.Pattern[str] = re.compile(r"^model\.layers\.(\d+)\.")
    """Names of the tensors of a layer; group 1 is its number."""

    layers: str = "model.layers"
    """Name of the list of decoder layers."""
    block: BlockNames = BlockNames()
    """Names inside a decoder layer."""

    @property
    def cla_type(self) -> str:
        """`model_type` of the converted model."""
        return f"cla_{self.model_type}"

    @property
    def code_files(self) -> list[Path]:
        """The modelling code that ships in an output."""
        return [CODE_FOLDER / f"configuration_{self.cla_type}.py", CODE_FOLDER / f"modeling_{self.cla_type}.py"]

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
        }


FAMILIES = {family.model_type: family for family in (Family("llama", "Llama"),)}


@dataclass(frozen=True)
class AttentionShape:
    """What conversion needs to know about a model, read from its config.json."""

    model_type: str
    num_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    kinds: tuple[str, ...]
    """Attention kind of each layer; only layers of one kind may share."""
    kv_source_layers: tuple[int, ...]
    """Map of the model as it stands: the identity, unless it already shares."""

    @property
    def is_mha(self) -> bool:
        """Whether every query head has a KV head of its own."""
        return self.num_key_value_heads == self.num_attention_heads > 1

    def kv_bytes_per_token(self, element_size: int, owners: int | None = None) -> int:
        """Bytes of K and V that one token adds to the cache, for `owners` layers (default: as the model stands)."""
        owners = len(set(self.kv_source_layers)) if owners is None else owners
        return 2 * owners * self.num_key_value_heads * self.head_dim * element_size


def family_of(config: dict[str, Any]) -> Family:
    """The family of a config.json. Raises InputError naming the architecture and those supported."""
    model_type = str(config.get("model_type", "(none)"))
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    if any(model_type == family.cla_type for family in FAMILIES.values()):
        raise InputError(
            f"The model is already a Cross-Layer Attention model ({model_type})",
            why="Converting a converted model again would hide how much was lost.",
            fix="Start from its source model (see cla_manifest.json) with the sharing you want.",
        )
    architecture = ", ".join(config.get("architectures") or []) or "unknown architecture"
    raise InputError(
        f"Models of type {model_type!r} ({architecture}) are not supported",
        why="Cross-Layer Attention needs modelling code for each family.",
        fix=f"Supported: {', '.join(FAMILIES)}.",
    )


def shape_of(config: dict[str, Any]) -> AttentionShape:
    """Read the attention shape from a config.json. Raises InputError if a size is missing."""
    try:
        layers, heads = int(config["num_hidden_layers"]), int(config["num_attention_heads"])
        head_dim = int(config.get("head_dim") or config["hidden_size"] // heads)
        kinds = config.get("layer_types") or ["full_attention"] * layers
        return AttentionShape(
            model_type=str(config.get("model_type")),
            num_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=head_dim,
            kinds=tuple(kinds),
            kv_source_layers=tuple(config.get("kv_source_layers") or range(layers)),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            "config.json does not describe a decoder-only transformer",
            why=f"A size is missing or not a number: {error}",
        ) from error
