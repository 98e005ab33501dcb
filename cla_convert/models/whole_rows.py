"""The table of models that see images, or hear, around a language model of a supported family. Imports no torch."""

from dataclasses import dataclass
from typing import Any

from . import kinds
from .family import Family
from .family_code import FROM_ATTENTION, Code


@dataclass(frozen=True)
class Whole:
    """One row: the transformers model around the language model."""

    model_type: str
    class_prefix: str
    """Its classes are <prefix>Config and <prefix>ForConditionalGeneration."""
    name: str
    """As people write it."""
    checkpoints: str
    """Models that people have. For the docs."""
    around: str
    """`model_type` of the language models that were tested inside. For the docs."""
    text: str = "language_model"
    """Name of the language model inside."""

    @property
    def cla_type(self) -> str:
        """`model_type` of the whole around a converted language model."""
        return f"cla_{self.model_type}"

    def class_name(self, kind: str) -> str:
        """`class_name("MultimodalConfig")` -> `ClaLlavaMultimodalConfig`."""
        return f"Cla{self.class_prefix}{kind}"

    def auto_map(self) -> dict[str, str]:
        """The `auto_map` of config.json."""
        modeling = f"modeling_{self.cla_type}.{self.class_name('ForConditionalGeneration')}"
        autos = ("AutoModelForImageTextToText", "AutoModelForCausalLM")
        config = f"configuration_{self.cla_type}.{self.class_name('MultimodalConfig')}"
        return {"AutoConfig": config, **dict.fromkeys(autos, modeling)}


@dataclass(frozen=True)
class Inner:
    """A language model that exists inside a whole only: what it makes of text is what a family's makes of it."""

    family: str
    """`model_type` of the family."""
    code: Family
    """Of its modelling files, which have no causal language model of their own."""


WHOLES = {
    row.model_type: row
    for row in (
        Whole("gemma3", "Gemma3", "Gemma 3", "Gemma 3 4B, 12B, 27B; MedGemma", "gemma3_text"),
        Whole(
            "mistral3",
            "Mistral3",
            "Mistral 3",
            "Mistral Small 3.1, 3.2; Ministral 3 3B, 8B, 14B (bf16)",
            "mistral, ministral3",
        ),
        Whole("llava", "Llava", "LLaVA", "LLaVA 1.5, Pixtral 12B, LLaVA-Phi-3", "llama, mistral, qwen2, phi3"),
        Whole("llava_next", "LlavaNext", "LLaVA-NeXT", "LLaVA 1.6", "mistral"),
        Whole("llava_onevision", "LlavaOnevision", "LLaVA-OneVision", "LLaVA-OneVision 0.5B, 7B, 72B", "qwen2"),
        Whole("internvl", "InternVL", "InternVL", "InternVL 3, 3.5 (`-hf`), dense", "qwen2, qwen3"),
        Whole("aya_vision", "AyaVision", "Aya Vision", "Aya Vision 8B, 32B", "cohere2"),
        Whole("cohere2_vision", "Cohere2Vision", "Command A Vision", "Command A Vision", "cohere2"),
        Whole("idefics3", "Idefics3", "Idefics 3", "Idefics 3 8B, SmolVLM", "llama", text="text_model"),
        Whole("smolvlm", "SmolVLM", "SmolVLM", "SmolVLM 2", "llama", text="text_model"),
        Whole("lfm2_vl", "Lfm2Vl", "LFM2-VL", "LFM2-VL 450M, 1.6B, 3B", "lfm2"),
        Whole("qwen2_vl", "Qwen2VL", "Qwen2-VL", "Qwen2-VL 2B, 7B, 72B", "qwen2"),
        Whole("qwen2_5_vl", "Qwen2_5_VL", "Qwen2.5-VL", "Qwen2.5-VL 3B, 7B, 32B, 72B", "qwen2"),
        Whole("qwen3_vl", "Qwen3VL", "Qwen3-VL", "Qwen3-VL 2B, 4B, 8B, 32B", "qwen3"),
        Whole("qwen3_5", "Qwen3_5", "Qwen3.5", "Qwen3.5 0.8B to 27B", "qwen3_5_text"),
        Whole("qwen3_5_moe", "Qwen3_5Moe", "Qwen3.5 MoE", "Qwen3.5 35B-A3B, 122B-A10B, 397B-A17B", "qwen3_5_moe_text"),
    )
}

_QWEN2_VL: dict[str, Any] = dict(
    model="TextModel",
    config="TextConfig",
    arguments=(FROM_ATTENTION,),
    layer_types=True,
    causal=False,
    oldest="5.23",
)
INNER = {
    inner.code.model_type: inner
    for inner in (
        Inner(
            "qwen2",
            Family("qwen2_vl_text", "Qwen2VL", Code("Qwen2-VL", module="qwen2_vl", **_QWEN2_VL), kinds.late_windows),
        ),
        Inner(
            "qwen2",
            Family(
                "qwen2_5_vl_text", "Qwen2_5_VL", Code("Qwen2.5-VL", module="qwen2_5_vl", **_QWEN2_VL),
                kinds.late_windows,
            ),
        ),
        Inner(
            "qwen3",
            Family(
                "qwen3_vl_text", "Qwen3VLText",
                Code("Qwen3-VL", module="qwen3_vl", pretrained="Qwen3VL", causal=False), qk_norm=True,
            ),
        ),
    )
}  # fmt: skip
"""By `model_type`. Rotary positions have three axes (M-RoPE): for text alone the three are one, and a pair of channels
always has one angle, so whatever folds under RoPE folds here, too."""
