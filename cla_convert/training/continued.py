"""Whether a run may go on from a checkpoint: what has changed since, and what its user can do about it."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ..recipe import PLACES, is_setting, on_resume
from ..recipe_file import is_named, told

_THINGS = {"model": "the model to train", "teacher": "the teacher", "data": "the text and its settings (data)"}
"""Parts of an identity that are told by what they hold; a user can put them back like a setting."""
_WITH = {"train.hidden_distance": {"train.hidden_weight", "train.loss"}}
"""What is no setting and is there only under some values of settings, which are told in its place."""


def differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What changed between two identities: name, before and after of each."""
    names = {name for name in saved.keys() | current.keys() if saved.get(name) != current.get(name)}
    on_one_side = {name for name in names if name not in saved or name not in current}
    follow = {name for name in on_one_side if names & _WITH.get(name, set())}
    return [{"name": name, "before": saved.get(name), "after": current.get(name)} for name in sorted(names - follow)]


def changes_told(changes: Sequence[Mapping[str, Any]]) -> str:
    """All of them, for a person."""
    return "; ".join(told(**change) for change in changes)


def refused(changes: Sequence[Mapping[str, Any]], allowed: Collection[str]) -> list[Mapping[str, Any]]:
    """Those with which a run cannot go on, unless its user says so or does something."""
    return [change for change in changes if _is_fixed(change["name"]) or not is_named(change["name"], allowed)]


def ways_on(names: Sequence[str]) -> str:
    """What can be done about changes that are refused."""
    fixed, free = [n for n in names if _is_fixed(n)], [n for n in names if not _is_fixed(n)]
    ways = [] if any(map(_is_ours, names)) else [f"{_put_back(names)} to resume"]
    if free:
        first, what = (f"{_put_back(fixed)} and ", ", ".join(free)) if fixed else ("", _it(free))
        ways.append(f"{first}accept {what} with {' '.join(f'--allow-change {name}' for name in free)}")
    ways += ["give another folder", "or start over (uptrain: --no-resume; run: --overwrite)."]
    text = ", ".join(ways)
    return text[0].upper() + text[1:]


def not_settings(names: Sequence[str]) -> str:
    """That no recipe can bring something back, as a sentence of its own; nothing where one can."""
    ours = [name for name in names if _is_ours(name)]
    return f". No setting: {', '.join(ours)}; this version of cla-convert does it otherwise" if ours else ""


def _put_back(names: Sequence[str]) -> str:
    return " and ".join(f"put {_THINGS[n]} back as before" if n in _THINGS else f"set {n} back" for n in names)


def _it(names: Sequence[str]) -> str:
    return "it" if len(names) == 1 else "them"


def _is_ours(name: str) -> bool:
    """Whether it is neither a setting nor a thing of the user's: a version of cla-convert decides it."""
    return name not in _THINGS and not is_setting(name)


def _is_fixed(name: str) -> bool:
    """A run whose weights or place in the data mean something else is not this run any more."""
    return name == "model" or on_resume(name) is PLACES
