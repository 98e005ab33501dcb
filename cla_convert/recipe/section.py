"""What every section of a recipe is made of: numbers with units, unknown keys refused, marks of what may change."""

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
_SIZES = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def parse_count(value: Any) -> Any:
    """`"26M"` -> 26_000_000 (k, M, B, T; decimals and underscores allowed); other types pass through to pydantic."""
    return _parse_number(value, _UNITS, "a number of tokens such as 500k, 26M or 2B")


def parse_size(value: Any) -> Any:
    """`"5GB"` -> 5_000_000_000 (KB, MB, GB, KiB, ...); other types pass through to pydantic."""
    return _parse_number(value, _SIZES, "a size such as 500MB or 5GB")


def _parse_number(value: Any, units: dict[str, int], expected: str) -> Any:
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*([\d_]+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", value)
    if not match or match[2].lower() not in units:
        raise ValueError(f"{value!r} is not {expected}")
    return round(float(match[1].replace("_", "")) * units[match[2].lower()])


Count = Annotated[int, BeforeValidator(parse_count), Field(ge=0, lt=2**62)]
Size = Annotated[int, BeforeValidator(parse_size), Field(gt=0)]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class OnResume:
    """What a change of a setting means where a run folder is continued; the mark of a field or a whole section.

    Without a mark a change is refused: what is there was made under the old value.
    """

    allowed: Literal["free", "named", "named before the first checkpoint"]


FREE = OnResume("free")
"""Changes no weight: as one likes, at any time."""
NAMED = OnResume("named")
"""Once --allow-change names it, while uptraining is not finished; the result records it."""
PLACES = OnResume("named before the first checkpoint")
"""The same, but it says what the number of a step means: not while uptraining is under way."""


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, docstrings under fields are their documentation."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_answer(cls, value: Any, info: ValidationInfo) -> Any:
        """`yes` is true to YAML, and true is 1 to pydantic."""
        annotation = str(cls.model_fields[info.field_name or ""].annotation)
        if isinstance(value, bool) and "bool" not in annotation:
            quotes = "; put it into quotes" if re.search(r"\bstr\b", annotation) else ""
            raise ValueError(f"must not be true or false, nor yes or no{quotes}")
        return value
