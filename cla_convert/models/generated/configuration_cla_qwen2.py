"""Configuration of Qwen2 with Cross-Layer Attention (arXiv 2405.12981). Needs transformers only."""

from transformers import Qwen2Config


class ClaQwen2Config(Qwen2Config):
    """A `Qwen2Config` plus the sharing map.

    `kv_source_layers[i]` is the layer whose keys and values layer i attends to. A layer that names itself owns its
    keys and values; any other layer is a consumer, has no k/v projections and takes no room in the KV cache.
    """

    model_type = "cla_qwen2"

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
            if self.layer_types[source] != self.layer_types[layer]:
                raise ValueError(
                    f"kv_source_layers[{layer}] = {source}: {self.layer_types[layer]} cannot read "
                    f"{self.layer_types[source]}"
                )

    @property
    def kv_sharing_modes(self) -> list[str | None]:
        """Per layer None, "store" (read by others) or "reuse"; transformers' caches keep nothing for "reuse"."""
        sources = self.kv_source_layers
        return [
            "reuse" if source != layer else "store" if layer in sources[layer + 1 :] else None
            for layer, source in enumerate(sources)
        ]


__all__ = ["ClaQwen2Config"]
