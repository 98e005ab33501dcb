"""Loading models, and writing Cross-Layer Attention models that load anywhere.

An output folder holds weights, config.json with an `auto_map`, the family's modelling code copied verbatim, every
sidecar of the source byte for byte, and cla_manifest.json. One exporter writes it for conversion and for uptraining;
`register_for_auto_class` is never used, because under FSDP2 it saves torch's wrapper classes instead of ours.
"""

import importlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..files import write_json
from .checkpoint import FLOATING, Checkpoint
from .families import FAMILIES, Family
from .writer import MANIFEST, ShardWriter, publishing

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SHARD_SIZE = 5_000_000_000


def register() -> None:
    """Teach transformers' Auto classes the CLA families, so that outputs load here without trust_remote_code."""
    from transformers import AutoModel, AutoModelForCausalLM

    register_configs()
    for family in FAMILIES.values():
        classes = cla_classes(family)
        AutoModel.register(classes["Config"], classes["Model"], exist_ok=True)
        AutoModelForCausalLM.register(classes["Config"], classes["ForCausalLM"], exist_ok=True)


def register_configs() -> None:
    """Teach AutoConfig the CLA families: the part of `register` that imports no modelling code."""
    from transformers import AutoConfig

    for family in FAMILIES.values():
        AutoConfig.register(family.cla_type, _config_class(family), exist_ok=True)


def cla_classes(family: Family) -> dict[str, Any]:
    """The CLA classes of a family: `Config`, `DecoderLayer`, `Model` and `ForCausalLM`."""
    modeling = importlib.import_module(f"{__package__}.{family.code_files[1].stem}")
    kinds = ("DecoderLayer", "Model", "ForCausalLM")
    return {
        "Config": _config_class(family),
        **{kind: getattr(modeling, family.class_name(kind)) for kind in kinds},
    }


def _config_class(family: Family) -> Any:
    module = importlib.import_module(f"{__package__}.{family.code_files[0].stem}")
    return getattr(module, family.class_name("Config"))


def load_model(folder: Path, *, dtype: "torch.dtype | str" = "auto", device: str = "cpu") -> "PreTrainedModel":
    """Load a causal language model (plain or CLA) from a local folder, in eval mode; code in the folder is never run.

    Raises:
        InputError: transformers cannot build the model or weights are missing.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    Checkpoint.open(folder)  # names a truncated shard or an index that reaches outside; transformers would not
    register()
    logging.disable_progress_bar()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, trust_remote_code=False, output_loading_info=True
        )
        model, info = loaded
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"The model in {folder} cannot be loaded", why=str(error).strip().splitlines()[0]) from error
    if info["missing_keys"]:
        raise InputError(
            f"The model in {folder} lacks weights",
            why=f"Missing: {', '.join(sorted(info['missing_keys'])[:3])}, ...",
            fix="Convert or download it again.",
        )
    return model.to(device).eval()


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of a local folder. Raises InputError if it has none."""
    from transformers import AutoTokenizer

    register()
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{folder} has no usable tokenizer",
            why=str(error).strip().splitlines()[0],
            fix="Put the model's tokenizer files (tokenizer.json, tokenizer_config.json) into the folder.",
        ) from error


def cla_config(source: Mapping[str, Any], family: Family, kv_source_layers: list[int], dtype: str) -> dict[str, Any]:
    """config.json of the converted model: the source's, with the CLA classes and the sharing map."""
    dropped = {"_name_or_path", "quantization_config", "torch_dtype", "auto_map"}
    return {
        **{key: value for key, value in source.items() if key not in dropped},
        "architectures": [family.class_name("ForCausalLM")],
        "auto_map": family.auto_map(),
        "dtype": dtype,
        "kv_source_layers": list(kv_source_layers),
        "model_type": family.cla_type,
    }


def write_sidecars(source: Checkpoint, family: Family, out: Path) -> None:
    """Copy the family's code and the source's tokenizer, template, generation and licence files, byte for byte."""
    for file in family.code_files:
        shutil.copyfile(file, out / file.name)
    source.copy_sidecars(out)


def export_model(
    state: "Mapping[str, torch.Tensor] | torch.nn.Module",
    template: Path,
    out: Path,
    *,
    manifest: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Publish `state` as a model folder like `template`: its config, code, sidecars, tensor names and dtypes.

    Args:
        state: full state dict (or module) of the CLA model; tied tensors that the template does not store are left out.
        template: an output folder of this tool, for instance the converted model that was uptrained.
        out: the folder to publish; appears whole or not at all.
        manifest: entries to add to cla_manifest.json, for instance what was trained.
        overwrite: replace an earlier output of this tool.

    Raises:
        InputError: a tensor of the template is not in `state`, the disk is full, or `out` must not be replaced.
    """
    import torch

    tensors = state.state_dict() if isinstance(state, torch.nn.Module) else state
    source = check_exportable(tensors, template)
    with publishing(out, overwrite=overwrite) as staging:
        writer = ShardWriter(staging, source.tensors, SHARD_SIZE)
        if source.tensors.keys() - tensors.keys():
            tensors = unstacked(tensors, template)
        for name, info in source.tensors.items():
            writer.add(name, tensors[name].detach().to("cpu", getattr(torch, FLOATING[info.dtype])))
        writer.finish()
        source.copy_sidecars(staging)
        for file in [*template.glob("*.py"), template / "config.json", template / "README.md"]:
            if file.exists():
                shutil.copyfile(file, staging / file.name)
        write_json(staging / MANIFEST, read_manifest(template) | dict(manifest or {}))


def check_exportable(tensors: "Mapping[str, torch.Tensor]", template: Path) -> Checkpoint:
    """The template, opened. Raises InputError if it stores a tensor that `tensors` lacks."""
    source = Checkpoint.open(template, as_stored=True)
    if source.tensors.keys() - tensors.keys():
        tensors = unstacked(tensors, template)
    if missing := source.tensors.keys() - tensors.keys():
        raise InputError(
            f"The model in {template} stores {len(missing)} tensors that it does not use, such as {min(missing)!r}",
            fix="Remove them from the source model, and convert again.",
        )
    return source


def unstacked(tensors: "Mapping[str, torch.Tensor]", template: Path) -> "Mapping[str, torch.Tensor]":
    """The state as checkpoints store it: models with experts hold them stacked, their files hold them one by one."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    register()
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(template, trust_remote_code=False))
    return revert_weight_conversion(model, dict(tensors))


def read_manifest(folder: Path) -> dict[str, Any]:
    """cla_manifest.json of an output folder; empty for other folders."""
    path = folder / MANIFEST
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
