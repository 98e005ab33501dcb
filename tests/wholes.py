"""A tiny random model of every kind that sees images, around a tiny language model, and what to show it."""

from dataclasses import dataclass, field
from typing import Any, cast

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from cla_convert.models.whole_rows import INNER, WHOLES
from tests.tiny import shake, tiny_config

IMAGE = 250
"""Token that stands for a piece of an image."""
TOWER = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
PATCHES = TOWER | {"patch_size": 14}
PIXTRAL = PATCHES | {"model_type": "pixtral", "image_size": 56, "head_dim": 8}
SIGLIP = PATCHES | {"model_type": "siglip_vision_model", "image_size": 28, "vision_use_head": False}
SIGLIP_2 = PATCHES | {"model_type": "siglip2_vision_model", "num_patches": 16, "vision_use_head": False}
CLIP = PATCHES | {"model_type": "clip_vision_model", "image_size": 28, "projection_dim": 16}
INTERN = TOWER | {"patch_size": [14, 14], "image_size": [56, 56]}
QWEN = {"depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 1}
QWEN_2 = QWEN | {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}
QWEN_3 = QWEN | {"hidden_size": 16, "intermediate_size": 16, "out_hidden_size": 32, "num_position_embeddings": 16}
QWEN_2_5 = QWEN | {"hidden_size": 16, "intermediate_size": 16, "out_hidden_size": 32, "window_size": 16,
                   "fullatt_block_indexes": [1]}  # fmt: skip
M_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
PINPOINTS = {"image_grid_pinpoints": [[28, 28], [28, 56], [56, 28]]}
COHERE = {"downsample_factor": 2, "alignment_intermediate_size": 16}
WIDE, SQUARE, SMALL = ({"image_sizes": torch.tensor([size])} for size in ([28, 56], [56, 56], [28, 28]))
GRID = {"image_grid_thw": torch.tensor([[1, 4, 4]])}
PACKED = {"spatial_shapes": torch.tensor([[4, 4]]), "pixel_attention_mask": torch.ones(1, 16, dtype=torch.long)}


@dataclass(frozen=True)
class Case:
    """One model, and the shape of an image for it."""

    whole: str
    text: str
    """Case of the language model."""
    vision: dict[str, Any]
    pixels: tuple[int, ...]
    more: dict[str, Any] = field(default_factory=dict)
    """Further settings of the whole."""
    told: dict[str, Tensor] = field(default_factory=dict)
    """What `forward` is told of the pixels."""


CASES = {
    "gemma3": Case("gemma3", "gemma3", SIGLIP, (1, 3, 28, 28), {"mm_tokens_per_image": 4}),
    "mistral3": Case("mistral3", "mistral-window", PIXTRAL, (1, 3, 56, 56), {}, SQUARE),
    "mistral3-ministral3": Case("mistral3", "ministral3", PIXTRAL, (1, 3, 56, 56), {}, SQUARE),
    "llava": Case("llava", "llama", CLIP, (1, 3, 28, 28)),
    "llava-mistral": Case(
        "llava", "mistral", PIXTRAL, (1, 3, 28, 28),
        {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}, SMALL,
    ),
    "llava-qwen2": Case("llava", "qwen2", CLIP, (1, 3, 28, 28)),
    "llava-phi3": Case("llava", "phi3", CLIP, (1, 3, 28, 28)),
    "llava_next": Case("llava_next", "mistral", CLIP, (1, 3, 3, 28, 28), PINPOINTS, WIDE),
    "llava_onevision": Case(
        "llava_onevision", "qwen2", SIGLIP, (1, 3, 3, 28, 28), PINPOINTS | {"vision_aspect_ratio": "anyres_max_9"}, WIDE
    ),
    "internvl": Case("internvl", "qwen2", INTERN, (1, 3, 56, 56)),
    "internvl-qwen3": Case("internvl", "qwen3", INTERN, (1, 3, 56, 56)),
    "aya_vision": Case("aya_vision", "cohere2", SIGLIP, (1, 3, 28, 28), COHERE),
    "cohere2_vision": Case("cohere2_vision", "cohere2", SIGLIP, (1, 3, 28, 28), COHERE),
    "idefics3": Case("idefics3", "llama", PATCHES | {"image_size": 56}, (1, 1, 3, 56, 56), {"scale_factor": 2}),
    "smolvlm": Case("smolvlm", "llama", PATCHES | {"image_size": 56}, (1, 1, 3, 56, 56), {"scale_factor": 2}),
    "lfm2_vl": Case("lfm2_vl", "lfm2", SIGLIP_2, (1, 16, 3 * 14 * 14), {"downsample_factor": 2}, PACKED),
    "qwen2_vl": Case("qwen2_vl", "qwen2", QWEN_2, (16, 48), {}, GRID),
    "qwen2_5_vl": Case("qwen2_5_vl", "qwen2", QWEN_2_5, (16, 48), {}, GRID),
    "qwen3_vl": Case("qwen3_vl", "qwen3", QWEN_3 | {"deepstack_visual_indexes": [0, 1]}, (16, 48), {}, GRID),
    "qwen3_5": Case("qwen3_5", "qwen3_5", QWEN_3, (16, 48), {}, GRID),
    "qwen3_5_moe": Case("qwen3_5_moe", "qwen3_5_moe", QWEN_3, (16, 48), {}, GRID),
}  # fmt: skip


def whole_model(case: str, seed: int = 0) -> PreTrainedModel:
    """The plain transformers model."""
    it = CASES[case]
    language = {key: value for key, value in tiny_config(it.text).to_diff_dict().items() if key != "architectures"}
    if f"{it.whole}_text" in INNER:
        language |= {"rope_parameters": M_ROPE, "model_type": f"{it.whole}_text"}
    shared = {"image_token_id": IMAGE, "tie_word_embeddings": bool(language.get("tie_word_embeddings"))}
    row = WHOLES[it.whole]
    config_class = getattr(transformers, f"{row.class_prefix}Config")
    if "image_token_index" in config_class.__dataclass_fields__:
        shared["image_token_index"] = IMAGE
    torch.manual_seed(seed)
    config = config_class(text_config=language, vision_config=it.vision, **shared, **it.more)
    model: PreTrainedModel = getattr(transformers, f"{row.class_prefix}ForConditionalGeneration")(config)
    for parameter in model.parameters():
        if not parameter.any():  # some projections begin at 0, and an image would then say nothing
            parameter.data.normal_(std=0.2)
    return shake(model).eval()


def shown(case: str, model: PreTrainedModel) -> dict[str, Tensor]:
    """A text with an image in it, as `forward` takes it."""
    it = CASES[case]
    torch.manual_seed(1)
    pixels, whole = torch.rand(it.pixels), cast(Any, model)
    with torch.inference_mode():
        found = whole.model.get_image_features(pixel_values=pixels, return_dict=True, **it.told).pooler_output
    pieces = sum(part.numel() // part.shape[-1] for part in (found if isinstance(found, (list, tuple)) else [found]))
    ids = torch.tensor([[*range(2, 12), *[IMAGE] * pieces, *range(20, 31)]])
    kind = {"gemma3": "token_type_ids"}.get(it.whole, "mm_token_type_ids" if it.whole.startswith("qwen") else None)
    of_image = {kind: (ids == IMAGE).long()} if kind else {}
    return {"input_ids": ids, "pixel_values": pixels, **it.told, **of_image}
