"""What a conversion will do, from headers only: `--dry-run` prints it, `convert` executes the same object."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..console import human_bytes, human_count
from ..models.checkpoint import ELEMENT_SIZE, FLOATING, Checkpoint, TensorInfo
from ..models.export import cla_config
from ..models.families import Family
from ..models.fit import check_converted
from ..models.shape import AttentionShape, long_cache, owners_of
from .auto import Choice
from .initialisation import INITIALISATIONS, Initialisation
from .kv_heads import check_kv_heads
from .sharing import Sharing, activation_bytes, groups_of, picture, sharing_map
from .supported import check_convertible
from .tensor_plan import TensorPlan

_PROGRAM = 450_000_000
"""Memory of Python, torch and transformers."""
_SINGLE, _SHARDS = "model.safetensors", "model-*-of-*.safetensors"
_COMPUTED = "rotary_emb.inv_freq"
"""Ends the names of tensors that old checkpoints store and transformers computes."""
_DTYPES = {name: code for code, name in FLOATING.items()}


@dataclass(frozen=True)
class Plan:
    """A conversion, ready to be printed or executed."""

    source: Path
    family: Family
    shape: AttentionShape
    """The source's."""
    kv_heads: int
    """Of every layer of the converted model."""
    sharing: str
    init: str
    kv_source_layers: list[int | None]
    tensors: list[TensorPlan]
    dtype: str
    """Dtype of the projections written, as torch names it."""
    cast: bool
    """Whether all tensors get this dtype; else each keeps the one that it has."""
    kv_bytes_per_token: dict[str, int]
    state_bytes: int
    """What layers without attention keep of a text, however long; 0 except in hybrids. It stays as it is."""
    parameters: dict[str, int]
    output_bytes: int
    memory_bytes: int
    """Estimate of the peak: the program, what is pooled or fitted at a time, the activations of calibrated pooling."""
    warnings: list[str]
    choice: Choice | None = None
    """What `sharing: auto` measured."""
    long_cache: dict[str, int] | None = None
    """Of models with sliding windows, see models/shape.py."""

    @property
    def groups(self) -> list[list[int]]:
        """Sharing groups, the owner first."""
        return groups_of(self.kv_source_layers)

    @property
    def heads_each(self) -> int:
        """KV heads of a layer of the source that become one."""
        return self.shape.num_key_value_heads // self.kv_heads

    def config(self, source: Mapping[str, Any]) -> dict[str, Any]:
        """config.json of the converted model, from the source's."""
        heads = self.kv_heads if self.heads_each > 1 else None
        return cla_config(source, self.family, self.kv_source_layers, self.dtype, heads)

    def written(self, checkpoint: Checkpoint) -> dict[str, TensorInfo]:
        """Names, dtypes and shapes of the output's tensors, in order."""
        infos = {t.name: _written(t, checkpoint.tensors[t.name]) for t in self.tensors if t.action != "drop"}
        if not self.cast:
            return infos
        return {name: replace(info, dtype=_DTYPES[self.dtype]) for name, info in infos.items()}

    def count(self, action: str) -> int:
        """Number of tensors with this action."""
        return sum(tensor.action == action for tensor in self.tensors)

    def _changed(self) -> str:
        fitted = self.count("fit")
        return f"{fitted} fitted to calibration text" if fitted else f"{self.count('pool')} pooled"

    def _long(self) -> str:
        if not (long := self.long_cache):
            return ""
        sizes = f"{human_bytes(long['before'])} -> {human_bytes(long['after'])}"
        return f"; of {long['tokens']} tokens: {sizes} ({long['before'] / long['after']:.2f}x smaller)"

    def to_json(self) -> dict[str, Any]:
        """The keys that `convert --json` and plan.json carry."""
        return {
            "source": {"folder": str(self.source), "model_type": self.shape.model_type},
            "sharing": self.sharing,
            "init": self.init,
            "kv_source_layers": self.kv_source_layers,
            "kv_heads": {"before": self.shape.num_key_value_heads, "after": self.kv_heads},
            "groups": [{"layers": group} for group in self.groups],
            "kv_bytes_per_token": self.kv_bytes_per_token,
            **({"state_bytes": self.state_bytes} if self.state_bytes else {}),
            **({"kv_bytes_of_long_context": self.long_cache} if self.long_cache else {}),
            "parameters": self.parameters,
            "dtype": self.dtype,
            "tensors": {action: self.count(action) for action in ("keep", "pool", "fit", "drop")},
            "output_bytes": self.output_bytes,
            "memory_bytes": self.memory_bytes,
            "warnings": self.warnings,
            **({"auto": self.choice.to_json()} if self.choice else {}),
        }

    def render(self) -> str:
        """The plan for a person."""
        before, after = self.kv_bytes_per_token["before"], self.kv_bytes_per_token["after"]
        owners, window = len(self.groups), self.shape.sliding_window
        lines = [
            f"source      {self.source} ({self.shape.model_type}, {self.shape.num_layers} layers, "
            f"{self.shape.num_attention_heads} query / {self.shape.num_key_value_heads} KV heads)",
            f"sharing     {self.sharing}: {owners} of {_layers(self.shape)} own their K/V, init {self.init}",
            *(f"            {line}" for line in picture(self.kv_source_layers).splitlines()),
            *([f"heads       {self.heads_each} KV heads of a layer become one"] if self.heads_each > 1 else []),
            *(self.choice.render().splitlines() if self.choice else []),
            f"tensors     {self.count('keep')} kept, {self._changed()}, {self.count('drop')} dropped",
            f"parameters  {human_count(self.parameters['before'])} -> {human_count(self.parameters['after'])}",
            f"KV cache    {before} -> {after} bytes per token in {self.dtype} ({before / after:.2f}x smaller)",
            *([f"            beside it a state: {_state(self)}"] if self.state_bytes else []),
            *([f"            sliding layers keep their last {window} tokens at most{self._long()}"] if window else []),
            f"needs       {human_bytes(self.output_bytes)} of disk, about {human_bytes(self.memory_bytes)} of memory",
        ]
        return "\n".join(lines + [f"warning     {warning}" for warning in self.warnings])


