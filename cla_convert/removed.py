"""Settings that earlier releases had: a value that asked for nothing is dropped, any other is refused with a reason.

Run folders hold every setting of the release that made them, so what was left at its default must stay readable.
"""

from dataclasses import dataclass
from typing import Any

from .errors import UsageError


@dataclass(frozen=True)
class Removed:
    """A setting that is gone, or some of its values."""

    section: str
    key: str
    gone: tuple[str, ...]
    """Values that are refused."""
    harmless: tuple[str, ...]
    """Values that mean what happens anyway; they are dropped."""
    why: str
    fix: str


REMOVED = (
    Removed(
        "train", "optimizer", ("muon",), ("adamw",),
        "Muon was no better than AdamW in any run, and ended one with a CUDA error (docs/measurements.md).",
        "Leave it out: AdamW is the optimiser.",
    ),
    Removed(
        "train", "document_masking", ("flex",), (),
        "FlexAttention had not finished compiling when its one trial on a GPU was stopped.",
        "Use true, which keeps documents apart by a mask, or false.",
    ),
)  # fmt: skip


def without_removed(tree: dict[str, Any]) -> dict[str, Any]:
    """A recipe's tree without removed settings. Raises UsageError for one that asks for something."""
    for removed in REMOVED:
        section = tree.get(removed.section)
        if not isinstance(section, dict) or not isinstance(value := section.get(removed.key), str):
            continue
        if value in removed.gone:
            raise UsageError(f"There is no {removed.section}.{removed.key}: {value} any more", removed.why, removed.fix)
        if value in removed.harmless:
            kept = {key: item for key, item in section.items() if key != removed.key}
            tree = tree | {removed.section: kept}
    return tree
