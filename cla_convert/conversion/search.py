"""Which layers should share? The cheapest map under a KV budget, exactly, given what each group alone costs.

Costs add up over groups. That is an approximation, good enough to beat every fixed pattern where it was measured
(docs/sharing.md).
"""

import math
from collections.abc import Mapping, Sequence

from ..errors import InputError

Group = tuple[int, ...]
Plans = dict[int, tuple[float, list[Group]]]
"""Number of owners -> cheapest cost and its groups."""


def owners_for(kv_budget: float, num_layers: int) -> int:
    """How many layers may own K/V within `kv_budget`, a share of the source's KV cache in (0, 1]."""
    if not 0 < kv_budget <= 1:
        raise InputError(f"kv_budget {kv_budget} is not a share of the KV cache", fix="Give a number in (0, 1].")
    return max(1, math.floor(kv_budget * num_layers + 1e-9))


def candidate_groups(kinds: Sequence[str], largest: int) -> list[Group]:
    """All groups of 2 to `largest` layers that are neighbours within their attention kind."""
    sequences = _by_kind(kinds)
    return sorted(
        tuple(sequence[start : start + size])
        for sequence in sequences
        for size in range(2, largest + 1)
        for start in range(len(sequence) - size + 1)
    )


def choose_map(costs: Mapping[Group, float], kinds: Sequence[str], owners: int) -> list[int]:
    """The sharing map with at most `owners` owners whose groups' costs add up to least. Exact (dynamic programme).

    Raises:
        InputError: no partition into the groups in `costs` (and single layers, which cost nothing) has so few owners.
    """
    plans: Plans = {0: (0.0, [])}
    for sequence in _by_kind(kinds):
        options = _partitions(sequence, costs)
        merged: Plans = {}
        for used, (cost, groups) in plans.items():
            for count, (extra, more) in options.items():
                merged = _keep_best(merged, used + count, cost + extra, groups + more)
        plans = merged
    feasible = [plan for count, plan in plans.items() if count <= owners]
    if not feasible:
        raise InputError(
            f"No sharing map has only {owners} of {len(kinds)} layers own K/V",
            why=f"At least {min(plans)} are needed with the groups that were measured.",
            fix="Raise kv_budget.",
        )
    _, groups = min(feasible, key=lambda plan: plan[0])
    owner_of = {layer: group[0] for group in groups for layer in group}
    return [owner_of[layer] for layer in range(len(kinds))]


def _by_kind(kinds: Sequence[str]) -> list[list[int]]:
    return [[i for i, other in enumerate(kinds) if other == kind] for kind in dict.fromkeys(kinds)]


def _partitions(sequence: Sequence[int], costs: Mapping[Group, float]) -> Plans:
    """Number of groups -> cheapest partition of a sequence of layers into that many contiguous groups."""
    best: list[Plans] = [{0: (0.0, [])}]
    longest = max([1, *map(len, costs)])
    for end in range(1, len(sequence) + 1):
        options: Plans = {}
        for start in range(max(0, end - longest), end):
            group = tuple(sequence[start:end])
            extra = 0.0 if len(group) == 1 else costs.get(group)
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
