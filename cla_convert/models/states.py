"""What a layer without keys and values keeps of a text, however long that is: from config.json, without torch.

Of each rule the result is a pair: bytes that it has in any case (a recurrent state is float32 in every model), and
numbers of the dtype that the model runs in. `tests/unit/test_hybrids.py` holds them to transformers' caches.
"""

from collections.abc import Mapping
from typing import Any

Config = Mapping[str, Any]


def convolution(config: Config) -> tuple[int, int]:
    """The last inputs of a short convolution (LFM2)."""
    return 0, config["hidden_size"] * config.get("conv_L_cache", 3)


def gated_delta(config: Config) -> tuple[int, int]:
    """A matrix for each value head of linear attention, and the last inputs of its convolution (Qwen3-Next)."""
    keys, values = config.get("linear_num_key_heads", 16), config.get("linear_num_value_heads", 32)
    key_dim, value_dim = config.get("linear_key_head_dim", 128), config.get("linear_value_head_dim", 128)
    channels = 2 * keys * key_dim + values * value_dim
    return 4 * values * key_dim * value_dim, channels * config.get("linear_conv_kernel_dim", 4)
