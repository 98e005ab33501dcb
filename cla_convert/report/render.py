"""report.json -> report.md: formatting only, no number is computed here."""

from pathlib import Path
from typing import Any

import jinja2
import yaml

from ..console import human_bytes, human_count
from .run_folder import Json

TEMPLATES = Path(__file__).parent / "templates"
MISSING = "-"


def render(report: Json) -> str:
    """The page as Markdown that reads well unrendered."""
    return environment().get_template("report.md.j2").render(report=report)


def environment() -> jinja2.Environment:
    """Jinja with this module's filters. No HTML escaping: the output is Markdown; `cell` guards tables."""
    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    env.filters |= {
        "cell": cell, "percent": percent, "points": points, "points_interval": points_interval, "number": number,
        "p": p_value, "bytes": lambda value: MISSING if value is None else human_bytes(value), "ratio": ratio,
        "count": lambda value: MISSING if value is None else human_count(value), "yaml": to_yaml,
        "model_name": model_name,
        "groups": sharing_groups, "change": change, "interval": interval, "hardware": hardware_line,
    }  # fmt: skip
    return env


def model_name(source: dict[str, Any] | None) -> str:
    """What to call the source model: its hub id, or the name of its file without folder and ending."""
    model = str((source or {}).get("model") or "source model")
    local = model.startswith((".", "/", "~", "package:")) or model.endswith(".gguf")
    return model.rsplit("/", 1)[-1].removesuffix(".gguf") if local else model


def cell(value: Any) -> str:
    """Text that comes from outside, safe inside a table cell."""
    text = MISSING if value is None else str(value)
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def number(value: float | None, digits: int = 4) -> str:
    """Significant digits, thousands separated: 1234.5 -> 1,234 (4 digits)."""
    if value is None:
        return MISSING
    return f"{value:,.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}"


def percent(value: float | None) -> str:
    """0.4231 -> 42.3."""
    return MISSING if value is None else f"{100 * value:.1f}"


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


def sharing_groups(sources: list[int] | None, width: int = 100) -> str:
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
