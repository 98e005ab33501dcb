"""StarCoder2 with Cross-Layer Attention (arXiv 2405.12981). Self-contained: needs torch and transformers only.

A consumer layer has no k/v projections and attends to the keys (after RoPE) and values of an earlier layer. They
travel in `shared_kv_states`, an explicit argument keyed by the owner's index: never through the cache, which may be
absent or windowed, and never by kind of layer, which gives wrong gradients when activations are recomputed.
"""

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.starcoder2.modeling_starcoder2 import (
    Starcoder2Attention,
    Starcoder2DecoderLayer,
    Starcoder2ForCausalLM,
    Starcoder2Model,
    Starcoder2PreTrainedModel,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from .configuration_cla_starcoder2 import ClaStarcoder2Config

try:
    from transformers.cache_utils import KVSharingDict
except ImportError:  # transformers < 5.23: all it lacks is moving between devices
    from collections import UserDict as KVSharingDict


class ClaStarcoder2Attention(Starcoder2Attention):
    """Attention of an owner (computes, caches and hands on its K/V) or of a consumer (projects queries only)."""

    def __init__(self, config: ClaStarcoder2Config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.kv_source = config.kv_source_layers[layer_idx]
        self.mode = config.kv_sharing_modes[layer_idx]
        if self.mode == "reuse":
            del self.k_proj, self.v_proj

    def forward(
        self,
        hidden_states,
        position_embeddings=None,
        attention_mask=None,
        past_key_values=None,
        shared_kv_states=None,
        **kwargs,
    ):
        input_shape = hidden_states.shape[:-1]
        heads = (*input_shape, -1, self.head_dim)
        cos, sin = position_embeddings

        query = self.q_proj(hidden_states).view(heads).transpose(1, 2)
        if self.mode == "reuse":
            query, _ = apply_rotary_pos_emb(query, query, cos, sin)
            key, value = shared_kv_states[self.kv_source]
        else:
            key = self.k_proj(hidden_states).view(heads).transpose(1, 2)
            value = self.v_proj(hidden_states).view(heads).transpose(1, 2)
            query, key = apply_rotary_pos_emb(query, key, cos, sin)
            if past_key_values is not None:
                key, value = past_key_values.update(key, value, self.layer_idx)
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
            dropout=0.0 if not self.training else self.attention_dropout,
            scaling=self.scaling,
            sliding_window=getattr(self.config, "sliding_window", None),
            **kwargs,
        )
        attn_output = self.o_proj(attn_output.reshape(*input_shape, -1).contiguous())
        return nn.functional.dropout(attn_output, p=self.residual_dropout, training=self.training), attn_weights


class ClaStarcoder2DecoderLayer(Starcoder2DecoderLayer):
    """A StarCoder2 layer whose attention may read an earlier layer's K/V."""

    def __init__(self, config: ClaStarcoder2Config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.self_attn = ClaStarcoder2Attention(config, layer_idx)


class ClaStarcoder2PreTrainedModel(Starcoder2PreTrainedModel):
    """What transformers needs to know about loading, splitting and recording."""

    config: ClaStarcoder2Config
    config_class = ClaStarcoder2Config
    _no_split_modules = ["ClaStarcoder2DecoderLayer"]
    _can_record_outputs = {"hidden_states": ClaStarcoder2DecoderLayer, "attentions": ClaStarcoder2Attention}

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


class ClaStarcoder2Model(ClaStarcoder2PreTrainedModel, Starcoder2Model):
    """The decoder. Hands one dict of shared K/V from layer to layer in every forward pass."""

    def __init__(self, config: ClaStarcoder2Config):
        super().__init__(config)
        self.layers = nn.ModuleList(ClaStarcoder2DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ):
        kwargs["shared_kv_states"] = KVSharingDict()
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )


class ClaStarcoder2ForCausalLM(ClaStarcoder2PreTrainedModel, Starcoder2ForCausalLM):
    """The decoder and its vocabulary projection."""

    def __init__(self, config: ClaStarcoder2Config):
        super().__init__(config)
        self.model = ClaStarcoder2Model(config)
        self.post_init()


__all__ = ["ClaStarcoder2ForCausalLM", "ClaStarcoder2Model", "ClaStarcoder2PreTrainedModel"]
