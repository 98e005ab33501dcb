"""Settings of a recipe whose values are names in a registry."""

from dataclasses import dataclass
from typing import Any

from pydantic import GetCoreSchemaHandler
from pydantic_core.core_schema import CoreSchema, no_info_after_validator_function

from .errors import UsageError
from .registry import Registry, registry_at


@dataclass(frozen=True)
class OneOf:
    """In an annotation: a name that the registry at `place` accepts."""

    place: str

    @property
    def registry(self) -> Registry[Any]:
        """Found when a value is looked at, and not before."""
        return registry_at(self.place)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return no_info_after_validator_function(self._check, handler(source))

    def _check(self, value: Any) -> Any:
        if isinstance(value, str):
            try:
                self.registry.check(value)
            except UsageError as error:
                raise ValueError(f"{error.what} {error.fix}") from error
        return value
