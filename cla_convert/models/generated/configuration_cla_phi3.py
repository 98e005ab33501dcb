"""Configuration of Phi-3 with Cross-Layer Attention (arXiv 2405.12981). Needs transformers only."""

from transformers import Phi3Config


class ClaPhi3Config(Phi3Config):
    """A `Phi3Config` plus the sharing map.

    `kv_source_layers[i]` is the layer whose keys and values layer i attends to. A layer that names itself owns its
    keys and values; any other layer is a consumer, has no k/v projections and takes no room in the KV cache.
    """

    model_type = "cla_phi3"

    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_up_proj": "colwise_gather_output",  # as in Phi-3: the output is chunked
        "layers.*.mlp.down_proj": "rowwise_split_input",
    }

    kv_source_layers: list[int] | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.kv_source_layers is None:
            self.kv_source_layers = list(range(self.num_hidden_layers))
        if len(self.kv_source_layers) != self.num_hidden_layers:
            raise ValueError(
                f"kv_source_layers has {len(self.kv_source_layers)} entries for {self.num_hidden_layers} layers"
            )
        for layer, source in enumerate(self.kv_source_layers):
            if not 0 <= source <= layer or self.kv_source_layers[source] != source:
                raise ValueError(
                    f"kv_source_layers[{layer}] = {source}, which is not an earlier layer that owns its K/V"
                )

    @property
    def kv_sharing_modes(self) -> list[str | None]:
        """Per layer None, "store" (read by others) or "reuse"; transformers' caches keep nothing for "reuse"."""
        sources = self.kv_source_layers
        return [
            "reuse" if source != layer else "store" if layer in sources[layer + 1 :] else None
            for layer, source in enumerate(sources)
        ]


__all__ = ["ClaPhi3Config"]
