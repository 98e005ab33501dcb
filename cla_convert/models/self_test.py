"""Does the shipped code of a family work with the transformers that is installed? Asked before hours of work.

What a release of transformers calls things has changed before, and a model that goes on without its cache writes
fluent nonsense. So a tiny random model of the family has to compute the same with a cache, without one and token by
token, beyond its sliding windows too.
"""

from functools import cache
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from .classes import cla_classes
from .families import FAMILIES, Family
from .family_code import NEWEST
from .kinds import has_kv
from .shape import shape_of, unshared

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TINY: dict[str, Any] = dict(
    vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=8, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=64, initializer_range=0.2, pad_token_id=None,
    use_sliding_window=True, max_window_layers=4, sliding_window_pattern=3, no_rope_layer_interval=3,
    full_attn_idxs=[1, 2, 5], num_local_experts=4, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
    n_routed_experts=4, n_shared_experts=1, moe_num_experts=4, moe_k=2,
)  # fmt: skip
"""A configuration of any family: each takes what it knows. Two layers of every kind that it has, at least."""
WINDOW, TOKENS = 8, 24
ROUNDING = 1e-3
"""Of the largest logit: float32 sums in another order. A wrong cache is off by far more."""


def check_interface(model_type: str) -> None:
    """Check the family of a `model_type`, plain or converted; nothing to do for one that is neither.

    Raises:
        InputError: the installed transformers is not one that the family's code works with.
    """
    for family in FAMILIES.values():
        if model_type in (family.model_type, family.cla_type):
            _check(family.model_type)


@cache
def _check(model_type: str) -> None:
    import torch

    from .clean_check import compare

    family = FAMILIES[model_type]
    try:
        with torch.random.fork_rng(devices=[]), torch.inference_mode():
            torch.manual_seed(0)
            found = compare(tiny_model(family), torch.arange(TOKENS)[None])
    except Exception as error:  # whatever an unknown release may raise
        raise _refusal(family, f"{type(error).__name__}: {error}") from error
    off = max(found["cached_difference"], found["stepwise_difference"])
    if not off <= ROUNDING * found["largest_logit"]:  # nor if it is not a number
        raise _refusal(family, f"On a tiny random model, logits with a cache differ from those without by {off:.2g}.")


def tiny_model(family: Family) -> "PreTrainedModel":
    """A random CLA model of the family in which the second layer of every kind reads the first."""
    classes = cla_classes(family)
    windows = {"sliding_window": WINDOW} if hasattr(classes["Config"], "sliding_window") else {}
    settings = TINY | windows  # a cache would believe in a window that the layers of the family know nothing of
    if family.state:  # some do not make up a list themselves
        settings["layer_types"] = family.kinds(settings)
    kinds = shape_of(classes["Config"](**settings).to_dict()).kinds
    if windows and not any(kind.startswith("sliding") for kind in kinds):  # nor a window
        settings["layer_types"] = ["sliding_attention", "full_attention"] * (len(kinds) // 2)
        kinds = shape_of(classes["Config"](**settings).to_dict()).kinds
    sources = unshared(kinds)
    for kind in set(filter(has_kv, kinds)):
        owner = kinds.index(kind)
        sources[kinds.index(kind, owner + 1)] = owner
    return classes["ForCausalLM"](classes["Config"](**settings, kv_source_layers=sources)).eval()


def _refusal(family: Family, why: str) -> InputError:
    import transformers

    return InputError(
        f"The CLA code of {family.model_type!r} does not work with transformers {transformers.__version__}",
        why=why,
        fix=f"Install a release that it was tested with: pip install 'transformers=={NEWEST}.*', or a newer "
        "cla-convert.",
    )
