"""How numbers and names are written, everywhere the same. `-` stands for what was not measured."""

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import yaml

from ..console import human_bytes, human_count
from ..models.shape import owners_of
from ..recipe_file import told
from .run_folder import Json

MISSING = "-"
_LOST = 1e7
"""From here on digits tell nobody anything, and have no room on a phone."""


def model_name(source: dict[str, Any] | None) -> str:
    """What to call the source model: its hub id, or the name of its file without folder and ending."""
    model = str((source or {}).get("model") or "source model")
    local = model.startswith((".", "/", "~", "package:")) or model.endswith(".gguf")
    return model.rstrip("/").rsplit("/", 1)[-1].removesuffix(".gguf") if local else model


def quoted(value: str) -> str:
    """A string of Python."""
    return json.dumps(value, ensure_ascii=False)


def changed(change: Json) -> str:
    """A resumption under other settings: the command alone does not give these weights."""
    what = "; ".join(told(**setting) for setting in change["changed"])
    return f"Resumed after step {change['step']} under other settings: {what}. The command alone does not repeat that."


def resumed(change: Json) -> str:
    """A resumption with other versions or processes: these weights are of both."""
    what = ", ".join(f"{one['name']} {one['after']} (before: {one['before']})" for one in change["changed"])
    return f"Resumed after step {change['step']} with {what}: equal but for rounding, at best."


def number(value: float | None, digits: int = 4) -> str:
    """Significant digits, thousands separated: 1234.5 -> 1,234 (4 digits); of a lost model 1.14e+10."""
    if value is None:
        return MISSING
    if abs(value) >= _LOST:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}"


def signed(value: float | None, digits: int = 3) -> str:
    """A difference: 13.456 -> +13.5, -50000 -> -50,000."""
    text = number(value, digits)
    return f"+{text}" if value is not None and value >= 0 else text


def percent(value: float | None) -> str:
    """0.4231 -> 42.3."""
    return MISSING if value is None else f"{100 * value:.1f}"


def yes_no(value: bool | None) -> str:
    """True -> yes."""
    return MISSING if value is None else "yes" if value else "no"


def points(value: float | None) -> str:
    """-0.021 -> -2.1 (percentage points)."""
    return MISSING if value is None else f"{100 * value:+.1f}"


def points_interval(value: list[float] | None) -> str:
    """[-0.08, 0.04] -> [-8.0, +4.0]."""
    return "" if value is None else f"[{100 * value[0]:+.1f}, {100 * value[1]:+.1f}]"


def change(value: float | None) -> str:
    """0.123 -> +12.3%; beyond a doubling as a factor: 15.9 -> x16.9."""
    if value is None:
        return MISSING
    return f"{100 * value:+.1f}%" if value < 1 else f"x{number(1 + value, 3)}"


def changes(values: Sequence[float | None]) -> list[str]:
    """Changes that stand beside each other, in one unit: as factors where one of them is more than a doubling."""
    if not any(value is not None and value >= 1 for value in values):
        return [change(value) for value in values]
    return [MISSING if value is None else f"x{number(1 + value, 3)}" for value in values]


def change_interval(value: float | None, ci95: Sequence[float] | None) -> tuple[str, str]:
    """A change and its interval: 0.9, [0.2, 1.5] -> x1.9, [x1.2, x2.5]."""
    said, *ends = changes([value, *(ci95 or [])])
    return said, f"[{', '.join(ends)}]" if ends else ""


def p_value(value: float | None) -> str:
    """Two digits, never a rounded 0."""
    if value is None:
        return MISSING
    return "<0.001" if value < 0.001 else f"{value:.2g}"


def smaller(ratio: float | None) -> str:
    """1.875 -> 1.88x smaller."""
    return MISSING if ratio is None else f"{ratio:.2f}x smaller"


def as_many(factor: float | None) -> str:
    """2.04 -> 2.04x as many."""
    return MISSING if factor is None else f"{factor:.2f}x as many"


def times(value: float | None) -> str:
    """1.0732 -> 1.07x."""
    return MISSING if value is None else f"{value:.2f}x"


def rate(row: Json | None) -> str:
    """A row of a bench: `71.3 (62.4 - 107)`, or that it does not fit."""
    if row is None:
        return MISSING
    if not row["fits"]:
        return "does not fit"
    if len(row["runs"]) == 1:
        return number(row["tokens_per_second"], 3)
    return f"{number(row['tokens_per_second'], 3)} ({number(row['low'], 3)} - {number(row['high'], 3)})"