def make_plan(
    checkpoint: Checkpoint,
    *,
    sharing: Sharing,
    init: str,
    kv_heads: int | None = None,
    dtype: str = "auto",
    calibration_tokens: int = 0,
    choice: Choice | None = None,
) -> Plan:
    """Plan a conversion from the checkpoint's headers.

    Raises:
        InputError: the model cannot be converted (`check_convertible`).
        UsageError: the sharing, or the number of KV heads, is unknown or impossible for this model.
    """
    family, shape, unused = check_convertible(checkpoint)
    sources = sharing_map(sharing, shape.kinds)
    kv_heads = check_kv_heads(kv_heads, family, shape)
    after, each = replace(shape, num_key_value_heads=kv_heads), shape.num_key_value_heads // kv_heads
    start = INITIALISATIONS.named(init)
    first = 0 if each > 1 else min((group[0] for group in groups_of(sources) if group[1:]), default=len(sources))
    tensors = _fitted(_plan_tensors(checkpoint, family, shape, each, sources, unused), family, first, start)
    source_dtype = checkpoint.tensors[family.tensor(shape.kv_layers[0], "k_proj")].dtype
    out_dtype = FLOATING[source_dtype] if dtype == "auto" else dtype
    size = ELEMENT_SIZE[_DTYPES[out_dtype]]
    written = {t.name: _written(t, checkpoint.tensors[t.name]) for t in tensors if t.action != "drop"}
    sidecars = sum(file.stat().st_size for file in checkpoint.sidecars)
    working = start.working_bytes(checkpoint, family, sources, tensors)
    streams = activation_bytes(sources, calibration_tokens if start.needs_text else 0, shape.hidden_size)
    plan = Plan(
        source=checkpoint.folder,
        family=family,
        shape=shape,
        kv_heads=kv_heads,
        sharing=_sharing_name(sharing, choice),
        init=init,
        kv_source_layers=sources,
        tensors=tensors,
        dtype=out_dtype,
        cast=dtype != "auto",
        kv_bytes_per_token={
            "before": shape.kv_bytes_per_token(size),
            "after": after.kv_bytes_per_token(size, len(owners_of(sources))),
        },
        state_bytes=shape.state_bytes(size),
        parameters={
            "before": sum(info.numel for name, info in checkpoint.tensors.items() if name not in unused),
            "after": sum(info.numel for info in written.values()),
        },
        output_bytes=sum(i.nbytes if dtype == "auto" else i.numel * size for i in written.values()) + sidecars + 10**6,
        memory_bytes=_PROGRAM + working + streams,
        warnings=_warnings(checkpoint, shape, each, sources, unused),
        choice=choice,
        long_cache=long_cache(checkpoint.config, size, sources, (shape.num_key_value_heads, after.num_key_value_heads)),
    )
    check_converted(family, plan.config(checkpoint.config), plan.written(checkpoint))
    return plan


