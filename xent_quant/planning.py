"""Which choice of every group to take: the least loss within limits on bytes and on the time of a token, the least product of
loss and time, or the fewest bytes for a bound on the loss.

A group is what must have one type (a tensor of a GGUF file, or several), its choices are the types that it may have, each with
the bytes that it takes and the loss that it is expected to add. A *part* is groups that lie in one memory and are read alike:
the experts that stay in RAM, say. Bytes of each memory add up, so do seconds, and so does loss, as long as it is small. What
follows is the multiple-choice knapsack problem, with as many limits as there are memories and one on time, solved exactly:

1. Choices that cost as much as a better one go.
2. Lagrange: with a price for a byte of each memory, and one for a second, every group decides for itself. At the prices where
the
   limits are just spent the sum of what the groups pay is a lower bound, and the best of each, as far as they fit, are a first
   solution. Every other choice's *regret* is what it costs more at these prices.
3. A better solution has less regret in sum than lies between solution and bound, so what has more goes. Among the choices that
   are left, dynamic programming over the groups of a part: of partial sums none is kept that takes as many bytes as a better
   one. A part is then a list of bytes and losses, and all combinations of the parts' lists are looked at. This is tried with a
   share of what lies between, and with more until there is a solution, which is then the best.

What is not chosen by groups (how many layers' experts stay in RAM, the experts' width) makes several problems: those whose
bound is no better than a solution of another one are left out.

The least product of loss and time lies on the convex hull of what is possible, for a product's curves bend the other way; a
corner of the hull is where loss + rate · time is least at some rate. Between two corners no more is possible than where the
lines of their rates meet, and where that is no better than the best corner nothing between them is looked at.

Pure: knows numbers only. The multiple-choice knapsack is described by Kellerer, Pferschy and Pisinger, Knapsack Problems
(2004), chapter 11."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import fsum, inf

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

SHARES = (1 / 64, 1 / 16, 1 / 4, 1 + 1e-9)
"""Of what lies between the first solution and the bound, that step 3 looks at in turn; the last has room for rounding."""
TOLERANCE = 1e-6
"""Of the price of a second: any price gives a bound."""
ALIKE = 1e-12
"""Of a sum: what two may differ by from rounding alone."""


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

    @cached_property
    def nbytes(self) -> F64:
        return np.array([choice.nbytes for choice in self.choices], np.float64)  # exact below 2⁵³

    @cached_property
    def losses(self) -> F64:
        return np.array([choice.loss for choice in self.choices], np.float64)

    @cached_property
    def curve(self) -> "_Curve":
        return _Curve(self.nbytes, self.losses)


@dataclass(frozen=True)
class Part:
    """Groups that lie in the memories of those indices; each of their bytes takes `seconds` of the time of a token."""

    groups: tuple[Group, ...]
    memories: tuple[int, ...] = (0,)
    seconds: float = 0.0

    @cached_property
    def least(self) -> int:
        """Bytes that it takes at least."""
        return sum(min(choice.nbytes for choice in group.choices) for group in self.groups)


@dataclass(frozen=True)
class Problem:
    """The parts of a model; `memory` limits their bytes in each memory, `seconds` the time of a token, of which `fixed` is the
    same for all choices."""

    parts: tuple[Part, ...]
    memory: tuple[float, ...]
    seconds: float = inf
    fixed: float = 0.0

    @cached_property
    def table(self) -> "_Table":
        return _Table([[group.curve for group in part.groups] for part in self.parts])

    @property
    def least(self) -> tuple[list[int], float]:
        """What all of it takes at least, all at once: bytes in each memory, and seconds."""
        nbytes = [sum(part.least for part in self.parts if memory in part.memories) for memory in range(len(self.memory))]
        return nbytes, self.fixed + fsum(part.seconds * part.least for part in self.parts)

    @property
    def feasible(self) -> bool:
        nbytes, seconds = self.least
        return seconds <= self.seconds and all(least <= limit for least, limit in zip(nbytes, self.memory, strict=True))


@dataclass(frozen=True)
class Chosen:
    """One choice of every group of the problem with index `problem`, in the groups' order, part after part; and the seconds of
    a token."""

    choices: tuple[Choice, ...]
    problem: int = 0
    seconds: float = 0.0

    @property
    def nbytes(self) -> int:
        return sum(choice.nbytes for choice in self.choices)

    @property
    def loss(self) -> float:
        return fsum(choice.loss for choice in self.choices)


class Infeasible(Exception):
    """No choices keep the bound; `least` is the least loss that there is."""

    def __init__(self, least: float) -> None:
        super().__init__(f"{least:g} is the least that there is")
        self.least = least


def least_loss(problems: Sequence[Problem], rate: float = 0.0) -> Chosen | None:
    """The best solution of all problems, of least loss + `rate` · seconds; of equal ones that of the first problem, and within
    a group that of fewer bytes. None where no problem has one."""
    relaxed = [(index, _Relaxed.of(problem, rate)) for index, problem in enumerate(problems) if problem.feasible]
    found: tuple[float, Chosen] | None = None
    for index, each in sorted(relaxed, key=lambda pair: float(f"{pair[1].bound:.12g}")):
        if found is None or each.bound < found[0] * (1 - ALIKE):
            chosen = _chosen(problems[index], index, each.solved())
            total = chosen.loss + rate * chosen.seconds
            if found is None or total < found[0] * (1 - ALIKE):
                found = total, chosen
    return found[1] if found else None


def least_product(problems: Sequence[Problem]) -> Chosen | None:
    """The solution of all problems of least loss · seconds. None where no problem has one."""
    best = least_loss(problems)
    if best is None:
        return None
    quick = [_quickest(problem, index) for index, problem in enumerate(problems) if problem.feasible]
    fastest = min(quick, key=lambda chosen: chosen.seconds)
    spans = [(best, 0.0, fastest, inf)]
    best = min(best, fastest, key=lambda chosen: chosen.loss * chosen.seconds)
    while spans:
        slow, slow_rate, fast, fast_rate = spans.pop()
        loss, seconds = _meet(slow, slow_rate, fast, fast_rate)
        if loss * seconds >= best.loss * best.seconds * (1 - ALIKE) or slow.seconds <= fast.seconds:
            continue
        rate = (fast.loss - slow.loss) / (slow.seconds - fast.seconds)
        middle = least_loss(problems, rate)
        assert middle is not None
        if middle.loss + rate * middle.seconds < (slow.loss + rate * slow.seconds) * (1 - ALIKE):
            spans += [(slow, slow_rate, middle, rate), (middle, rate, fast, fast_rate)]
            best = min(best, middle, key=lambda chosen: chosen.loss * chosen.seconds)
    return best


def _meet(slow: Chosen, slow_rate: float, fast: Chosen, fast_rate: float) -> tuple[float, float]:
    """Loss and seconds where the lines of two corners of the hull meet; that of an infinite rate is upright."""
    seconds = fast.seconds
    if fast_rate < inf:
        ahead = (fast.loss + fast_rate * fast.seconds) - (slow.loss + slow_rate * slow.seconds)
        seconds = ahead / (fast_rate - slow_rate)
    return slow.loss + slow_rate * (slow.seconds - seconds), seconds


def least_bytes(groups: Sequence[Group], bound: float) -> Chosen:
    """The choices of fewest bytes whose loss is at most `bound`. Raises Infeasible."""
    swapped = [_Curve(group.losses, group.nbytes) for group in groups]
    least = fsum(curve.cost[0] for curve in swapped)
    if least > bound:
        raise Infeasible(least)
    taken = _Relaxed(_Table([swapped]), np.array([[1.0], [0.0]]), np.array([bound, inf]), np.zeros(1)).solved()
    return Chosen(tuple(group.choices[index] for group, index in zip(groups, taken, strict=True)))


def frontier(groups: Sequence[Group]) -> F64:
    """[n, 2] bytes and loss of choices that no others beat, fewest bytes first: the corners of the convex hull of what is
    possible, between which there may be more."""
    table = _Table([[group.curve for group in groups]])
    order = np.argsort(-table.saved, kind="stable")
    dearer, saved = table.dearer[order], table.saved[order]
    steps = np.stack([dearer, -saved * dearer], 1)
    first = [[table.cost[:, 0].sum(), table.value[:, 0].sum()]]
    corners: F64 = np.concatenate([first, steps]).cumsum(0)
    return corners


def _quickest(problem: Problem, index: int) -> Chosen:
    """Of the fewest bytes everywhere, so of the least time."""
    groups = (group for part in problem.parts for group in part.groups)
    return _chosen(problem, index, [int(group.curve.kept[0]) for group in groups])


def _chosen(problem: Problem, index: int, taken: Sequence[int]) -> Chosen:
    pairs = [(part.seconds, group) for part in problem.parts for group in part.groups]
    choices = tuple(group.choices[choice] for (_, group), choice in zip(pairs, taken, strict=True))
    seconds = fsum(slow * choice.nbytes for (slow, _), choice in zip(pairs, choices, strict=True))
    return Chosen(choices, index, problem.fixed + seconds)


def _undominated(cost: F64, value: F64) -> I64:
    """Indices of the choices that no other one beats, dearest last: costs ascend and values fall strictly."""
    order = np.lexsort((value, cost))
    lowest = np.minimum.accumulate(value[order])
    better = np.append(True, lowest[1:] < lowest[:-1])[: len(order)]
    found: I64 = order[better].astype(np.int64)
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


class _Curve:
    """A group's undominated choices (`kept`), their costs, which ascend, and values, which fall; and steps along their hull:
    what a cost of 1 saves, the cost, and the choice that is reached."""

    def __init__(self, cost: F64, value: F64) -> None:
        self.kept = _undominated(cost, value)
        self.cost, self.value = cost[self.kept], value[self.kept]
        hull = np.array(_hull(self.cost, self.value))
        self.dearer = np.diff(self.cost[hull])
        self.saved = -np.diff(self.value[hull]) / self.dearer
        self.reached = hull[1:]


@dataclass(frozen=True)
class _Sums:
    """What a part may be, dearer and better from one to the next: costs and regrets [n]; by group of `stages` where a partial
    sum came from and what the group took, both [n]. Groups without a stage take what has no regret."""

    costs: F64
    regrets: F64
    stages: list[tuple[int, I64, I64]]


class _Table:
    """Parts as numbers. By group, padded to the most choices: `cost`, `value` [groups, choices], `part` [groups]; of all steps
    along the groups' hulls, [steps]: what a cost of 1 `saved`, the cost, the `group`, and the choice that is `reached`."""

    def __init__(self, curves: Sequence[Sequence[_Curve]]) -> None:
        self.curves = [curve for part in curves for curve in part]
        self.part = np.repeat(np.arange(len(curves)), [len(part) for part in curves])
        shape = len(self.curves), max((len(curve.cost) for curve in self.curves), default=1)
        self.cost, self.value = np.zeros(shape), np.full(shape, inf)
        for row, curve in enumerate(self.curves):
            self.cost[row, : len(curve.cost)], self.value[row, : len(curve.cost)] = curve.cost, curve.value
        self.saved = np.concatenate([np.zeros(0), *(curve.saved for curve in self.curves)])
        self.dearer = np.concatenate([np.zeros(0), *(curve.dearer for curve in self.curves)])
        self.reached = np.concatenate([np.zeros(0, np.int64), *(curve.reached for curve in self.curves)])
        self.group = np.repeat(np.arange(len(self.curves)), [len(curve.saved) for curve in self.curves])


