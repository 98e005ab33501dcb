"""Output conventions: data on stdout, everything else (progress, notes, warnings, errors) on stderr."""

import json
import os
import sys
from pathlib import Path
from typing import Any

from .errors import ClaError


def mute() -> None:
    """Print nothing any more, whoever asks: one of several processes speaks for all."""
    sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115  (as long as the process lives)


def unmute() -> None:
    """Undo `mute`: this process has something to say that no other one said."""
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__


_quiet = False


def hush(wanted: bool = True) -> None:
    """Say nothing but warnings and errors from now on, and show no progress (`-q`)."""
    global _quiet
    _quiet = wanted


def quiet() -> bool:
    """Whether it was hushed."""
    return _quiet


def say(message: str = "") -> None:
    """Print a note for the person watching (stderr)."""
    if not _quiet:
        _tell(message)


def warn(message: str) -> None:
    """Print a warning (stderr)."""
    _tell(f"warning: {message}")


def _tell(message: str) -> None:
    if bars := sys.modules.get("tqdm"):  # a bar may stand in the line: it makes room and comes back below
        bars.tqdm.write(message, file=sys.stderr)
        sys.stderr.flush()
    else:
        print(message, file=sys.stderr, flush=True)


def data(text: str) -> None:
    """Print a result (stdout)."""
    # What a file says may hold lone surrogates, and a terminal may know less than Unicode.
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, errors="backslashreplace").decode(encoding), flush=True)


def data_json(value: dict[str, Any]) -> None:
    """Print one JSON object (stdout), for `--json`."""
    data(json.dumps(value, indent=2, ensure_ascii=False))


def fail(error: ClaError) -> None:
    """Print a user's error as what / why / how to fix (stderr)."""
    label = "error:"
    if sys.stderr.isatty() and "NO_COLOR" not in os.environ:
        label = f"\033[1;31m{label}\033[0m"
    _tell(f"{label} {error.what}")
    if error.why:
        _tell(f"  why: {error.why}")
    if error.fix:
        _tell(f"  fix: {error.fix}")


def debug() -> bool:
    """Whether CLA_DEBUG asks for tracebacks."""
    return os.environ.get("CLA_DEBUG", "") not in ("", "0")


def progress(total: int, desc: str, unit: str = "it", initial: int = 0, **options: Any) -> Any:
    """Return a tqdm bar on stderr with rate and ETA; in a log file it refreshes every 10 s only."""
    from tqdm import tqdm

    interval = 0.2 if sys.stderr.isatty() else 10.0
    options.setdefault("disable", _quiet)
    return tqdm(
        total=total, desc=desc, unit=unit, initial=initial, mininterval=interval, maxinterval=max(interval, 10.0),
        dynamic_ncols=True, unit_scale=total >= 10_000, file=sys.stderr, **options,
    )  # fmt: skip


def human_bytes(n: float) -> str:
    """`23040` -> `22.5 KiB`."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(n) < 1024 or unit == "TiB":
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    raise AssertionError


def human_count(n: float) -> str:
    """`26_000_000` -> `26M`; three significant digits, in the units of a recipe."""
    n = float(f"{n:.3g}")  # first: 999,999 are 1M
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(n) >= size:
            return f"{n / size:.3g}{unit}"
    return f"{n:.3g}"
