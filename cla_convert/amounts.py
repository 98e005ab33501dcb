"""Numbers as people read them."""


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


def times(n: float) -> str:
    """How often, about: `0.1234` -> `0.12`, `2_388` -> `2.4k`."""
    return human_count(float(f"{n:.2g}"))


def passes(n: float) -> str:
    """`1` -> `1 pass`, `7.46` -> `7.5 passes`."""
    return f"{times(n)} {'pass' if times(n) == '1' else 'passes'}"


def clock(seconds: float) -> str:
    """`3723` -> `1:02:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
