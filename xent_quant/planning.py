"""Which choice of every group to take: the least loss for a budget of bytes, or the fewest bytes for a bound on the loss.

A group is what must have one type (a tensor of a GGUF file, or several), its choices are the types that it may have, each with
the bytes that it takes and the loss that it is expected to add. Bytes add up, and so does loss, as long as it is small. What
follows is the multiple-choice knapsack problem, solved exactly:

1. Choices that cost as much as a better one go.
2. Lagrange: with a price λ for a byte every group decides for itself. At the price where the budget is just spent the sum of
   what the groups pay is a lower bound, and the best of each, as far as they fit, are a first solution. Every other choice's
   *regret* is what it costs more at this price.
3. A better solution has less regret in sum than lies between solution and bound, so what has more goes. Among the choices that
   are left, dynamic programming over the groups: of partial sums none is kept that takes as many bytes as a better one, and none
   that cannot beat the best solution found on the way.

Pure: knows numbers only. The multiple-choice knapsack is described by Kellerer, Pferschy and Pisinger, Knapsack Problems (2004),
chapter 11.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import fsum, inf

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]


@dataclass(frozen=True)
class Choice:
    """A type that a group may have: the bytes that the group takes then, and the loss that is expected of it, in nats."""

    type: str
    nbytes: int
    loss: float


@dataclass(frozen=True)
class Group:
    """What must have one type; one choice at least."""

    label: str
    choices: tuple[Choice, ...]


@dataclass(frozen=True)
class Chosen:
    """One choice of every group, in the groups' order."""

    choices: tuple[Choice, ...]

    @property
    def nbytes(self) -> int:
        return sum(choice.nbytes for choice in self.choices)

    @property
    def loss(self) -> float:
        return fsum(choice.loss for choice in self.choices)


class Infeasible(Exception):
    """No choices keep the limit; `least` is what the best of them needs, in the limit's unit."""

    def __init__(self, least: float) -> None:
        super().__init__(f"{least:g} is the least that there is")
        self.least = least


def least_loss(groups: Sequence[Group], budget: int) -> Chosen:
    """The choices of least loss that take at most `budget` bytes; of as much loss, what takes fewer bytes is preferred within a
    group. Raises Infeasible."""
    costs, values = _bytes(groups), _losses(groups)
    return _chosen(groups, _solve(costs, values, float(budget)))


def least_bytes(groups: Sequence[Group], bound: float) -> Chosen:
    """The choices of fewest bytes whose loss is at most `bound`. Raises Infeasible."""
    return _chosen(groups, _solve(_losses(groups), _bytes(groups), bound))


def _bytes(groups: Sequence[Group]) -> list[F64]:
    return [np.array([choice.nbytes for choice in group.choices], np.float64) for group in groups]  # exact below 2⁵³


def _losses(groups: Sequence[Group]) -> list[F64]:
    return [np.array([choice.loss for choice in group.choices], np.float64) for group in groups]


def _chosen(groups: Sequence[Group], taken: Sequence[int]) -> Chosen:
    return Chosen(tuple(group.choices[index] for group, index in zip(groups, taken, strict=True)))


def _solve(costs: Sequence[F64], values: Sequence[F64], limit: float) -> list[int]:
    """For every group the index of a choice: the least sum of `values` among those whose `costs` add up to `limit` at most."""
    kept = [_undominated(cost, value) for cost, value in zip(costs, values, strict=True)]
    cost = [each[index] for each, index in zip(costs, kept, strict=True)]
    value = [each[index] for each, index in zip(values, kept, strict=True)]
    least = fsum(each[0] for each in cost)
    if least > limit:
        raise Infeasible(least)
    if fsum(each[-1] for each in cost) <= limit:
        taken = [len(index) - 1 for index in kept]
    else:
        price, first = _priced(cost, value, limit)
        taken = _closed(cost, value, limit, price, first)
    return [int(index[choice]) for index, choice in zip(kept, taken, strict=True)]


def _undominated(cost: F64, value: F64) -> NDArray[np.int64]:
    """Indices of the choices that no other one beats, dearest last: costs ascend and values fall strictly."""
    order = np.lexsort((value, cost))
    lowest = np.minimum.accumulate(value[order])
    better = np.concatenate(([True], lowest[1:] < lowest[:-1]))
    found: NDArray[np.int64] = order[better].astype(np.int64)
    return found


