"""The multiple-choice knapsack: of each group one option, so that what they cost together is within a limit and what
they lose together is least. Plain numbers; what they mean is budget.py's.

First options may be mixed (the linear relaxation, whose loss is Lagrange's bound): from each group's cheapest option,
steps along the groups' convex hulls in the order of what they save for their cost, until one does not fit. Without that
one it is a choice. Between its loss and the bound lies the best, which is looked for among all sums that can be there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

# Sums that are carried on from group to group. As long as there are no more, the choice is the best there is; of more,
# those are kept that lose least among neighbours in cost.
MAX_SUMS = 2**15
SLACK = 1e-13  # relative: sums of fractions in another order are not the same

Options = Sequence[tuple[float, float]]  # cost and loss of each


@dataclass(frozen=True)
class Solution:
    """picks: the option of each group, by number. bound: no choice within the limit loses less"""

    picks: tuple[int, ...]
    cost: float
    loss: float
    bound: float


def least_cost(groups: Sequence[Options]) -> float:
    """The smallest limit that can be kept."""
    return sum(min(cost for cost, _ in options) for options in groups)


def solve(groups: Sequence[Options], limit: float) -> Solution | None:
    """The choice that loses least within a limit; None if even the cheapest one costs more."""
    limit += SLACK * abs(limit)
    if least_cost(groups) > limit:
        return None
    relaxed = _relaxed(groups, limit)
    picks = _search(groups, limit, relaxed) or relaxed.picks
    chosen = [options[pick] for options, pick in zip(groups, picks, strict=True)]
    cost, loss = (sum(part) for part in zip(*chosen, strict=True)) if chosen else (0.0, 0.0)
    return Solution(picks, cost, loss, min(relaxed.bound, loss))


@dataclass(frozen=True)
class _Relaxed:
    """Of the relaxation: the choice without its last step, and that one's loss; the bound; what a unit of cost saves in
    the last step.
    """

    picks: tuple[int, ...]
    loss: float
    bound: float
    rate: float


def _relaxed(groups: Sequence[Options], limit: float) -> _Relaxed:
    hulls = [_hull(options) for options in groups]
    picks = [hull[0] for hull in hulls]
    cost, loss = (sum(options[pick][i] for options, pick in zip(groups, picks, strict=True)) for i in (0, 1))
    steps = [(group, *step) for group, hull in enumerate(hulls) for step in pairwise(hull)]
    for group, before, after in sorted(steps, key=lambda step: -_gain(groups[step[0]], *step[1:])):
        rate = _gain(groups[group], before, after)
        more = groups[group][after][0] - groups[group][before][0]
        if cost + more > limit:
            return _Relaxed(tuple(picks), loss, loss - rate * (limit - cost), rate)
        picks[group] = after
        cost, loss = cost + more, loss - rate * more
    return _Relaxed(tuple(picks), loss, loss, 0.0)


def _hull(options: Options) -> list[int]:
    """The lower convex hull, from the cheapest option to the one that loses least, by falling gain."""
    hull: list[int] = []
    for option in sorted(range(len(options)), key=options.__getitem__):
        if hull and options[option][1] >= options[hull[-1]][1]:
            continue
        while len(hull) > 1 and _gain(options, hull[-2], option) >= _gain(options, hull[-2], hull[-1]):
            hull.pop()
        hull.append(option)
    return hull


def _gain(options: Options, before: int, after: int) -> float:
    return (options[before][1] - options[after][1]) / (options[after][0] - options[before][0])


def _search(groups: Sequence[Options], limit: float, relaxed: _Relaxed) -> tuple[int, ...] | None:
    """The best choice; None if sums had to be left out and none of the others came to an end."""
    cost_to_come = least_cost(groups)
    # What the groups to come lose and cost at the least, their cost counted at the rate.
    to_come = sum(min(loss + relaxed.rate * cost for cost, loss in options) for options in groups)
    worst = relaxed.loss + SLACK * (abs(relaxed.loss) + relaxed.rate * limit)
    costs, losses = np.zeros(1), np.zeros(1)
    steps: list[tuple[np.ndarray, np.ndarray]] = []  # of each group, for each sum: the one before it, and the option
    for options in groups:
        own = np.array(options, dtype=np.float64)
        cost_to_come -= own[:, 0].min()
        to_come -= (own[:, 1] + relaxed.rate * own[:, 0]).min()
        all_costs = (costs[:, None] + own[:, 0]).ravel()
        all_losses = (losses[:, None] + own[:, 1]).ravel()
        can_be_best = all_losses + to_come - relaxed.rate * (limit - all_costs) <= worst
        kept = np.flatnonzero(can_be_best & (all_costs + cost_to_come <= limit + SLACK * abs(limit)))
        kept = kept[_frontier(all_costs[kept], all_losses[kept])]
        steps.append((kept // len(options), kept % len(options)))
        costs, losses = all_costs[kept], all_losses[kept]
    if not len(costs):
        return None
    at, picks = len(costs) - 1, []
    for before, option in reversed(steps):
        picks.append(int(option[at]))
        at = before[at]
    return tuple(reversed(picks))


def _frontier(costs: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """The places of those that lose less than all cheaper ones, by rising cost."""
    order = np.lexsort((losses, costs))
    falls = losses[order]
    better = np.ones(len(order), dtype=bool)
    better[1:] = falls[1:] < np.minimum.accumulate(falls)[:-1]
    order = order[better]
    if len(order) <= MAX_SUMS:
        return order
    cost = costs[order]
    cell = np.floor((cost - cost[0]) / (cost[-1] - cost[0]) * MAX_SUMS)
    return order[np.append(cell[1:] != cell[:-1], True)]
