"""The same text becomes the same tokens: a converted model's tokenizer is held to its source's.

AutoTokenizer chooses a class by the `model_type` of config.json. It has no entry for `cla_*`, so there the class that
tokenizer_config.json declares wins, and many declared classes are wrong: they build their own pre-tokenizer over the
one of tokenizer.json and cut "2024" elsewhere. So an output declares the class that its source really loads with.
"""

from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..files import load_json, write_json
from . import probe
from .export import load_tokenizer
from .writer import read_manifest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONFIG = "tokenizer_config.json"
_FILES = ("tokenizer*", "vocab.*", "*.model", "*.tiktoken", "tekken*.json")


def has_tokenizer(folder: Path) -> bool:
    """Whether there is any file of a tokenizer in a model folder."""
    return any(file for pattern in _FILES for file in folder.glob(pattern))


def keep_tokenizer(source: Path, out: Path) -> dict[str, str]:
    """Let AutoTokenizer load the copied tokenizer in `out` as it loads the one in `source`.

    Returns:
        What the manifest keeps: the class, and a digest of the ids of `probe.TEXTS`; empty without a tokenizer.

    Raises:
        InputError: the source's tokenizer cannot be loaded, or the copy gives other ids.
    """
    if not has_tokenizer(source):
        return {}
    theirs = load_tokenizer(source)
    _declare(out, type(theirs).__name__)
    if difference(theirs, load_tokenizer(out)):
        theirs.save_pretrained(out)  # what only its class did to it is then in tokenizer.json
        _declare(out, "TokenizersBackend")
    if found := difference(theirs, load_tokenizer(out)):
        raise InputError(
            "The converted model would read text otherwise than its source",
            why=f"The tokenizer in {source} ({type(theirs).__name__}) loads differently beside the new config.json: "
            f"{found}.",
            fix="Load the source's tokenizer with AutoTokenizer, save_pretrained() it into the source's folder, and "
            "convert again.",
        )
    return {"class": type(theirs).__name__, "ids": probe.digest_of(theirs)}


def check_as_recorded(folder: Path) -> None:
    """Raise InputError if the tokenizer in an output does not give the ids recorded when it was converted."""
    recorded = recorded_ids(folder)
    if recorded is not None and recorded != probe.digest_of(load_tokenizer(folder)):
        raise InputError(
            f"The tokenizer in {folder} gives other ids than its source's gave at the conversion",
            why="Its files were changed, or this version of transformers loads them differently.",
            fix="Convert the source again, with the versions that will be used.",
        )


def recorded_ids(folder: Path) -> str | None:
    """The digest of ids that the conversion recorded in the manifest; None in outputs of versions that did not."""
    tokenizer = read_manifest(folder).get("tokenizer")
    return tokenizer.get("ids") if isinstance(tokenizer, dict) else None


def difference(one: "PreTrainedTokenizerBase", other: "PreTrainedTokenizerBase") -> str | None:
    """The first thing that two tokenizers do differently, for a person; None if they are alike."""
    texts = probe.texts_for(one)
    for text, left, right in zip(texts, probe.ids_of(one, texts), probe.ids_of(other, texts), strict=True):
        if left != right:
            return _told(text, one, other, left, right)
        if one.decode(left) != other.decode(left):
            return f"the ids of {text!r} decode to {one.decode(left)!r} and {other.decode(left)!r}"
    if one.all_special_ids != other.all_special_ids:
        return f"the special tokens are {one.all_special_tokens} and {other.all_special_tokens}"
    if one.get_vocab() != other.get_vocab():
        return "the vocabularies differ"
    return None if probe.chat_of(one) == probe.chat_of(other) else "the chat template gives other ids"


def segmentation_difference(one: "PreTrainedTokenizerBase", other: "PreTrainedTokenizerBase") -> str | None:
    """The first text that two tokenizers of one vocabulary cut differently; what they put around a text may differ."""
    for text in probe.TEXTS:
        left, right = (t.encode(text, add_special_tokens=False) for t in (one, other))
        if left != right:
            return _told(text, one, other, left, right)
    return None


def _told(text: str, one: Any, other: Any, left: list[int], right: list[int]) -> str:
    """Where the ids of a text part."""
    at = next(i for i, (a, b) in enumerate(zip_longest(left, right)) if a != b)
    first, second = (t.convert_ids_to_tokens(ids[at : at + 3]) for t, ids in ((one, left), (other, right)))
    return f"{text[:40]!r} is {len(left)} tokens against {len(right)}, {first} against {second} from token {at} on"


def _declare(out: Path, name: str) -> None:
    """Write the class into tokenizer_config.json; a file that says so already keeps its bytes.

    The source's own tokenizer code (`auto_map`) is not shipped and was not run, so nothing may ask for it.
    """
    path = out / CONFIG
    config = load_json(path) if path.exists() else {}
    declared = {key: value for key, value in config.items() if key != "auto_map"} | {"tokenizer_class": name}
    if declared != config:
        write_json(path, declared)
