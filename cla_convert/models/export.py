"""Loading models, and writing Cross-Layer Attention models that load anywhere.

An output folder holds weights, config.json with an `auto_map`, the family's modelling code copied verbatim, every
sidecar of the source byte for byte, and cla_manifest.json. One exporter writes it for conversion and for uptraining;
`register_for_auto_class` is never used, because under FSDP2 it saves torch's wrapper classes instead of ours.
"""

import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..console import human_bytes, say, say_once
from ..errors import ClaError, InputError, first_line
from ..files import read_json, refuse_pointer, write_json
from ..refusals import unread
from .checkpoint import Checkpoint, put_back, refuse_damaged
from .classes import cla_classes as cla_classes
from .classes import register as register
from .classes import register_type
from .families import Family
from .headers import FLOATING
from .packed import refuse_scales
from .self_test import check_interface
from .shipped import converted_family
from .whole import cannot_be_built
from .whole_rows import WHOLES
from .writer import MANIFEST, ShardWriter, publishing, read_manifest

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SHARD_SIZE = 5_000_000_000
_LARGE = 1_000_000_000
"""Bytes of a model that take long enough to load for a word about it."""
IMPLEMENTATIONS = ("_attn_implementation", "attn_implementation", "_attn_implementation_internal")
"""Keys of a config.json that name code which need not be installed here. transformers writes none of them."""


def load_model(
    folder: Path,
    *,
    dtype: "torch.dtype | str" = "auto",
    device: str = "cpu",
    parts: Mapping[str, int | str] | None = None,
) -> "PreTrainedModel":
    """Load a causal language model (plain or CLA) from a local folder, in eval mode; code in the folder is never run.

    Attention runs as transformers does by default, whatever implementation config.json names.

    Args:
        folder: plain transformers or CLA.
        dtype: of the weights; default: as stored.
        device: where all of it lies.
        parts: in place of that, where each part lies (`placement.over_gpus`).

    Raises:
        InputError: transformers cannot build the model, weights are missing, or quantised without a word of it in
            config.json, or the installed transformers is not one that converted models of its family work with.
    """
    from transformers import AutoModelForCausalLM

    say_if_large(folder)
    with _building(folder) as config:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=dtype, trust_remote_code=False, output_loading_info=True,
            device_map=dict(parts) if parts else None, **_names_in(folder),
        )  # fmt: skip
        model, info = loaded
    refuse_missing(folder, info["missing_keys"])
    if info["unexpected_keys"] and model.config.to_dict().get("quantization_config") is None:
        refuse_scales(info["unexpected_keys"], Checkpoint.open(folder, as_stored=True).tensors)
    return (model if parts else model.to(device)).eval()


def empty_model(folder: Path, *, dtype: "torch.dtype | None" = None, device: str = "meta") -> "PreTrainedModel":
    """The same model without its weights, which are on the meta device; what is computed (rotary tables) on `device`.

    Raises:
        InputError: as `load_model`, but that no weight is looked at.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with _building(folder) as config, torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
        _keep_in_float32(model)
    if device != "meta":
        fill_computed(model, device)
    return model.eval()


def _keep_in_float32(model: Any) -> None:
    """What transformers leaves in float32 when it loads a model in another dtype: biases that choose experts."""
    kept = stays_float32(model, model.dtype)
    for name, buffer in model.named_buffers():
        if kept.search(name):
            owner, _, own = name.rpartition(".")
            model.get_submodule(owner)._buffers[own] = buffer.float()


def stays_float32(model: "PreTrainedModel", dtype: "torch.dtype") -> "re.Pattern[str]":
    """What the names of those tensors match that transformers leaves in float32 when it loads a model in `dtype`."""
    return re.compile("|".join(model._get_dtype_plan(dtype)) or "$^")


def fill_computed(model: "PreTrainedModel", device: "torch.device | str") -> None:
    """Compute the buffers that no checkpoint holds, as transformers does after loading: on the CPU, weights untouched.

    The weights must be on the meta device, where initialising a module does nothing to them.
    """
    import torch

    for module in model.modules():
        computed = {name: module.get_buffer(name) for name in module._non_persistent_buffers_set}
        for name, buffer in computed.items():
            module._buffers[name] = torch.empty_like(buffer, device="cpu")
        if computed:
            with torch.no_grad():
                model._init_weights(module)
        for name in computed:
            module._buffers[name] = module.get_buffer(name).to(device)


@contextmanager
def _building(folder: Path) -> Iterator[Any]:
    """The folder's configuration; inside, what transformers raises is turned into an InputError."""
    from transformers.utils import logging

    checkpoint = Checkpoint.open(folder)  # names a truncated shard or an index that reaches outside
    if converted_family(checkpoint.config):
        check_interface(checkpoint.config["model_type"])
    register_type(checkpoint.config.get("model_type"))
    logging.disable_progress_bar()
    with loading(f"The model in {folder} cannot be loaded", "Check that config.json belongs to the weights."):
        config: Any = _config(folder, checkpoint)
        if stored := named_implementation(checkpoint.config):
            say_once(f"config.json asks for the attention {stored!r}: transformers' default is used instead")
        config._attn_implementation = None
        with quietly() if checkpoint.around else nullcontext():
            yield config