def _sharing_name(sharing: Sharing, choice: Choice | None) -> str:
    if choice:
        return f"auto, at most {choice.kv_budget:.0%} of the KV cache"
    return sharing if isinstance(sharing, str) else "by hand"


def _plan_tensors(
    checkpoint: Checkpoint,
    family: Family,
    shape: AttentionShape,
    each: int,
    sources: list[int | None],
    unused: set[str],
) -> list[TensorPlan]:
    """One entry per tensor of the source: first those outside the layers, then layer by layer.

    `each` KV heads become one, in what has rows for each head: the gain of a norm may have one for all.
    """
    rows = shape.projection_rows["k_proj"]
    groups = {group[0]: group for group in groups_of(sources)}
    tensors = []
    for name in checkpoint.tensors:
        place = family.place(name)
        layer = place.layer if place else None
        heads = each if checkpoint.tensors[name].shape[:1] == (rows,) else 1
        if name.endswith(_COMPUTED) or name in unused:
            tensors.append(TensorPlan(name, layer, "drop"))
        elif place is None or place.module not in family.kv_modules:
            tensors.append(TensorPlan(name, layer, "keep"))
        elif sources[place.layer] != place.layer:
            tensors.append(TensorPlan(name, layer, "drop"))
        elif len(groups[place.layer]) == heads == 1:
            tensors.append(TensorPlan(name, layer, "keep"))
        else:
            members = tuple(family.tensor(member, place.module, place.part) for member in groups[place.layer])
            tensors.append(TensorPlan(name, layer, "pool", members, heads))
    return sorted(tensors, key=lambda tensor: -1 if tensor.layer is None else tensor.layer)


def _written(tensor: TensorPlan, stored: TensorInfo) -> TensorInfo:
    """A tensor as it will be, in the dtype that it has."""
    return stored if tensor.heads == 1 else replace(stored, shape=(stored.shape[0] // tensor.heads, *stored.shape[1:]))


def _fitted(tensors: list[TensorPlan], family: Family, first: int, init: Initialisation) -> list[TensorPlan]:
    """The same with what the initialisation fits, in every layer from the first pooled one on."""
    modules = init.fitted(family)

    def refit(tensor: TensorPlan) -> TensorPlan:
        place = family.place(tensor.name)
        changes = place is not None and place.layer >= first and place.module in modules
        return replace(tensor, action="fit") if changes and tensor.action != "drop" else tensor

    return [refit(tensor) for tensor in tensors]


def _layers(shape: AttentionShape) -> str:
    every = len(shape.kv_layers)
    return f"{every} layers" if every == shape.num_layers else f"{every} layers with attention"


def _state(plan: Plan) -> str:
    without = plan.shape.num_layers - len(plan.shape.kv_layers)
    return f"{plan.state_bytes} bytes of {without} layers without attention, which stay as they are"


def _warnings(
    checkpoint: Checkpoint, shape: AttentionShape, each: int, sources: list[int | None], unused: set[str]
) -> list[str]:
    warnings = []
    if unused:
        names = ", ".join(sorted(unused)[:3]) + (", ..." if len(unused) > 3 else "")
        warnings.append(
            f"{len(unused)} tensors are dropped, because a {shape.model_type} with this config.json has no place for "
            f"them (transformers would not load them either): {names}"
        )
    if {info.file for info in checkpoint.tensors.values()} == {_SINGLE} and any(checkpoint.folder.glob(_SHARDS)):
        warnings.append(f"the folder holds {_SINGLE} and shards beside it: {_SINGLE} is read, as transformers does")
    if "auto_map" in checkpoint.config:
        warnings.append(
            f"the model brings code of its own (auto_map), which is not run: it is read as a plain {shape.model_type}"
        )
    if shape.is_mha and each == 1:
        warnings.append(
            "the model is multi-head attention: grouping its heads as well (GQA, --kv-heads N) saves more for less"
        )
    if sources.count(0) > 1:
        warnings.append("layer 0 shares its K/V; that costs far more than any other layer (cla2-keep-ends spares it)")
    if owners_of(sources) == shape.kv_layers and each == 1:
        warnings.append("no layer shares: the KV cache stays as it is")
    return warnings
