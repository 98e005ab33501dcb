"""Which layers should share? The cheapest map under a KV budget, exactly, given what each group alone costs.

That costs add up over groups is an approximation. So a few likely maps are chosen here, and measured whole before one
of them is taken (`candidates.py`).
"""

import math
from collections.abc import Mapping, Sequence

from ..errors import InputError
from ..models.kinds import has_kv
from ..models.shape import owners_of
from .sharing import sharing_map

Group = tuple[int, ...]
Plans = dict[int, tuple[float, list[Group]]]
"""Number of owners -> cheapest cost and its groups."""


def owners_for(kv_budget: float, num_layers: int) -> int:
    """How many layers may own K/V within `kv_budget`, a share of the source's KV cache in (0, 1]."""
    if not 0 < kv_budget <= 1:
        raise InputError(f"kv_budget {kv_budget} is not a share of the KV cache", fix="Give a number in (0, 1].")
    return max(1, math.floor(kv_budget * num_layers + 1e-9))


def candidate_groups(kinds: Sequence[str], largest: int, smallest: int = 2) -> list[Group]:
    """All groups of `smallest` to `largest` layers that are neighbours within their attention kind."""
    sequences = _by_kind(kinds)
    return sorted(
        tuple(sequence[start : start + size])
        for sequence in sequences
        for size in range(smallest, largest + 1)
        for start in range(len(sequence) - size + 1)
    )


def likely_maps(costs: Mapping[Group, float], kinds: Sequence[str], owners: int) -> list[list[int | None]]:
    """Maps worth measuring, each once: the cheapest one, the cheapest ones of smaller groups, and plain patterns.

    Where errors compound, smaller groups or equal ones can beat the sum's winner. Of the patterns `cla<k>` and
    `cla<k>-keep-ends` those that use most of the budget are taken.

    Raises:
        InputError: see `choose_map`.
    """
    maps = [choose_map(costs, kinds, owners)]
    sizes = range(max(map(len, costs), default=1), 1, -1)
    maps += [found for size in sizes if (found := _cheapest(_up_to(size, costs), kinds, owners))]
    names = (f"cla{size}{ends}" for size in sizes for ends in ("", "-keep-ends"))
    patterns = [found for name in names if len(owners_of(found := sharing_map(name, kinds))) <= owners]
    most = max((len(owners_of(found)) for found in patterns), default=0)
    maps += [found for found in patterns if len(owners_of(found)) == most]
    return [found for i, found in enumerate(maps) if found not in maps[:i]]


def choose_map(costs: Mapping[Group, float], kinds: Sequence[str], owners: int) -> list[int | None]:
    """The sharing map with at most `owners` owners whose groups' costs add up to least. Exact (dynamic programme).

    Every attention kind has its share of the owners, rounded up: beyond the window of sliding layers only full ones
    grow, and a budget met by sharing sliding layers alone would save next to nothing at long contexts.

    Raises:
        InputError: no partition into the groups in `costs` (and single layers, which cost nothing unless it says
            otherwise) has so few owners.
    """
    if found := _cheapest(costs, kinds, owners):
        return found
    raise InputError(
        f"No sharing map has only {owners} of {_with_kv(kinds)} layers own K/V",
        why=f"At least {_fewest(costs, kinds)} are needed with the groups that were measured.",
        fix="Raise kv_budget.",
    )


def _up_to(size: int, costs: Mapping[Group, float]) -> dict[Group, float]:
    return {group: cost for group, cost in costs.items() if len(group) <= size}


def _fewest(costs: Mapping[Group, float], kinds: Sequence[str]) -> int:
    return next(owners for owners in range(1, len(kinds) + 1) if _cheapest(costs, kinds, owners))


def _cheapest(costs: Mapping[Group, float], kinds: Sequence[str], owners: int) -> list[int | None] | None:
    feasible = [plan for count, plan in _plans(costs, kinds, owners).items() if count <= owners]
    if not feasible:
        return None
    _, groups = min(feasible, key=lambda plan: plan[0])
    owner_of = {layer: group[0] for group in groups for layer in group}
    return [owner_of.get(layer) for layer in range(len(kinds))]


def _plans(costs: Mapping[Group, float], kinds: Sequence[str], owners: int) -> Plans:
    """The cheapest partition of all layers for every number of owners, of which a kind has no more than its share."""
    plans: Plans = {0: (0.0, [])}
    for sequence in _by_kind(kinds):
        share = math.ceil(owners * len(sequence) / _with_kv(kinds))
        options = {count: plan for count, plan in _partitions(sequence, costs).items() if count <= share}
        merged: Plans = {}
        for used, (cost, groups) in plans.items():
            for count, (extra, more) in options.items():
                merged = _keep_best(merged, used + count, cost + extra, groups + more)
        plans = merged
    return plans


def _by_kind(kinds: Sequence[str]) -> list[list[int]]:
    """Layers with keys and values, apart by kind."""
    return [[i for i, other in enumerate(kinds) if other == kind] for kind in dict.fromkeys(kinds) if has_kv(kind)]


def _with_kv(kinds: Sequence[str]) -> int:
    return sum(map(has_kv, kinds))


def _partitions(sequence: Sequence[int], costs: Mapping[Group, float]) -> Plans:
    """Number of groups -> cheapest partition of a sequence of layers into that many contiguous groups."""
    best: list[Plans] = [{0: (0.0, [])}]
    longest = max([1, *map(len, costs)])
    for end in range(1, len(sequence) + 1):
        options: Plans = {}
        for start in range(max(0, end - longest), end):
            group = tuple(sequence[start:end])
            extra = costs.get(group, 0.0 if len(group) == 1 else None)
            if extra is None:
                continue
            for count, (cost, groups) in best[start].items():
                options = _keep_best(options, count + 1, cost + extra, [*groups, group])
        best.append(options)
    return best[-1]


def _keep_best(plans: Plans, count: int, cost: float, groups: list[Group]) -> Plans:
    if count not in plans or cost < plans[count][0]:
        plans[count] = cost, groups
    return plans
