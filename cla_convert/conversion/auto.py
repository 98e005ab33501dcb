"""`sharing: auto`: the map that costs least under a KV budget, by measurements on calibration text.

First what each group costs alone, once for all budgets; then the maps that look best by that, whole.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..console import progress, say
from ..files import read_kept
from ..kept import note
from ..models.checkpoint import Checkpoint
from ..models.fingerprint import fingerprint
from ..models.shape import AttentionShape
from ..version import __version__
from .initialisation import CalibrationText
from .search import candidate_groups, likely_maps, owners_for
from .sharing import groups_of, matched_groups, picture

if TYPE_CHECKING:
    from .sensitivity import Sensitivity

DEFAULT_BUDGET = 0.5
"""Share of the KV cache to keep where nothing else is asked for."""


@dataclass(frozen=True)
class Choice:
    """A sharing map and the measurements that it was chosen by."""

    kv_budget: float
    candidates: "list[Sensitivity]"
    """Whole maps, the winner first; `layers` is the map."""
    sensitivity: "list[Sensitivity]"
    """Of every group alone."""

    @property
    def kv_source_layers(self) -> list[int | None]:
        """The chosen map."""
        return list(self.candidates[0].layers)

    def to_json(self) -> dict[str, Any]:
        """For plan.json and `convert --json`."""
        return {
            "kv_budget": self.kv_budget,
            "expected_kl": round(self.candidates[0].kl, 5),
            "finalists": [
                {"kv_source_layers": found.layers, "kl": found.kl, "delta_nll": found.delta_nll}
                for found in self.candidates
            ],
            "damage": [asdict(entry) for entry in self.sensitivity],
        }

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> "Choice":
        """What `to_json` told of it."""
        from .sensitivity import Sensitivity

        maps = [Sensitivity(tuple(one["kv_source_layers"]), one["kl"], one["delta_nll"]) for one in told["finalists"]]
        groups = [Sensitivity(tuple(one["layers"]), one["kl"], one["delta_nll"]) for one in told["damage"]]
        return cls(told["kv_budget"], maps, groups)

    def render(self) -> str:
        """The table of sensitivities: a line for each first layer, a column for each size of group."""
        costs = {entry.group: entry.kl for entry in self.sensitivity}
        chosen = {tuple(group) for group in groups_of(self.kv_source_layers)}
        sizes = sorted({len(group) for group in costs})
        lines = ["sensitivity of sharing these layers alone, KL from the source in nats per token; * chosen"]
        for first in sorted({group[0] for group in costs}):
            row = {len(group): group for group in costs if group[0] == first}
            cells = [_cell(row.get(size), costs, chosen) for size in sizes]
            lines.append(f"            {''.join(cells)}".rstrip())
        lines.append(
            "candidates   whole maps, KL from the source in nats per token before uptraining; the first is chosen"
        )
        for found in self.candidates:
            first, *more = picture(found.layers).splitlines()
            lines += [f"      {found.kl:.3f} {first}", *(f"            {line}" for line in more)]
        return "\n".join(lines)


def choose(
    checkpoint: Checkpoint,
    shape: AttentionShape,
    kv_heads: int,
    kv_budget: float | None,
    calibration: CalibrationText,
    cache: Path,
) -> Choice:
    """Choose the map that costs least within `kv_budget`, a share of the source's KV cache.

    Fewer KV heads meet a part of it. Default: half of what they leave.

    Measurements are kept in the folder `cache`, under a hash of all that they depend on.

    Raises:
        InputError: the budget cannot be met, the family is not supported, or the text is too short.
    """
    from .candidates import measure_maps
    from .sensitivity import Search, measure_sensitivity

    kinds, left = shape.kinds, kv_heads / shape.num_key_value_heads
    budget = DEFAULT_BUDGET * left if kv_budget is None else kv_budget
    owners = owners_for(min(1.0, budget / left), len(shape.kv_layers))
    heads = [] if left == 1 else [kv_heads]
    largest = Search.default(calibration.first_device).largest
    sensitivity = _measured(
        "measuring groups", partial(measure_sensitivity, kinds=kinds, kv_heads=kv_heads), checkpoint, calibration,
        cache, [list(kinds), *heads], len(candidate_groups(kinds, largest, 1 if left < 1 else 2)),
    )  # fmt: skip
    maps = likely_maps({entry.group: entry.kl for entry in sensitivity}, kinds, owners)
    candidates = _measured(
        "measuring maps", partial(measure_maps, maps=maps, kv_heads=kv_heads), checkpoint, calibration, cache,
        [maps, *heads], sum(matched_groups(one, every=left < 1) for one in maps),
    )  # fmt: skip
    return Choice(budget, sorted(candidates, key=lambda found: found.kl), sensitivity)


def _measured(
    what: str,
    measure: "Callable[..., list[Sensitivity]]",
    checkpoint: Checkpoint,
    calibration: CalibrationText,
    cache: Path,
    subject: list[Any],
    groups: int,
) -> "list[Sensitivity]":
    """The result of `measure`, from `cache` if the same was measured before."""
    from .sensitivity import Search, Sensitivity

    search = Search.default(calibration.first_device)
    depends = [
        __version__,
        fingerprint(checkpoint.folder),
        *subject,
        calibration.digest,
        list(calibration.tokens.shape),
    ]
    depends += [calibration.seed, calibration.first_device.partition(":")[0], asdict(search)]
    file = cache / f"{hashlib.sha256(json.dumps(depends).encode()).hexdigest()[:16]}.json"
    if found := read_kept(file):
        say(f"{what}: done before, {file}")
        return [Sensitivity(tuple(entry.pop("layers")), **entry) for entry in found["damage"]]
    cache.mkdir(parents=True, exist_ok=True)
    with progress(groups * search.effort.steps, what, unit="step", counts="matching"):
        found = measure(
            checkpoint, checkpoint.config, tokens=calibration.tokens, search=search, device=calibration.device,
            seed=calibration.seed, spill=cache,
        )  # fmt: skip
    note(file, {"damage": [asdict(entry) for entry in found]})
    return found


def _cell(group: tuple[int, ...] | None, costs: dict[tuple[int, ...], float], chosen: set[tuple[int, ...]]) -> str:
    if group is None:
        return ""
    return f"{'-'.join(map(str, group)):>13} {costs[group]:.3f}{'*' if group in chosen else ' '}"
