"""What a conversion will do, from headers only: `--dry-run` prints it, `convert` executes the same object."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..console import human_bytes, human_count
from ..models.checkpoint import Checkpoint
from ..models.export import cla_config
from ..models.families import Family
from ..models.fit import check_converted, kept_in_float32
from ..models.headers import ELEMENT_SIZE, FLOATING, TensorInfo
from ..models.shape import AttentionShape, long_cache, owners_of
from .auto import Choice
from .heads_first import hint
from .initialisation import INITIALISATIONS
from .kv_heads import check_kv_heads
from .sharing import Sharing, activation_bytes, groups_of, picture, sharing_map
from .supported import check_convertible
from .tensor_plan import TensorPlan, cast, fitted, plan_tensors

_PROGRAM = 450_000_000
"""Memory of Python, torch and transformers."""
_BESIDE = 30_000
"""Bytes of code, card and records beside the weights of an output."""
_SINGLE, _SHARDS = "model.safetensors", "model-*-of-*.safetensors"
_DTYPES = {name: code for code, name in FLOATING.items()}
NO_LAYER_SHARES = "no layer shares: the KV cache stays as it is"


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
    kv_bytes_per_token: dict[str, int]
    state_bytes: int
    """What layers without attention keep of a text, however long; 0 except in hybrids. It stays as it is."""
    parameters: dict[str, int]
    output_bytes: int
    memory_bytes: int
    """Estimate of the peak: the program, what is pooled or fitted at a time, the activations of calibrated pooling."""
    activation_bytes: int
    """Of these, the activations, in float32: half as many on a GPU with room for them, on disk where memory lacks."""
    unused: set[str]
    """Names of what of the checkpoint no model reads."""
    left_out: list[str]
    """The same in sentences."""
    warnings: list[str]
    """Those, and what else should be known before."""
    choice: Choice | None = None
    """What `sharing: auto` measured."""
    whole: str = ""
    """What the language model is a part of, in words; empty for a model that only reads."""
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
        return {t.name: t.written(checkpoint.tensors[t.name]) for t in self.tensors if t.action != "drop"}

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

    def _activations(self, device: str) -> str:
        size, half = human_bytes(self.activation_bytes), human_bytes(self.activation_bytes // 2)
        in_gpu = "" if device == "cpu" else f", or in its place {half} in the GPU if that has room"
        return f"of it {size} for activations of the text{in_gpu}"

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
            "activation_bytes": self.activation_bytes,
            "left_out": self.left_out,
            "warnings": self.warnings,
            **({"auto": self.choice.to_json()} if self.choice else {}),
        }

    def render(self, model: str = "", device: str = "cpu") -> str:
        """The plan for a person, who calls the source `model` and converts on a device."""
        before, after = self.kv_bytes_per_token["before"], self.kv_bytes_per_token["after"]
        owners, window = len(self.groups), self.shape.sliding_window
        lines = [
            f"source      {model or self.source} ({self.shape.model_type}, {self.shape.num_layers} layers, "
            f"{self.shape.num_attention_heads} query / {self.shape.num_key_value_heads} KV heads)",
            *([f"inside      {self.whole}"] if self.whole else []),
            f"sharing     {self.sharing}: {owners} of {_layers(self.shape)} own their K/V, init {self.init}",
            *(f"            {line}" for line in picture(self.kv_source_layers).splitlines()),
            *([f"heads       {self.heads_each} KV heads of a layer become one"] if self.heads_each > 1 else []),
            *(self.choice.render().splitlines() if self.choice else []),
            f"tensors     {self.count('keep')} kept, {self._changed()}, {self.count('drop')} dropped",
            f"parameters  {human_count(self.parameters['before'])} -> {human_count(self.parameters['after'])}",
            f"KV cache    {before} -> {after} bytes per token in {self.dtype} ({before / after:.2f}x smaller)",
            *([f"            beside it a state: {_state(self)}"] if self.state_bytes else []),
            *([f"            sliding layers keep their last {window} tokens at most{self._long()}"] if window else []),
            f"needs       {human_bytes(self.output_bytes)} of disk for the converted model, about "
            f"{human_bytes(self.memory_bytes)} of memory",
            *([f"            {self._activations(device)}"] if self.activation_bytes else []),
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
    family, shape, unused, ahead = check_convertible(checkpoint)
    sources = sharing_map(sharing, shape.kinds)
    kv_heads = check_kv_heads(kv_heads, family, shape)
    after, each = replace(shape, num_key_value_heads=kv_heads), shape.num_key_value_heads // kv_heads
    start = INITIALISATIONS.named(init)
    first = 0 if each > 1 else min((group[0] for group in groups_of(sources) if group[1:]), default=len(sources))
    tensors = plan_tensors(checkpoint, family, shape, each, sources, unused)
    tensors = fitted(tensors, family, first, start.fitted(family))
    source_dtype = checkpoint.tensors[family.tensor(shape.kv_layers[0], "k_proj")].dtype
    out_dtype = FLOATING[source_dtype] if dtype == "auto" else dtype
    config = cla_config(checkpoint.config, family, sources, out_dtype, kv_heads if each > 1 else None)
    if dtype != "auto":
        names = {t.name: checkpoint.tensors[t.name] for t in tensors if t.action != "drop"}
        tensors = cast(tensors, _DTYPES[dtype], kept_in_float32(family, config, names, dtype))
    size = ELEMENT_SIZE[_DTYPES[out_dtype]]
    written = {t.name: t.written(checkpoint.tensors[t.name]) for t in tensors if t.action != "drop"}
    check_converted(family, config, written)
    sidecars = sum(file.stat().st_size for file in checkpoint.sidecars)
    working = start.working_bytes(checkpoint, family, sources, tensors)
    streams = activation_bytes(sources, calibration_tokens if start.needs_text else 0, shape.hidden_size)
    return Plan(
        source=checkpoint.folder,
        family=family,
        shape=shape,
        kv_heads=kv_heads,
        sharing=_sharing_name(sharing, choice),
        init=init,
        kv_source_layers=sources,
        tensors=tensors,
        dtype=out_dtype,
        kv_bytes_per_token={
            "before": shape.kv_bytes_per_token(size),
            "after": after.kv_bytes_per_token(size, len(owners_of(sources))),
        },
        state_bytes=shape.state_bytes(size),
        parameters={
            "before": sum(info.numel for name, info in checkpoint.tensors.items() if name not in unused),
            "after": sum(info.numel for info in written.values()),
        },
        output_bytes=sum(info.nbytes for info in written.values())
        + sum(info.nbytes for info in checkpoint.others.values())
        + sidecars
        + _BESIDE,
        memory_bytes=_PROGRAM + working + streams,
        activation_bytes=streams,
        unused=unused,
        left_out=(left_out := _left_out(shape.model_type, unused - ahead, ahead)),
        warnings=[*left_out, *_warnings(checkpoint, shape, sources), *_of_heads(shape, each, sources, choice)],
        choice=choice,
        whole=_whole(checkpoint),
        long_cache=long_cache(checkpoint.config, size, sources, (shape.num_key_value_heads, after.num_key_value_heads)),
    )


def _whole(checkpoint: Checkpoint) -> str:
    if not (outside := checkpoint.around):
        return ""
    others = human_bytes(sum(info.nbytes for info in checkpoint.others.values()))
    return f"{outside.whole.name}, whose other {len(checkpoint.others)} tensors ({others}) are copied as they are"


def _sharing_name(sharing: Sharing, choice: Choice | None) -> str:
    if choice:
        return f"auto, at most {choice.kv_budget:.0%} of the KV cache"
    return sharing if isinstance(sharing, str) else "by hand"


def _layers(shape: AttentionShape) -> str:
    every = len(shape.kv_layers)
    return f"{every} layers" if every == shape.num_layers else f"{every} layers with attention"


def _state(plan: Plan) -> str:
    without = plan.shape.num_layers - len(plan.shape.kv_layers)
    return f"{plan.state_bytes} bytes of {without} layers without attention, which stay as they are"


def _left_out(model_type: str, unused: set[str], ahead: frozenset[str]) -> list[str]:
    """Which tensors no output has, and why."""
    found = []
    if ahead:
        found.append(
            f"{len(ahead)} tensors that guess tokens further ahead (multi-token prediction) are dropped, as "
            f"transformers drops them: what is generated is the same, but they cannot speed it up: {_some(ahead)}"
        )
    if unused:
        found.append(
            f"{len(unused)} tensors are dropped, because a {model_type} with this config.json has no place for "
            f"them (transformers would not load them either): {_some(unused)}"
        )
    return found


def _some(names: Collection[str]) -> str:
    return ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")


def _of_heads(shape: AttentionShape, each: int, sources: list[int | None], choice: Choice | None) -> list[str]:
    """That fewer KV heads would do, where they stay as they are and no measurement chose the map."""
    if each > 1:
        return []
    if not choice and (told := hint(shape, sources)):
        return [told]
    mha = "the model is multi-head attention: grouping its heads as well (GQA, --kv-heads N) saves more for less"
    nothing = owners_of(sources) == shape.kv_layers
    return [*([mha] if shape.is_mha else []), *([NO_LAYER_SHARES] if nothing else [])]


def _warnings(checkpoint: Checkpoint, shape: AttentionShape, sources: list[int | None]) -> list[str]:
    warnings = []
    if {info.file for info in checkpoint.tensors.values()} == {_SINGLE} and any(checkpoint.folder.glob(_SHARDS)):
        warnings.append(f"the folder holds {_SINGLE} and shards beside it: {_SINGLE} is read, as transformers does")
    if "auto_map" in checkpoint.config:
        warnings.append(
            f"the model brings code of its own (auto_map), which is not run: it is read as a plain {shape.model_type}"
        )
    if checkpoint.strays:
        warnings.append(
            f"config.json has {' and '.join(checkpoint.strays)}, which a {shape.model_type} knows nothing of: its "
            "layers see everything before them, but transformers' caches would forget what lies behind such a window. "
            "The output goes without; of the source, generate answers otherwise beyond it unless use_cache=False"
        )
    if sources.count(0) > 1:
        warnings.append("layer 0 shares its K/V; that costs far more than any other layer (cla2-keep-ends spares it)")
    return warnings
