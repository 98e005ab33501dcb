"""What the stages leave behind, as types: the JSON files of a run folder, read and written as these.

Only what code relies on is named here; whatever else a file holds stays in it (`extra`) and is for the report.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from .errors import InputError
from .files import read_json, write_json

Json = dict[str, Any]


class Result(BaseModel):
    """Base of all results."""

    model_config = ConfigDict(extra="allow", frozen=True, protected_namespaces=())

    def to_json(self) -> Json:
        """The keys that it was made with."""
        return self.model_dump(exclude_unset=True)


R = TypeVar("R", bound=Result)


@dataclass(frozen=True)
class Stored(Generic[R]):
    """A JSON file, and the type of what it holds."""

    path: Path
    kind: type[R]

    def read(self) -> R | None:
        """What it holds; None where there is no file. Raises InputError, naming it, if it is damaged."""
        value = read_json(self.path)
        try:
            return None if value is None else self.kind.model_validate(value)
        except ValidationError as error:
            found = error.errors()[0]
            raise InputError(
                f"{self.path} is damaged",
                why=f"{'.'.join(map(str, found['loc']))}: {found['msg']}.",
                fix="Restore or remove it.",
            ) from error

    def write(self, result: R) -> R:
        """Write it, whole or not at all."""
        write_json(self.path, result.to_json())
        return result


class Change(Result):
    """A number of the source and of the converted model."""

    before: int
    after: int


class PlanResult(Result):
    """plan.json and `convert --dry-run --json`: what a conversion will do."""

    source: Json
    sharing: str
    init: str
    kv_source_layers: list[int | None]
    groups: list[Json]
    kv_bytes_per_token: Change
    parameters: Change
    output_bytes: int
    memory_bytes: int
    warnings: list[str]
    auto: Json | None = None
    """What `sharing: auto` measured."""


class ConvertResult(PlanResult):
    """convert.json and `convert --json`: what it did."""

    output: str
    model_fingerprint: str = ""
    """Of the converted model."""
    seconds: float
    peak_rss_bytes: int


class TrainResult(Result):
    """train.json and `uptrain --json`."""

    tokens: int
    steps: int
    seconds: float
    tokens_per_second: float
    objective: str
    loss: float | None
    first_loss: float | None
    validation: list[Json]
    """Rows of metrics.jsonl that hold a validation."""
    processes: int
    data_digest: str


class PointResult(Result):
    """eval/<point>/results.json: the tasks at one point, and what fixes their measurement."""

    model: str
    model_fingerprint: str
    tasks: dict[str, dict[str, float | None]]
    """Task -> metric -> value."""
    n: dict[str, int]
    specification_hash: str
    seconds: float


class KvCache(Result):
    """eval/<point>/kv_cache.json: the cache of a real `generate`."""

    bytes_per_token: float
    measured_bytes: int
    model_fingerprint: str = ""
    """Of the model that was measured."""


class Domains(Result):
    """eval/domains.json: which texts of the domain pack, and which text files, the run's text touched."""

    text: str
    """Hash of the run's text."""
    domains: dict[str, Json]
    texts: dict[str, Json] = {}
    """The same of text files, by name; `rows` is a hash of the tokens that were looked at."""


class Invocation(Result):
    """Under what one or more stages of a run were made; what was interrupted and resumed under other is in both."""

    began: str | None = None
    command: str | None = None
    versions: dict[str, str] = {}
    hardware: Json | None = None
    device: str | None = None
    stages: dict[str, float] = {}
    """Seconds by stage."""


class Environment(Result):
    """environment.json: where and how a run was made. Its presence marks a folder as a run.

    Beside what is named here it holds what the last invocation that made something holds.
    """

    stages: dict[str, float] = {}
    """Seconds by stage, added up over resumed runs."""
    invocations: list[Invocation] = []
    """In order of time; each another command, other versions, another machine or device."""
