"""Families that people ask for, and why there is no row for them: what one would take. Imports no torch."""

_SHARES_ALREADY = (
    "Its last layers read the K/V of earlier ones as published, which transformers hands on by kind of layer and not "
    "by a map. Sharing among the others, too, takes an attention and a model of its own."
)
_GEMMA_4 = (
    "Its full layers have larger heads than the sliding ones and may use keys as values, and its last layers may read "
    "the K/V of earlier ones. That takes an attention and a model of its own."
)
_LATENT = "It caches one compressed vector per token (multi-head latent attention) instead of keys and values."
_STABLELM = (
    "Its attention rotates a part of each head by itself; models with fewer KV than query heads (12B) norm each head "
    "apart, too, and run attention and MLP in parallel. That would be three more fields of the code, for one model."
)
_OWN_ATTENTION = "Its attention is unlike any in the table:"
_BY_TABLES = "Its layers rotate or not by the tables that they are given. That takes a kind of layer for each."
_CHUNKS = (
    "Its layers attend within chunks, scale queries by their position and norm without a gain after RoPE. That takes "
    "an attention and a kind of layer of its own."
)
_TWO_CLASSES = (
    "Its layers with attention are of another class in transformers than those with a state, and stand in one list. "
    "That takes a list of two classes in the CLA code, and"
)
REFUSED = {
    "falcon_h1": "Attention and a state-space model run side by side in every layer, and transformers' caches keep "
    "nothing at all, not even the state, for a layer that reads another's K/V. That takes a kind of cache of its own.",
    "jamba": f"{_TWO_CLASSES} the state of Mamba 1 in the accounts of the cache.",
    "olmo_hybrid": f"{_TWO_CLASSES} layers whose norms stand in two places, before a state and behind attention.",
    "granitemoehybrid": "Its layers have an MLP and experts at once, or the MLP alone, and its attention rotates or "
    "not by one setting. That takes these two in the CLA code, and the state of Mamba 2 in the accounts of the cache.",
    "falcon": "Its attention is code of its own in transformers, outside the attention interface that CLA code calls, "
    "and it copies K/V to every query head before caching them, so its cache is as large as with multi-head attention.",
    "stablelm": _STABLELM,
    "hyperclovax": "It multiplies its logits by what Granite divides them by under the same name (logits_scaling): the "
    "losses of training and vLLM's plugin would have to know which. That takes a field for it.",
    "afmoe": f"{_OWN_ATTENTION} a gate of its own projection, norms on both sides, RoPE in sliding layers alone.",
    "bitnet": f"{_OWN_ATTENTION} it norms what the heads give before the last projection, and its weights are ternary.",
    "nanochat": f"{_OWN_ATTENTION} it norms queries and keys after RoPE, without a gain.",
    "olmo": f"{_OWN_ATTENTION} it cuts queries, keys and values off at a bound, which pooling does not know of.",
    "phi": f"{_OWN_ATTENTION} its last projection is called dense, a part of each head is rotated inside it, and norms "
    "of queries and keys are an option.",
    "diffllama": f"{_OWN_ATTENTION} it subtracts two attention maps (differential attention).",
    "doge": f"{_OWN_ATTENTION} a mask is computed from its values.",
    "mimo_v2_flash": f"{_OWN_ATTENTION} its values have other sizes than its keys.",
    "step3p7": f"{_OWN_ATTENTION} a gate for each head has a projection of its own.",
    "laguna": f"{_OWN_ATTENTION} its layers differ in their number of heads, and a gate has a projection of its own.",
    "cohere2_moe": "Its layers rotate or not by one more setting (force_rope) than those of cohere2, which the kinds "
    "of layers would have to know.",
    "granite_swa": _BY_TABLES,
    "granitemoe_swa": _BY_TABLES,
    "cohere_compass": _BY_TABLES,
    "granitemoeshared": "A layer has an MLP beside its experts under a name of its own; that takes two names in a row.",
    "hunyuan_v1_moe": "Its layers may have different numbers of experts. That takes rules for how they are stored.",
    "qwen3_vl_moe": "Its experts are stored the other way round than those of qwen3_moe, which the language model "
    "would be read as. That takes a conversion of them on the way in and out.",
    "llama4": _CHUNKS,
    "llama4_text": _CHUNKS,
    "mllama": "Some of its layers attend to an image instead of text, and have keys and values of another sequence.",
    "paligemma": "Its prefix attends in both directions, so text alone, which calibration sees, is not what it is for.",
    "gemma3n": _SHARES_ALREADY,
    "gemma3n_text": _SHARES_ALREADY,
    "gemma4": _GEMMA_4,
    "gemma4_text": _GEMMA_4,
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "deepseek_v32": _LATENT,
    "glm4_moe_lite": _LATENT,
    "glm_moe_dsa": _LATENT,
    "kimi_linear": _LATENT,
    "longcat_flash": _LATENT,
    "minicpm3": _LATENT,
    "mistral4": _LATENT,
    "youtu": _LATENT,
    "axk1": _LATENT,
}
"""By `model_type`."""