def _config(folder: Path, checkpoint: Checkpoint) -> Any:
    """The configuration of the language model."""
    from transformers import AutoConfig

    if checkpoint.around is None:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        for key in checkpoint.strays:
            say_once(f"config.json has {key}, which models of its family know nothing of: it is passed over")
            delattr(config, key)
        return config
    settings = {key: value for key, value in checkpoint.config.items() if key != "model_type"}
    return AutoConfig.for_model(checkpoint.config["model_type"], **settings)


def _names_in(folder: Path) -> dict[str, Any]:
    """For `from_pretrained`: how the language model's tensors are called where it is a part of a whole."""
    if not (outside := Checkpoint.open(folder, as_stored=True).around):
        return {}
    starts = {f"^{re.escape(stored)}": own for own, stored in outside.starts.items()}
    return {"key_mapping": dict(sorted(starts.items(), key=lambda start: -len(start[0])))}


@contextmanager
def quietly() -> Iterator[None]:
    """Without what transformers tells of every tensor that is not loaded on purpose, or of settings that clash."""
    from transformers.utils import logging

    logger = logging.get_logger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def say_if_large(folder: Path) -> None:
    """A word about a model that takes long enough to load for one."""
    if (size := sum(info.nbytes for info in Checkpoint.open(folder).tensors.values())) > _LARGE:
        say(f"loading {folder.name}, {human_bytes(size)}")


def refuse_missing(folder: Path, missing: Collection[str]) -> None:
    """Raise InputError if weights of the model are missing."""
    if missing:
        raise InputError(
            f"The model in {folder} lacks weights",
            why=f"Missing: {', '.join(sorted(missing)[:3])}, ...",
            fix="Convert or download it again.",
        )


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of a local folder. Raises InputError if it has none, or a damaged one."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoTokenizer, PreTrainedConfig

    for name in ("tokenizer.json", "tokenizer.model"):
        refuse_pointer(folder / name)
    refuse_pieces(folder)
    kind = str((read_json(folder / "config.json") or {}).get("model_type"))
    register_type(kind)
    of_whole = kind.startswith("cla_") and kind.removeprefix("cla_") in WHOLES
    config = {"config": PreTrainedConfig()} if of_whole else {}  # of a type that nobody knows, as theirs is
    try:
        with loading(f"{folder} has no usable tokenizer", _tokenizer_fix(folder)):
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **config)
    except InputError as error:
        refuse_damaged(folder)  # what a parser said, by file and line
        if isinstance(cause := error.__cause__, StrictDataclassError):  # the model's settings, which it reads first
            raise cannot_be_built(cause) from cause
        raise


def _tokenizer_fix(folder: Path) -> str:
    """What to do about a tokenizer that transformers does not load."""
    names = ("tokenizer.json", "tokenizer_config.json")
    if not all((folder / name).exists() for name in names):
        return f"Put the model's tokenizer files ({', '.join(names)}) into the folder."
    again = put_back(folder, *(folder / name for name in names))
    return f"{again} If they are as published, this transformers cannot load them."


