"""`sharing: auto`: measure what each group costs on calibration text, once, and choose the map under a KV budget."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..console import progress, say
from ..files import read_json, write_json
from ..models.checkpoint import Checkpoint
from .search import choose_map, owners_for
from .sharing import groups_of

if TYPE_CHECKING:
    from .convert import Calibration
    from .damage import Damage


@dataclass(frozen=True)
class Choice:
    """A sharing map and the measurements that it was chosen by."""

    kv_budget: float
    kv_source_layers: list[int]
    damage: "list[Damage]"

    @property
    def expected(self) -> float:
        """Nats per token that the map's groups cost in sum."""
        costs = {entry.layers: entry.kl for entry in self.damage}
        return sum(costs[tuple(group)] for group in groups_of(self.kv_source_layers) if len(group) > 1)

    def to_json(self) -> dict[str, Any]:
        """For plan.json and `convert --json`."""
        return {
            "kv_budget": self.kv_budget,
            "expected_kl": round(self.expected, 5),
            "damage": [asdict(entry) for entry in self.damage],
        }

    def render(self) -> str:
        """The damage table: a line for each first layer, a column for each size of group."""
        costs = {entry.layers: entry.kl for entry in self.damage}
        chosen = {tuple(group) for group in groups_of(self.kv_source_layers)}
        sizes = sorted({len(group) for group in costs})
        lines = ["damage      of sharing these layers alone, KL from the source in nats per token; * chosen"]
        for first in sorted({group[0] for group in costs}):
            row = {len(group): group for group in costs if group[0] == first}
            cells = [_cell(row.get(size), costs, chosen) for size in sizes]
            lines.append(f"            {''.join(cells)}".rstrip())
        return "\n".join([*lines, f"expected    {self.expected:.3f} nats per token before uptraining"])


def choose(
    checkpoint: Checkpoint, kinds: Sequence[str], kv_budget: float, calibration: "Calibration", cache: Path
) -> Choice:
    """Choose the map that costs least within `kv_budget`, a share of the source's KV cache.

    Measurements are kept in the folder `cache`, under a hash of all that they depend on.

    Raises:
        InputError: the budget cannot be met, the family is not supported, or the text is too short.
    """
    owners = owners_for(kv_budget, len(kinds))
    damage = _measured(checkpoint, kinds, calibration, cache)
    sources = choose_map({entry.layers: entry.kl for entry in damage}, kinds, owners)
    return Choice(kv_budget, sources, damage)


def _measured(checkpoint: Checkpoint, kinds: Sequence[str], calibration: "Calibration", cache: Path) -> "list[Damage]":
    from .damage import Damage, Search, measure_damage

    search = Search.default(calibration.device)
    depends = [__version__, checkpoint.fingerprint(), list(kinds), calibration.digest, list(calibration.tokens.shape)]
    depends += [calibration.seed, calibration.device.partition(":")[0], asdict(search)]
    file = cache / f"{hashlib.sha256(json.dumps(depends).encode()).hexdigest()[:16]}.json"
    if found := read_json(file):
        say(f"damage of each group: measured before, {file}")
        return [Damage(tuple(entry.pop("layers")), **entry) for entry in found["damage"]]
    with progress(len(kinds), "measuring what each group costs", unit="layer") as bar:
        damage = measure_damage(
            checkpoint, checkpoint.config, kinds, calibration.tokens, search=search, device=calibration.device,
            seed=calibration.seed, on_progress=lambda done, _: bar.update(done - bar.n),
        )  # fmt: skip
    cache.mkdir(parents=True, exist_ok=True)
    write_json(file, {"damage": [asdict(entry) for entry in damage]})
    return damage


def _cell(group: tuple[int, ...] | None, costs: dict[tuple[int, ...], float], chosen: set[tuple[int, ...]]) -> str:
    if group is None:
        return ""
    return f"{'-'.join(map(str, group)):>13} {costs[group]:.3f}{'*' if group in chosen else ' '}"
