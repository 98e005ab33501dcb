"""Loading models, and writing Cross-Layer Attention models that load anywhere.

An output folder holds weights, config.json with an `auto_map`, the family's modelling code copied verbatim, every
sidecar of the source byte for byte, and cla_manifest.json. One exporter writes it for conversion and for uptraining;
`register_for_auto_class` is never used, because under FSDP2 it saves torch's wrapper classes instead of ours.
"""

import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..console import human_bytes, say
from ..errors import ClaError, InputError, first_line
from ..files import read_json, write_bytes, write_json
from .checkpoint import FLOATING, Checkpoint
from .classes import cla_classes as cla_classes
from .classes import register
from .families import FAMILIES, Family
from .self_test import check_interface
from .writer import MANIFEST, ShardWriter, publishing

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SHARD_SIZE = 5_000_000_000
_LARGE = 1_000_000_000
"""Bytes of a model that take long enough to load for a word about it."""
IMPLEMENTATIONS = ("_attn_implementation", "attn_implementation", "_attn_implementation_internal")
"""Keys of a config.json that name code which need not be installed here. transformers writes none of them."""


def load_model(folder: Path, *, dtype: "torch.dtype | str" = "auto", device: str = "cpu") -> "PreTrainedModel":
    """Load a causal language model (plain or CLA) from a local folder, in eval mode; code in the folder is never run.

    Attention runs as transformers does by default, whatever implementation config.json names.

    Raises:
        InputError: transformers cannot build the model, weights are missing, or the installed transformers is not one
            that converted models of its family work with.
    """
    from transformers import AutoModelForCausalLM

    say_if_large(folder)
    with _building(folder) as config:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=dtype, trust_remote_code=False, output_loading_info=True
        )
        model, info = loaded
    refuse_missing(folder, info["missing_keys"])
    return model.to(device).eval()


def empty_model(folder: Path, *, dtype: "torch.dtype | None" = None, device: str = "meta") -> "PreTrainedModel":
    """The same model without its weights, which are on the meta device; what is computed (rotary tables) on `device`.

    Raises:
        InputError: as `load_model`, but that no weight is looked at.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with _building(folder) as config, torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    if device != "meta":
        fill_computed(model, device)
    return model.eval()


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
    from transformers import AutoConfig
    from transformers.utils import logging

    checkpoint = Checkpoint.open(folder)  # names a truncated shard or an index that reaches outside
    if converted_family(checkpoint.config):
        check_interface(checkpoint.config["model_type"])
    register()
    logging.disable_progress_bar()
    with loading(f"The model in {folder} cannot be loaded", "Check that config.json belongs to the weights."):
        config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if stored := named_implementation(checkpoint.config):
            _say_once(f"config.json asks for the attention {stored!r}: transformers' default is used instead")
        config._attn_implementation = None
        yield config


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
    """Load the tokenizer of a local folder. Raises InputError if it has none."""
    from transformers import AutoTokenizer

    register()
    fix = "Put the model's tokenizer files (tokenizer.json, tokenizer_config.json) into the folder."
    with loading(f"{folder} has no usable tokenizer", fix):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


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
        raise InputError(what, why=f"{type(error).__name__}: {first_line(error)}", fix=fix) from error


@cache
def _say_once(note: str) -> None:
    say(note)


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


def write_sidecars(source: Checkpoint, family: Family, out: Path) -> None:
    """Copy the family's code and the source's tokenizer, template, generation and licence files, byte for byte."""
    for file in family.code_files:
        shutil.copyfile(file, out / file.name)
    source.copy_sidecars(out)


def update_code(folder: Path) -> None:
    """Put this version's modelling code into an output folder; weights and config.json stay as they are.

    Raises:
        InputError: it is not a converted model of a known family.
    """
    family = converted_family(read_json(folder / "config.json") or {})
    if family is None:
        raise InputError(f"{folder} is not a converted model", fix="Give the output folder of convert or uptrain.")
    for file in family.code_files:
        write_bytes(folder / file.name, file.read_bytes())


def has_other_code(folder: Path) -> bool:
    """Whether a converted model carries other modelling code than this version would write."""
    family = converted_family(read_json(folder / "config.json") or {})
    files = family.code_files if family else []
    return any(not (folder / f.name).is_file() or (folder / f.name).read_bytes() != f.read_bytes() for f in files)


def converted_family(config: Mapping[str, Any]) -> Family | None:
    """The family of a converted model's config.json; None for any other."""
    return next((family for family in FAMILIES.values() if family.cla_type == config.get("model_type")), None)


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
        writer = ShardWriter(staging, source.tensors, SHARD_SIZE)
        kept = [part.name for name, parts in files.parts.items() if name in unchanged for part in parts]
        for stored in [*kept, *sorted(files.unused)]:
            info = source.tensors[stored]
            writer.copy(stored, template / info.file, info.start)
        for name in (name for name in files.parts if name not in unchanged):
            for stored, tensor in files.split(name, tensors[name].detach()).items():
                dtype = getattr(torch, FLOATING[source.tensors[stored].dtype])
                writer.add(stored, tensor.to("cpu", dtype))
        writer.finish()
        source.copy_sidecars(staging)
        for file in [*template.glob("*.py"), template / "config.json", template / "README.md"]:
            if file.exists():
                shutil.copyfile(file, staging / file.name)
        write_json(staging / MANIFEST, read_manifest(template) | dict(manifest or {}))


def read_manifest(folder: Path) -> dict[str, Any]:
    """cla_manifest.json of an output folder; empty for other folders. Raises InputError if it is damaged."""
    return read_json(folder / MANIFEST) or {}
