"""Which KV heads of a group's layers go together, by what two heads keep of their keys and values if they share one."""

from collections.abc import Callable

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

Score = Callable[[Tensor], Tensor]
"""Pairs of heads [P, 2] -> what they keep, [P]. Head h of member b is number b * heads + h."""


def match_heads(score: Score, members: int, heads: int, shared: int) -> list[tuple[int, ...]]:
    """Per member its KV heads in the order of the `shared` heads that they sit on, heads / shared on each.

    The owner's heads are grouped first; those of the others join them by the assignment (Hungarian) that keeps most of
    the pairs with an owner's head.
    """
    each, numbers = heads // shared, torch.arange(heads)
    owner = list(range(heads))
    if each > 1:
        pairs = torch.combinations(numbers)
        scores = np.zeros((heads, heads))
        scores[pairs[:, 0], pairs[:, 1]] = score(pairs)
        owner = [head for group in group_heads(scores + scores.T, each) for head in group]
    orders = [tuple(owner)]
    for member in range(1, members):
        if heads == 1:
            orders.append((0,))
            continue
        scores = score(torch.cartesian_prod(numbers, numbers + member * heads)).view(heads, heads)
        joint = scores[owner].unflatten(0, (shared, each)).sum(1).repeat_interleave(each, 0)
        found = linear_sum_assignment(joint.numpy(), maximize=True)[1].reshape(shared, each)
        orders.append(tuple(map(int, np.sort(found).flat)))  # whoever sits on one head may do so in any order
    return orders


def group_heads(scores: np.ndarray, each: int) -> list[list[int]]:
    """Groups of `each` heads that keep much in sum over their pairs: greedy, then the best swaps of two heads.

    Args:
        scores: [heads, heads] of pairs, symmetric, 0 on the diagonal.
        each: heads of a group, a divisor of their number.
    """
    labels, left = np.zeros(len(scores), int), list(range(len(scores)))
    for label in range(len(scores) // each):
        group = [left.pop(0)]
        while len(group) < each:
            group.append(left.pop(int(scores[group][:, left].sum(0).argmax())))
        labels[group] = label
    while True:
        within = scores @ np.eye(len(scores) // each)[labels]  # [heads, groups]: what a head keeps in each group
        joining = within[:, labels] - within[np.arange(len(scores)), labels][:, None]
        gain = np.where(labels[:, None] == labels, 0, joining + joining.T - 2 * scores)
        first, second = np.unravel_index(gain.argmax(), gain.shape)
        if gain[first, second] <= 1e-9:
            return sorted(np.flatnonzero(labels == label).tolist() for label in range(len(scores) // each))
        labels[[first, second]] = labels[[second, first]]