def refuse_pieces(folder: Path) -> None:
    """Raise InputError if a tokenizer is SentencePiece's alone and its package is not here: transformers needs it."""
    pieces = folder / "tokenizer.model"
    if find_spec("sentencepiece") or not pieces.is_file() or (folder / "tokenizer.json").exists():
        return
    with pieces.open("rb") as file:
        if file.read(1) != b"\n":  # how a list of pieces begins; else it is tiktoken's, under the same name
            return
    raise InputError(
        f"{pieces} needs the package sentencepiece, which is not installed",
        why="There is no tokenizer.json beside it, which transformers would read without.",
        fix="pip install sentencepiece",
    )


def named_implementation(config: Mapping[str, Any]) -> str | None:
    """The attention that a config.json asks for, if it is one that is not part of transformers and torch."""
    named = (config[key] for key in IMPLEMENTATIONS if config.get(key))
    return next((str(name) for name in named if name not in ("eager", "sdpa")), None)


@contextmanager
def loading(what: str, fix: str) -> Iterator[None]:
    """Turn what transformers and tokenizers raise while loading (KeyError, ImportError, ...) into an InputError."""
    try:
        yield
    except (ClaError, MemoryError):
        raise
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's: the caller knows what to do with less
            raise
        raise unread(error, InputError(what, f"{type(error).__name__}: {first_line(error)}", fix)) from error


def cla_config(
    source: Mapping[str, Any],
    family: Family,
    kv_source_layers: list[int | None],
    dtype: str,
    kv_heads: int | None = None,
) -> dict[str, Any]:
    """config.json of the converted model: the source's, with the CLA classes, the sharing map and other KV heads."""
    dropped = {"_name_or_path", "quantization_config", "torch_dtype", "auto_map", *IMPLEMENTATIONS}
    return {
        **{key: value for key, value in source.items() if key not in dropped},
        "architectures": [family.class_name("ForCausalLM")],
        "auto_map": family.auto_map(),
        **({family.key("num_key_value_heads"): kv_heads} if kv_heads else {}),
        "dtype": dtype,
        "kv_source_layers": list(kv_source_layers),
        "model_type": family.cla_type,
    }


def export_model(
    state: "Mapping[str, torch.Tensor] | torch.nn.Module",
    template: Path,
    out: Path,
    *,
    unchanged: Collection[str] = (),
    manifest: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Publish `state` as a model folder like `template`: its config, code, sidecars, tensor names and dtypes.

    Tensors are asked for one at a time, and written before the next one. What the template stores beside its model (a
    source model's computed tables, layers for speculation) is copied.

    Args:
        state: state dict (or module) of the CLA model; tied tensors that the template does not store are left out.
        template: an output folder of this tool, for instance the converted model that was uptrained.
        out: the folder to publish; appears whole or not at all.
        unchanged: names of the model's tensors that are still the template's, whose bytes are copied.
        manifest: entries to add to cla_manifest.json, for instance what was trained.
        overwrite: replace an earlier output of this tool.

    Raises:
        InputError: the disk is full, or `out` must not be replaced.
    """
    import torch

    from .stored import StoredTensors

    source = Checkpoint.open(template, as_stored=True)
    files = StoredTensors(source, empty_model(template))
    tensors = state.state_dict() if isinstance(state, torch.nn.Module) else state
    with publishing(out, overwrite=overwrite) as staging:
        writer = ShardWriter(staging, source.as_stored(source.tensors), SHARD_SIZE)
        kept = [part.name for name, parts in files.parts.items() if name in unchanged for part in parts]
        # What is as it was is not looked at: `convert` has, and a training is not to be lost for it.
        for part in [*kept, *sorted(files.unused)]:
            info = source.tensors[part]
            writer.copy(source.stored_name(part), template / info.file, info.start, look=False)
        writer.copy_others(source, look=False)
        for name in (name for name in files.parts if name not in unchanged):
            for part, tensor in files.split(name, tensors[name].detach()).items():
                dtype = getattr(torch, FLOATING[source.tensors[part].dtype])
                writer.add(source.stored_name(part), tensor.to("cpu", dtype))
        writer.finish()
        source.copy_sidecars(staging)
        for file in [*template.glob("*.py"), template / "config.json", template / "README.md"]:
            if file.exists():
                shutil.copyfile(file, staging / file.name)
        write_json(staging / MANIFEST, read_manifest(template) | dict(manifest or {}))
