"""Publishing a finished output folder on the Hugging Face hub. Imports no torch."""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..console import say
from ..errors import ClaError, InputError, Interrupted, Stopped, UsageError
from ..files import load_json, write_json
from .writer import MANIFEST

_REPLACED = ["*.safetensors", "*.safetensors.index.json", "*.py"]
"""Deleted in the repository if the new folder lacks them: beside new shards, transformers would load an old file."""
_WEIGHTS = (".safetensors", ".bin", ".gguf")
_TOKENS = "https://huggingface.co/settings/tokens"


@dataclass(frozen=True)
class Destination:
    """A model repository on the hub."""

    repo: str
    """`owner/name`, or a name alone: then the token's user is the owner."""
    private: bool = False
    """Create it private. One that exists keeps its visibility, so a public one is refused."""

    def checked(self) -> "Destination":
        """Find out now what would otherwise fail after hours of work: the name, the token, the network.

        Returns the destination with the full name of the repository.

        Raises:
            UsageError: the hub allows no such name.
            InputError: the hub is switched off or out of reach, the token is missing, wrong or may not write there, or
                the repository holds something that an upload must not touch.
        """
        from huggingface_hub import HfApi, constants
        from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
        from huggingface_hub.utils import validate_repo_id

        try:
            validate_repo_id(self.repo)
        except HFValidationError as error:
            raise UsageError(
                f"--push-to-hub: {self.repo!r} is not a repository name", str(error), "owner/name"
            ) from error
        if constants.HF_HUB_OFFLINE:
            raise InputError(
                "Nothing can be uploaded", why="HF_HUB_OFFLINE is set.", fix="Unset it, or leave --push-to-hub out."
            )
        api = HfApi()
        with _explained(self.repo):
            full = replace(self, repo=_writable(self.repo, api.whoami()))
            with suppress(RepositoryNotFoundError):  # it will be created
                self._check_existing(api.model_info(full.repo))
        return full

    def upload(self, folder: Path) -> str:
        """Upload all files of `folder` and return the address; the folder stays as it is, whatever happens.

        Raises:
            InputError: it failed; the error says how to repeat the upload alone.
            Interrupted: the same, stopped by the user.
        """
        from huggingface_hub import HfApi

        api = HfApi()
        say(f"uploading {folder} to {self.repo}")
        fix = f"To repeat the upload alone: {self.command(folder)}"
        try:
            url = api.create_repo(self.repo, private=self.private or None, exist_ok=True)
            api.upload_folder(
                repo_id=url.repo_id,
                folder_path=folder,
                commit_message="Upload with cla-convert",
                delete_patterns=_REPLACED,
            )
        except (Interrupted, Stopped) as error:
            raise Interrupted(f"Interrupted while uploading; {folder} is whole", fix=fix) from error
        except Exception as error:  # the client raises what its HTTP library does, and RuntimeError, ValueError, ...
            raise InputError(f"The upload to {self.repo!r} failed; {folder} is whole", _reason(error), fix) from error
        say(f"uploaded: {url}")
        return str(url)

    def command(self, folder: Path) -> str:
        """What repeats the upload, with the hub's own command line."""
        options = ["--private"] if self.private else []
        options += [word for pattern in _REPLACED for word in ("--delete", pattern)]
        return shlex.join(["hf", "upload", self.repo, str(folder), ".", *options])

    def _check_existing(self, found: Any) -> None:
        files = [file.rfilename for file in found.siblings or []]
        if any(file.endswith(_WEIGHTS) for file in files) and MANIFEST not in files:
            raise InputError(
                f"The model {found.id!r} on the hub will not be replaced",
                why=f"It has no {MANIFEST}, so it was not made by cla-convert.",
                fix="Give --push-to-hub another name.",
            )
        if self.private and found.private is False:
            raise InputError(
                f"{found.id!r} exists and is public",
                why="--private counts for new repositories; the hub would show the upload to everybody.",
                fix="Make it private in its settings, or give another name.",
            )


def _writable(repo: str, user: dict[str, Any]) -> str:
    """The full name of `repo`. Raises InputError if the token cannot write there, as far as the hub tells."""
    role = user.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise InputError("The token in use can only read", fix=f"Make one with write permission: {_TOKENS}")
    name = repo if "/" in repo else f"{user['name']}/{repo}"
    owners = [user["name"], *(organisation["name"] for organisation in user.get("orgs", []))]
    if role == "write" and name.split("/")[0] not in owners:  # a fine-grained token need not see all of them
        raise InputError(
            f"The token in use cannot write to {name!r}",
            why=f"It belongs to {user['name']!r}, who may write to: {', '.join(owners)}.",
            fix="Give one of these as the owner, or set HF_TOKEN to another token.",
        )
    return name


@contextmanager
def _explained(repo: str) -> Iterator[None]:
    """Turn what the hub's client raises into an InputError that helps."""
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    fix = f"Set HF_TOKEN to a token with write permission ({_TOKENS}), or run: hf auth login"
    try:
        yield
    except ClaError:
        raise
    except LocalTokenNotFoundError as error:
        raise InputError(f"There is no token to upload to {repo!r} with", fix=fix) from error
    except HfHubHTTPError as error:
        refused = error.response is not None and error.response.status_code in (401, 403)
        what = "The hub does not accept the token" if refused else f"The hub does not answer for {repo!r}"
        raise InputError(what, _reason(error), fix if refused else "Try again later.") from error
    except Exception as error:  # no network: an error of the HTTP library, which is not always the same one
        raise InputError(
            "The hub cannot be reached",
            _reason(error),
            "Check the network and HF_ENDPOINT, or leave --push-to-hub out.",
        ) from error


def _reason(error: BaseException) -> str:
    """What went wrong, in a line: the innermost cause is what the others only wrap."""
    while error.__cause__ is not None:
        error = error.__cause__
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextmanager
def without_local_source(folder: Path) -> Iterator[None]:
    """Inside, the manifest names no path of this machine: others have no use for it. Here, `uptrain` finds the teacher
    by it, so afterwards it is there again; but not after an error, for what repeats the upload would publish it.
    """
    manifest = load_json(folder / MANIFEST)
    source = manifest.get("source")
    if not isinstance(source, dict) or not Path(str(source.get("model") or "")).is_absolute():
        yield
        return
    write_json(folder / MANIFEST, manifest | {"source": source | {"model": None}})
    yield
    write_json(folder / MANIFEST, manifest)