def _hull(cost: F64, value: F64) -> list[int]:
    """Of undominated choices those on the lower convex hull, in order."""
    hull: list[int] = []
    for index in range(len(cost)):
        while len(hull) > 1:
            a, b = hull[-2:]
            if (value[b] - value[a]) * (cost[index] - cost[a]) < (value[index] - value[a]) * (cost[b] - cost[a]):
                break
            hull.pop()
        hull.append(index)
    return hull


def _priced(cost: Sequence[F64], value: Sequence[F64], limit: float) -> tuple[float, list[int]]:
    """The price at which the limit is just spent, and choices that keep it: steps along the groups' hulls, those that save most
    for their cost first, as long as they fit; and behind the first that does not, whatever still fits."""
    steps: list[tuple[float, int, int, float]] = []
    for group, (costs, values) in enumerate(zip(cost, value, strict=True)):
        hull = _hull(costs, values)
        for before, behind in pairwise(hull):
            dearer = float(costs[behind] - costs[before])
            steps.append((float(values[before] - values[behind]) / dearer, group, behind, dearer))
    steps.sort(key=lambda step: -step[0])  # of one group they come in their order already, and the sort is stable
    taken, spent = [0] * len(cost), fsum(each[0] for each in cost)
    price: float | None = None
    stopped: set[int] = set()
    for slope, group, behind, dearer in steps:
        if group not in stopped and spent + dearer <= limit:
            taken[group], spent = behind, spent + dearer
        else:
            stopped.add(group)
            price = slope if price is None else price
    assert price is not None  # else the dearest choices of all had fitted
    return price, taken


@dataclass(frozen=True)
class _Stage:
    """Partial solutions after some groups: `parent` [n] index into those before, `choice` [n] what the last group took."""

    parent: NDArray[np.int64]
    choice: NDArray[np.int64]


def _closed(cost: Sequence[F64], value: Sequence[F64], limit: float, price: float, first: list[int]) -> list[int]:
    """The best of all choices, given a price and choices to beat: step 3 of the module. Choices are undominated."""
    paid = [values + price * costs for costs, values in zip(cost, value, strict=True)]
    regret = [each - each.min() for each in paid]
    free = [int(each.argmin()) for each in regret]  # the cheapest of those without regret
    # What a solution costs more than the bound: its regret, and the price of what it leaves unspent.
    spent = fsum(float(costs[index]) for costs, index in zip(cost, first, strict=True))
    gap = fsum(float(each[index]) for each, index in zip(regret, first, strict=True)) + price * max(0.0, limit - spent)
    gap *= 1 + 1e-9  # rounding
    # The groups whose second choice is regretted most decide first: few of their combinations survive.
    second = [float(np.partition(each, 1)[1]) if len(each) > 1 else inf for each in regret]
    order = sorted((group for group in range(len(cost)) if second[group] < gap), key=lambda group: -second[group])
    base = fsum(float(costs[index]) for costs, index in zip(cost, free, strict=True))
    # Of each group in `order`, its choices relative to the free one.
    extra = [cost[group] - cost[group][free[group]] for group in order]
    least = np.append(np.cumsum([float(each.min()) for each in extra][::-1])[::-1], 0.0)  # of the groups from here on
    most = np.append(np.cumsum([float(each.max()) for each in extra][::-1])[::-1], 0.0)

    costs, regrets = np.array([base]), np.array([0.0])
    stages: list[_Stage] = []
    best: tuple[int, int] | None = None  # stage and state; from there on the free choices
    for number, group in enumerate(order):
        there = np.flatnonzero(regret[group] < gap)
        costs = (costs[:, None] + extra[number][there]).ravel()
        regrets = (regrets[:, None] + regret[group][there]).ravel()
        parent, choice = np.divmod(np.arange(len(costs)), len(there))
        unspent = np.maximum(0.0, limit - costs - most[number + 1])
        alive = (costs + least[number + 1] <= limit) & (regrets + price * unspent < gap)
        index = np.flatnonzero(alive)
        if not len(index):
            break
        losses = regrets - price * costs  # the values, but for a constant
        index = index[_undominated(costs[index], losses[index])]
        costs, regrets = costs[index], regrets[index]
        stages.append(_Stage(parent[index], there[choice[index]]))
        whole = np.where(costs <= limit, regrets + price * (limit - costs), inf)
        if whole.min() < gap / (1 + 1e-9):
            gap, best = float(whole.min()), (number, int(whole.argmin()))
    if best is None:
        return first
    taken, state = list(free), best[1]
    for number in range(best[0], -1, -1):
        taken[order[number]] = int(stages[number].choice[state])
        state = int(stages[number].parent[state])
    return taken
