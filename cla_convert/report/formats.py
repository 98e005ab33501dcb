"""How numbers and names are written: filters of the report's templates. `-` stands for what was not measured."""

import json
from collections import Counter
from typing import Any

import yaml

from ..console import human_bytes, human_count
from ..recipe_file import told
from .run_folder import Json

MISSING = "-"


def model_name(source: dict[str, Any] | None) -> str:
    """What to call the source model: its hub id, or the name of its file without folder and ending."""
    model = str((source or {}).get("model") or "source model")
    local = model.startswith((".", "/", "~", "package:")) or model.endswith(".gguf")
    return model.rsplit("/", 1)[-1].removesuffix(".gguf") if local else model


class Fenced(str):
    """Text for a fenced block of code, where Markdown and HTML mean nothing and lines stay lines."""


def guarded(value: Any) -> Any:
    """What a Markdown template prints: names and settings from outside are no HTML, no links, no pictures, no lines."""
    if isinstance(value, Fenced) or not isinstance(value, str):
        return value if isinstance(value, (Fenced, int, float)) or value is None else guarded(str(value))
    return value.replace("<", "&lt;").replace("](", "]\\(").replace("\r", " ").replace("\n", " ")


def cell(value: Any) -> str:
    """Text that comes from outside, safe inside a table cell."""
    text = MISSING if value is None else str(value)
    return text.replace("\\", "\\\\").replace("|", "\\|")


def fenced(value: Any) -> Fenced:
    """Text that cannot end the block of code it stands in."""
    return Fenced(str(value).replace("```", "'''"))


def quoted(value: str) -> Fenced:
    """A string of Python, for a block of code."""
    return fenced(json.dumps(value, ensure_ascii=False))


def changed(change: Json) -> str:
    """A resumption under other settings: the command alone does not give these weights."""
    what = "; ".join(told(**setting) for setting in change["changed"])
    return f"Resumed after step {change['step']} under other settings: {what}. The command alone does not repeat that."


def number(value: float | None, digits: int = 4) -> str:
    """Significant digits, thousands separated: 1234.5 -> 1,234 (4 digits)."""
    if value is None:
        return MISSING
    return f"{value:,.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}"


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


def interval(value: list[float] | None) -> str:
    """[1.5, 2.25] -> [+1.5, +2.25]."""
    return "" if value is None else f"[{value[0]:+.3g}, {value[1]:+.3g}]"


def change(value: float | None) -> str:
    """0.123 -> +12.3%; beyond a doubling as a factor: 15.9 -> x16.9."""
    if value is None:
        return MISSING
    return f"{100 * value:+.1f}%" if value < 1 else f"x{1 + value:.3g}"


def p_value(value: float | None) -> str:
    """Two digits, never a rounded 0."""
    if value is None:
        return MISSING
    return "<0.001" if value < 0.001 else f"{value:.2g}"


def ratio(before: float | None, after: float | None) -> str:
    """(23040, 12288) -> 1.88x smaller."""
    return MISSING if not before or not after else f"{before / after:.2f}x smaller"


def factor(before: float | None, after: float | None) -> str:
    """(48, 98) -> 2.04x as many."""
    return MISSING if not before or not after else f"{after / before:.2f}x as many"


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


def groups_text(sources: list[int] | None, width: int = 100) -> str:
    """[0, 1, 1, 3] -> `0 | 1 <- 2 | 3`, wrapped: each owner and the layers that read its K/V."""
    if not sources:
        return MISSING
    groups = {owner: [i for i, source in enumerate(sources) if source == owner] for owner in dict.fromkeys(sources)}
    lines, line = [], ""
    for owner, members in groups.items():
        text = str(owner) + "".join(f" <- {member}" for member in members if member != owner)
        if line and len(line) + len(text) + 3 > width:
            lines.append(line)
            line = ""
        line = f"{line} | {text}" if line else text
    return "\n".join([*lines, line])


def size(value: float | None) -> str:
    """46080 -> 45.0 KiB."""
    return MISSING if value is None else human_bytes(value)


def count(value: float | None) -> str:
    """26_000_000 -> 26M."""
    return MISSING if value is None else human_count(value)


def integer(value: float | None) -> str:
    """46080.0 -> 46,080."""
    return MISSING if value is None else f"{value:,.0f}"


def bracket(value: list[float] | None, scale: float = 1) -> str:
    """[0.012, 0.034] -> [0.012, 0.034]; for a level rather than a change."""
    return "" if not value else f"[{scale * value[0]:.3g}, {scale * value[1]:.3g}]"


def cla_cost(row: Json) -> str:
    """After minus control with its interval, of a row of the table of tasks."""
    cost = row.get("cla_cost") or {}
    return f"{points(cost.get('delta'))} {points_interval(cost.get('ci95'))}".strip()


def cost_interval(row: Json) -> str:
    """After minus control, of a row of the table of perplexities: `+0.31 [+0.2, +0.42]`; nothing without windows."""
    cost = row.get("cla_cost") or {}
    return "" if cost.get("delta") is None else f"{cost['delta']:+.3g} {interval(cost['ci95'])}".strip()


def found(cell: Json | None) -> str:
    """A cell of a grid: 0.75 -> 75.0."""
    return MISSING if cell is None else percent(cell["acc"])


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


def is_accuracy(metric: str) -> bool:
    """Whether a metric is a share of right answers, and not a perplexity or a likelihood."""
    return not metric.endswith(("perplexity", "likelihood")) and not metric.startswith("bits_per")
