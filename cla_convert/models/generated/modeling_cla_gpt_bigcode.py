"""GPTBigCode with Cross-Layer Attention (arXiv 2405.12981). Self-contained: needs torch and transformers only.

A consumer layer has no k/v projections and attends to the keys and values of an earlier layer. They travel in
`shared_kv_states`, an explicit argument keyed by the owner's index: never through the cache, which may be absent, and
never by kind of layer, which gives wrong gradients when activations are recomputed.
"""

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt_bigcode.modeling_gpt_bigcode import (
    GPTBigCodeAttention,
    GPTBigCodeBlock,
    GPTBigCodeForCausalLM,
    GPTBigCodeModel,
    GPTBigCodePreTrainedModel,
    eager_attention_forward,
)
from transformers.utils.output_capturing import OutputRecorder

from .configuration_cla_gpt_bigcode import ClaGPTBigCodeConfig

try:
    from transformers.cache_utils import KVSharingDict
except ImportError:  # transformers < 5.23: all it lacks is moving between devices
    from collections import UserDict as KVSharingDict


class ClaGPTBigCodeAttention(GPTBigCodeAttention):
    """Attention of an owner (computes, caches and hands on its K/V) or of a consumer (projects queries only)."""

    def __init__(self, config: ClaGPTBigCodeConfig, layer_idx: int):
        super().__init__(config, layer_idx=layer_idx)
        self.kv_source = config.kv_source_layers[layer_idx]
        self.mode = config.kv_sharing_modes[layer_idx]
        del self.c_attn  # GPTBigCode has one projection for all three; here consumers have q only
        self.q_proj = nn.Linear(self.embed_dim, self.embed_dim)
        if self.mode != "reuse":
            self.k_proj = nn.Linear(self.embed_dim, self.kv_dim)
            self.v_proj = nn.Linear(self.embed_dim, self.kv_dim)

    def forward(
        self,
        hidden_states,
        layer_past=None,
        attention_mask=None,
        use_cache=False,
        output_attentions=False,
        shared_kv_states=None,
        **kwargs,
    ):
        input_shape = hidden_states.shape[:-1]
        heads = (*input_shape, -1, self.head_dim)

        query = self.q_proj(hidden_states).view(heads).transpose(1, 2)
        if self.mode == "reuse":
            key, value = shared_kv_states[self.kv_source]
        else:
            key = self.k_proj(hidden_states).view(heads).transpose(1, 2)
            value = self.v_proj(hidden_states).view(heads).transpose(1, 2)
            if layer_past is not None:
                key, value = layer_past.update(key, value, self.layer_idx)
            if self.mode == "store":
                shared_kv_states[self.layer_idx] = key, value

        attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attn_output, attn_weights = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=0.0 if not self.training else self.attn_dropout,
            scaling=self.scaling,
            **kwargs,
        )
        attn_output = self.c_proj(attn_output.reshape(*input_shape, -1).contiguous())
        return self.resid_dropout(attn_output), attn_weights


class ClaGPTBigCodeDecoderLayer(GPTBigCodeBlock):
    """A GPTBigCode layer whose attention may read an earlier layer's K/V."""

    def __init__(self, config: ClaGPTBigCodeConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.attn = ClaGPTBigCodeAttention(config, layer_idx)


class ClaGPTBigCodePreTrainedModel(GPTBigCodePreTrainedModel):
    """What transformers needs to know about loading, splitting and recording."""

    config: ClaGPTBigCodeConfig
    config_class = ClaGPTBigCodeConfig
    _no_split_modules = ["ClaGPTBigCodeDecoderLayer"]
    _can_record_outputs = {
        "hidden_states": ClaGPTBigCodeDecoderLayer,
        "attentions": OutputRecorder(ClaGPTBigCodeAttention, index=1, layer_name="attn"),
    }

    def __init__(self, config, *args, **kwargs):
        # transformers heeds this old flag once, while the parent still has layers that are about to be replaced.
        checkpointing = getattr(config, "gradient_checkpointing", False)
        super().__init__(config, *args, **kwargs)
        if checkpointing:
            config.gradient_checkpointing = True

    def _set_gradient_checkpointing(self, enable=True, gradient_checkpointing_func=None, **kwargs):
        # Reentrant checkpointing silently drops the gradient that consumers send to their owner.
        if enable and getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant", True):
            raise ValueError("Cross-Layer Attention needs gradient_checkpointing_kwargs={'use_reentrant': False}")
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, **kwargs)


class ClaGPTBigCodeModel(ClaGPTBigCodePreTrainedModel, GPTBigCodeModel):
    """The decoder. Hands one dict of shared K/V from layer to layer in every forward pass."""

    def __init__(self, config: ClaGPTBigCodeConfig):
        super().__init__(config)
        self.h = nn.ModuleList(ClaGPTBigCodeDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        past_key_values=None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ):
        kwargs["shared_kv_states"] = KVSharingDict()
        return super().forward(
            input_ids=input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            use_cache=use_cache,
            **kwargs,
        )


class ClaGPTBigCodeForCausalLM(ClaGPTBigCodePreTrainedModel, GPTBigCodeForCausalLM):
    """The decoder and its vocabulary projection."""

    def __init__(self, config: ClaGPTBigCodeConfig):
        super().__init__(config)
        self.transformer = ClaGPTBigCodeModel(config)
        self.post_init()


__all__ = ["ClaGPTBigCodeForCausalLM", "ClaGPTBigCodeModel", "ClaGPTBigCodePreTrainedModel"]