class _Relaxed:
    """Step 2 of the module for parts of which `weights` [limits, parts] times the costs are to be at most `limits`, and which
    pay `rates` [parts] for a cost of 1 besides; all but the last of the limits weigh 0 or 1.

    `prices` are of the limits' units, `bound` is a lower one of the sum of values and what is paid; `regret` [groups, choices].
    Steps are those that save more than is paid, the most first."""

    def __init__(self, table: _Table, weights: F64, limits: F64, rates: F64) -> None:
        self.curves, self.part, self.cost, self.weights, self.limits = table.curves, table.part, table.cost, weights, limits
        self.left = limits - weights @ self._by_part(self.cost[:, 0])
        saved = table.saved - rates[self.part[table.group]]
        order = np.argsort(-saved, kind="stable")[: np.count_nonzero(saved > 0)]  # of one group they come in their order already
        self.saved, self.dearer, self.group, self.reached = (
            each[order] for each in (saved, table.dearer, table.group, table.reached)
        )
        self.prices = self._prices()
        self.paid = self.prices @ weights  # [parts], for a cost of 1
        pays = table.value + (rates + self.paid)[self.part, None] * self.cost
        self.regret = pays - pays.min(1, keepdims=True)
        self.free = self.regret.argmin(1)  # the cheapest of those without regret
        self.bound = fsum(pays.min(1)) - self._unspent(np.zeros(len(self.part)))

    @classmethod
    def of(cls, problem: Problem, rate: float) -> "_Relaxed":
        there = [[float(memory in part.memories) for part in problem.parts] for memory in range(len(problem.memory))]
        seconds = np.array([part.seconds for part in problem.parts])
        limits = np.array([*problem.memory, problem.seconds - problem.fixed])
        relaxed = cls(problem.table, np.array([*there, seconds]), limits, rate * seconds)
        relaxed.bound += rate * problem.fixed
        return relaxed

    def _by_part(self, costs: F64) -> F64:
        """Sums [parts] of what groups cost [groups]."""
        sums: F64 = np.bincount(self.part, costs, minlength=self.weights.shape[1]).astype(np.float64)
        return sums

    def _unspent(self, costs: F64) -> float:
        """What groups that cost so much [groups] leave of the limits, at their prices."""
        left = self.limits - self.weights @ self._by_part(costs)
        return fsum(price * rest for price, rest in zip(self.prices, left, strict=True) if price)

    def _prices(self) -> F64:
        """That of the last limit by bisection: any gives a bound, the best the highest."""
        weights = self.weights[:, self.part[self.group]]  # [limits, steps]

        def at(last: float) -> tuple[F64, float]:
            """All prices, given the last one; and what is spent of the last limit then."""
            prices, spent = np.append(np.zeros(len(self.limits) - 1), last), 0.0
            net = self.saved - last * weights[-1]
            for limit in range(len(self.limits) - 1):
                there = np.flatnonzero((weights[limit] > 0) & (net > 0))
                order = there[np.argsort(-net[there], kind="stable")]
                ends = np.cumsum(self.dearer[order])
                fit = int(np.searchsorted(ends, self.left[limit], "right"))
                spent += float(weights[-1, order[:fit]] @ self.dearer[order[:fit]])
                if fit < len(order):  # a part of this step
                    prices[limit] = net[order[fit]]
                    spent += float(weights[-1, order[fit]] * (self.left[limit] - (ends[fit - 1] if fit else 0.0)))
            return prices, spent

        prices, spent = at(0.0)
        if spent <= self.left[-1]:
            return prices
        slow = weights[-1] > 0
        low, high = 0.0, float((self.saved[slow] / weights[-1, slow]).max())
        while high - low > TOLERANCE * high:
            middle = (low + high) / 2
            low, high = (low, middle) if at(middle)[1] <= self.left[-1] else (middle, high)
        return at(high)[0]

    def solved(self) -> list[int]:
        """By group the index of its choice in the best solution."""
        first = self._first()
        excess = self._excess(first)
        shares = SHARES if excess > 0 else ()
        best = next((better for share in shares if (better := self._closed(share * excess)) is not None), first)
        return [int(curve.kept[choice]) for curve, choice in zip(self.curves, best, strict=True)]

    def _first(self) -> I64:
        """Choices that keep the limits: steps along the hulls, those that save most for their price first, as long as they fit;
        and behind the first of a group that does not, whatever still fits of others."""
        taken, left, stopped = np.zeros(len(self.curves), np.int64), self.left.copy(), set()
        with np.errstate(divide="ignore"):
            worth = self.saved / self.paid[self.part[self.group]]
        for step in np.argsort(-worth, kind="stable"):
            group = self.group[step]
            needed = self.weights[:, self.part[group]] * self.dearer[step]
            if group not in stopped and (needed <= left).all():
                taken[group] = self.reached[step]
                left -= needed
            else:
                stopped.add(group)
        return taken

    def _excess(self, taken: I64) -> float:
        """What a solution costs more than the bound: its regret, and the price of what it leaves unspent."""
        rows = np.arange(len(taken))
        return fsum(self.regret[rows, taken]) + max(0.0, self._unspent(self.cost[rows, taken]))

    def _closed(self, gap: float) -> I64 | None:
        """Step 3 of the module: the best of all choices, where that costs less than `gap` more than the bound."""
        alive = self.regret < gap
        least, most = (
            self._by_part(bound) for bound in (np.where(alive, self.cost, inf).min(1), np.where(alive, self.cost, 0.0).max(1))
        )
        every = [self._sums(part, alive, least, most, gap) for part in range(len(self.paid))]
        if not all(len(sums.costs) for sums in every):
            return None
        *others, longest = sorted(range(len(every)), key=lambda part: len(every[part].costs))
        rows = np.zeros((1, 0), np.int64)  # [combinations, parts so far]
        regret, value, used = np.zeros(1), np.zeros(1), np.zeros((1, len(self.limits)))
        for part in others:
            sums = every[part]
            before, new = np.nonzero(regret[:, None] + sums.regrets < gap)
            rows = np.column_stack([rows[before], new])
            regret, used = regret[before] + sums.regrets[new], used[before] + sums.costs[new, None] * self.weights[:, part]
            value = value[before] + sums.regrets[new] - self.paid[part] * sums.costs[new]
        last, weight = every[longest], self.weights[:, longest]
        room = np.full(len(rows), inf)
        for limit in np.flatnonzero(weight):
            room = np.minimum(room, (self.limits[limit] - used[:, limit]) / weight[limit])
        index = np.searchsorted(last.costs, room, "right") - 1  # the dearest that fits is the best
        value = value + (last.regrets - self.paid[longest] * last.costs)[index]
        value[(index < 0) | (used > self.limits).any(1)] = inf
        best = int(value.argmin()) if len(value) else 0
        if not len(value) or value[best] == inf:
            return None
        taken = self.free.copy()
        for part, state in zip([*others, longest], [*rows[best], index[best]], strict=True):
            for group, parent, choice in reversed(every[part].stages):
                taken[group], state = choice[state], parent[state]
        return taken if self._excess(taken) < gap else None

    def _sums(self, part: int, alive: NDArray[np.bool_], least: F64, most: F64, gap: float) -> _Sums:
        """What a part may be in a solution that costs less than `gap` more than the bound, where every part costs from `least`
        to `most` [parts]."""
        groups, weight = np.flatnonzero(self.part == part), self.weights[:, part]
        others = self.weights * (np.arange(len(least)) != part)
        spare, idle = self.limits - others @ least, self.limits - others @ most
        # The groups whose second choice is regretted most decide first: few of their combinations survive.
        several = groups[alive[groups].sum(1) > 1]
        order = several[np.argsort(-np.partition(self.regret[several], 1)[:, 1], kind="stable")] if len(several) else several
        extra = self.cost[order] - self.cost[order, self.free[order], None]
        # Of the groups from each on, what they cost more than the free choices, at least and at most.
        below = np.append(np.cumsum(np.where(alive[order], extra, inf).min(1, initial=inf)[::-1])[::-1], 0.0)
        above = np.append(np.cumsum(np.where(alive[order], extra, -inf).max(1, initial=-inf)[::-1])[::-1], 0.0)
        costs, regrets = np.array([self.cost[groups, self.free[groups]].sum()]), np.zeros(1)
        stages: list[tuple[int, I64, I64]] = []
        for place, group in enumerate(order):
            there = np.flatnonzero(alive[group])
            costs = (costs[:, None] + extra[place, there]).ravel()
            regrets = (regrets[:, None] + self.regret[group, there]).ravel()
            parent, choice = np.divmod(np.arange(len(costs)), len(there))
            keep, unspent = np.full(len(costs), True), np.zeros(len(costs))
            for limit in np.flatnonzero(weight):
                keep &= weight[limit] * (costs + below[place + 1]) <= spare[limit]
            for limit in np.flatnonzero(self.prices):
                unspent += self.prices[limit] * np.maximum(0.0, idle[limit] - weight[limit] * (costs + above[place + 1]))
            index = np.flatnonzero(keep & (regrets + unspent < gap))
            index = index[_undominated(costs[index], regrets[index] - self.paid[part] * costs[index])]
            costs, regrets = costs[index], regrets[index]
            stages.append((int(group), parent[index], there[choice[index]]))
        return _Sums(costs, regrets, stages)