def hardware_line(hardware: Any) -> str:
    """`{"cpu": "X", "cores": 2, "memory_bytes": 8589934592, "gpus": []}` -> `cpu X, cores 2, memory 8.0 GiB`."""
    if not isinstance(hardware, dict):
        return str(hardware)
    parts = []
    for name, value in hardware.items():
        if name.endswith("_bytes"):
            name, value = name.removesuffix("_bytes"), human_bytes(value)
        text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        if text:
            parts.append(f"{name} {text}")
    return ", ".join(parts)


def to_yaml(value: Any) -> str:
    """Settings as YAML."""
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=110).strip()


def groups_text(sources: list[int | None] | None, width: int = 100) -> str:
    """[0, 1, 1, 3] -> `0 | 1 <- 2 | 3`, wrapped: each owner and the layers that read its K/V."""
    if not sources:
        return MISSING
    groups = {owner: [i for i, source in enumerate(sources) if source == owner] for owner in owners_of(sources)}
    lines, line = [], ""
    for owner, members in groups.items():
        text = str(owner) + "".join(f" <- {member}" for member in members if member != owner)
        if line and len(line) + len(text) + 3 > width:
            lines.append(line)
            line = ""
        line = f"{line} | {text}" if line else text
    return "\n".join([*lines, line])


def owners_text(sources: list[int | None]) -> str:
    """[0, 1, 1, 3] -> `3 of 4 layers`; of a hybrid, only layers with attention count."""
    readers = sum(source is not None for source in sources)
    return f"{len(owners_of(sources))} of {readers} layers" + (" with attention" if readers < len(sources) else "")


def size(value: float | None) -> str:
    """46080 -> 45.0 KiB."""
    return MISSING if value is None else human_bytes(value)


def count(value: float | None) -> str:
    """26_000_000 -> 26M."""
    return MISSING if value is None else human_count(value)


def integer(value: float | None) -> str:
    """46080.0 -> 46,080."""
    return MISSING if value is None else f"{value:,.0f}"


def bracket(value: list[float] | None) -> str:
    """[0.0123, 0.0345] -> [0.0123, 0.0345]; for a level rather than a change."""
    return "" if not value else f"[{number(value[0], 3)}, {number(value[1], 3)}]"


def percent_interval(value: list[float] | None) -> str:
    """[0.62, 0.681] -> [62.0, 68.1]."""
    return "" if not value else f"[{percent(value[0])}, {percent(value[1])}]"


def plural(number: int, word: str) -> str:
    """(6, task) -> 6 tasks."""
    return f"{number} {word}{'' if number == 1 else 's'}"


def cla_cost(cost: Json | None) -> str:
    """After minus control in points of accuracy, with its interval."""
    return f"{points(cost.get('delta'))} {points_interval(cost.get('ci95'))}".strip() if cost else MISSING


def layer_bytes(layers: list[float]) -> str:
    """[1536, 0, 1536, 768] -> 2 x 1,536 + 1 x 768 bytes; layers that cache nothing are left out."""
    sizes = Counter(size for size in layers if size)
    return " + ".join(f"{times} x {size:,.0f}" for size, times in sizes.items()) + " bytes"


def duration(seconds: float | None) -> str:
    """225.3 -> 3 min 45 s."""
    if seconds is None:
        return MISSING
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def stage(point: str | None) -> str:
    """When the model that is compared with the source was measured."""
    return {"after": "after uptraining", "converted": "right after conversion"}.get(point or "", "")


def titled(name: str) -> str:
    """held_out -> held-out; any other name stays."""
    return "held-out" if name == "held_out" else name


def unit_of(metric: str, kind: str | None = None) -> str:
    """What a metric of lm-eval is in: share (of right answers), perplexity, nats, bits or number.

    Args:
        metric: its name, with a filter behind a comma perhaps.
        kind: of a comparison: a metric that was 0 or 1 at every document is a share whatever it is called.
    """
    name = metric.partition(",")[0]
    for ending, unit in (("perplexity", "perplexity"), ("likelihood", "nats"), ("_nll", "nats")):
        if name.endswith(ending):
            return unit
    if name.startswith("bits_per"):
        return "bits"
    return "share" if kind == "binary" or name in SHARES else "number"


SHARES = frozenset(
    {"acc", "acc_norm", "acc_mutual_info", "acc_bytes", "acc_all", "exact_match", "em", "f1", "mc1", "mc2"}
)
"""Metrics that lie between 0 and 1, 1 being right."""
