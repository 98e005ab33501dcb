"""Models on the Hugging Face hub: their headers, and their files. Imports no torch."""

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from ..errors import InputError
from ..files import did_you_mean_path
from .checkpoint import Checkpoint
from .families import as_transformers_reads, family_of
from .headers import TensorInfo
from .whole import text_config

_FILES = [
    "*.json",
    "*.safetensors",
    "*.model",
    "*.txt",
    "*.jinja",
    "*.tiktoken",
    "[Ll][Ii][Cc][Ee][Nn][CcSs][Ee]*",
    "NOTICE*",
    "COPYING*",
    "USE_POLICY*",
    "README.md",
]
_NOT_NEEDED = ["consolidated*", "original/*", "onnx/*"]
"""The same weights again, in forms that transformers does not load."""


def download(model: str, revision: str | None, *, allow_pickle: bool, to_convert: bool) -> Path:
    """Fetch a model and return its folder in the hub's cache.

    Args:
        model: hub id.
        revision: branch, tag or commit.
        allow_pickle: fetch pickled weights, too.
        to_convert: refuse a family that cannot be converted before its weights are fetched.

    Raises:
        InputError: it is not there or cannot be fetched, or it is not supported.
    """
    from huggingface_hub import hf_hub_download, snapshot_download

    with _explained(model):
        cached_only = offline()
        if to_convert:
            config = Path(hf_hub_download(model, "config.json", revision=revision, local_files_only=cached_only))
            family_of(text_config(json.loads(config.read_text(encoding="utf-8"))))
        patterns = _FILES + (["*.bin"] if allow_pickle else [])
        folder = snapshot_download(
            model, revision=revision, allow_patterns=patterns, ignore_patterns=_NOT_NEEDED,
            local_files_only=cached_only,
        )  # fmt: skip
        return Path(folder)


def headers(model: str, revision: str | None) -> Checkpoint:
    """A checkpoint that can be described but not read: config.json and the headers of its weights, a few 100 kB.

    Raises:
        InputError: it is not there, cannot be fetched or has no safetensors.
    """
    from huggingface_hub import get_safetensors_metadata, hf_hub_download
    from huggingface_hub.errors import NotASafetensorsRepoError

    with _explained(model):
        cached_only = offline()
        config = Path(hf_hub_download(model, "config.json", revision=revision, local_files_only=cached_only))
        if cached_only:
            return Checkpoint.open(config.parent)
        try:
            found = get_safetensors_metadata(model, revision=revision)
        except NotASafetensorsRepoError as error:
            raise InputError(
                f"{model!r} has no safetensors weights",
                why=str(error),
                fix="Find a conversion of it on the hub, or download it and use --allow-pickle.",
            ) from error
    tensors = {
        name: TensorInfo(file, info.dtype, tuple(info.shape))
        for file, header in found.files_metadata.items()
        for name, info in header.tensors.items()
    }
    named = as_transformers_reads(json.loads(config.read_text(encoding="utf-8")))
    return Checkpoint.of(config.parent, named, tensors)


def offline() -> bool:
    """Whether the cache is all there is: asked for, or the hub's name cannot be found (trying takes long)."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return True
    if getproxies():
        return False
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname or "", 443)
    except OSError:
        return True
    return False


@contextmanager
def _explained(model: str) -> Iterator[None]:
    """Turn what the hub's client raises into an InputError that helps."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        yield
    except GatedRepoError as error:
        raise InputError(
            f"{model!r} is gated", why="Its licence must be accepted on the hub.", fix="Accept it, then set HF_TOKEN."
        ) from error
    except (LocalEntryNotFoundError, HFValidationError, OSError, RepositoryNotFoundError, EntryNotFoundError) as error:
        if offline():
            raise InputError(
                f"There is no model {model!r} on this machine.{did_you_mean_path(Path(model))}",
                why=f"It is no folder in {Path.cwd()} and not in the hub's cache, and the hub cannot be reached.",
                fix="Check the spelling, the network and HF_HUB_OFFLINE; or give a local folder or a .gguf file.",
            ) from error
        missing = isinstance(error, RepositoryNotFoundError)
        raise InputError(
            f"The model {model!r} was not found.{did_you_mean_path(Path(model))}"
            if missing
            else f"The model {model!r} could not be downloaded",
            why=f"It is no folder in {Path.cwd()}, and the hub says: {str(error).strip().splitlines()[0]}",
            fix="Check the spelling (owner/name), HF_TOKEN for private models, the network and HF_HUB_OFFLINE; "
            "or give a local folder or a .gguf file.",
        ) from error
