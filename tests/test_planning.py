"""The planner against exhaustive search, and against dynamic programming over every single byte."""

from dataclasses import replace
from functools import partial
from math import inf

import numpy as np
import pytest

from xent_quant import planning
from xent_quant.planning import Choice, Chosen, Group, Infeasible, Part, Problem, least_bytes


def least_loss(groups: list[Group], budget: float) -> Chosen | None:
    return planning.least_loss([Problem((Part(tuple(groups)),), (budget,))])


def types(found: Chosen | None) -> list[str]:
    assert found is not None
    return [choice.type for choice in found.choices]


def random_groups(seed: int) -> list[Group]:
    """Up to five groups of up to five choices: some dominated, some alike, losses in binary fractions, which add up exactly."""
    random = np.random.default_rng(seed)
    groups = []
    for number in range(random.integers(1, 6)):
        size = int(random.choice([1, 7, 64, 1000]))
        choices = [
            Choice(str(index), size * int(random.integers(1, 12)), float(random.integers(0, 4096)) / 4096)
            for index in range(random.integers(1, 6))
        ]
        if random.random() < 0.3:  # the layers of a model are of one shape
            choices = list(groups[-1].choices) if groups else choices
        groups.append(Group(str(number), tuple(choices)))
    return groups


def every(groups: list[Group]) -> tuple[np.ndarray, np.ndarray]:
    """Bytes and losses of all combinations; sums of binary fractions are exact."""
    nbytes, losses = np.zeros(1), np.zeros(1)
    for group in groups:
        nbytes = np.add.outer(nbytes, [choice.nbytes for choice in group.choices]).ravel()
        losses = np.add.outer(losses, [choice.loss for choice in group.choices]).ravel()
    return nbytes, losses


def test_equals_exhaustive_search_in_200_random_cases() -> None:
    for seed in range(200):
        groups = random_groups(seed)
        nbytes, losses = every(groups)
        some = np.random.default_rng(seed + 1000).integers(len(nbytes))
        for budget in map(int, (nbytes[some], nbytes[some] + 3, nbytes.min(), nbytes.max())):
            found = least_loss(groups, budget)
            assert found is not None
            assert found.nbytes <= budget, seed
            assert found.loss == losses[nbytes <= budget].min(), seed
        smallest = least_bytes(groups, losses[some])
        assert smallest.loss <= losses[some], seed
        assert smallest.nbytes == nbytes[losses <= losses[some]].min(), seed


def test_equals_dynamic_programming_over_bytes_where_there_are_many_groups() -> None:
    random = np.random.default_rng(0)
    groups = [
        Group(
            str(number),
            tuple(Choice(str(bits), int(size) * bits, float(weight * 4.0**-bits)) for bits in (2, 3, 4, 5, 6, 8)),
        )
        for number, (size, weight) in enumerate(zip(random.integers(1, 40, 60), random.lognormal(0, 1, 60), strict=True))
    ]
    budget = sum(group.choices[2].nbytes for group in groups)
    least = np.zeros(budget + 1)  # of the groups so far, by the bytes that they may take
    for group in groups:
        longer = np.full(budget + 1, inf)
        for choice in group.choices:
            reach = budget + 1 - choice.nbytes
            if reach > 0:
                longer[choice.nbytes :] = np.minimum(longer[choice.nbytes :], least[:reach] + choice.loss)
        least = longer
    found = least_loss(groups, budget)
    assert found is not None
    assert found.nbytes <= budget
    assert found.loss == pytest.approx(least[budget], rel=1e-9)


def beside_ram(seed: int) -> list[Problem]:
    """The shape of a model on a machine, one problem for each number of experts in RAM: groups that are read whole, experts on
    the card, and those in RAM, where a byte takes more or less time; of some, whole groups take room in both. Seconds are
    binary fractions, so that sums are exact."""
    random = np.random.default_rng(seed)
    groups = tuple(random_groups(seed))
    whole, experts = groups[: len(groups) // 2], groups[len(groups) // 2 :]
    slow = [2.0 ** -int(power) for power in random.integers(1, 8, 3)]
    both = ((0,), (0, 1))[seed % 3 == 0]
    return [
        Problem(
            (Part(whole, both, slow[0]), Part(experts[moved:], (0,), slow[1]), Part(experts[:moved], (1,), slow[2])),
            (inf, inf),
            fixed=(1 + moved) / 16,
        )
        for moved in range(len(experts) + 1)
    ]


def everything(problem: Problem) -> np.ndarray:
    """Of all combinations what they take of both memories, their seconds, and losses: [4, combinations]."""
    sums = np.array([[0.0], [0.0], [problem.fixed], [0.0]])
    for part in problem.parts:
        nbytes, losses = every(list(part.groups))
        more = np.array([nbytes * (0 in part.memories), nbytes * (1 in part.memories), nbytes * part.seconds, losses])
        sums = (sums[:, :, None] + more[:, None, :]).reshape(4, -1)
    return sums


def taken(problem: Problem, found: Chosen) -> np.ndarray:
    """The same of a solution."""
    choices = iter(found.choices)
    fixed = [
        Part(tuple(Group(group.label, (next(choices),)) for group in part.groups), part.memories, part.seconds)
        for part in problem.parts
    ]
    return everything(replace(problem, parts=tuple(fixed)))[:, 0]


def test_several_memories_and_the_time_of_a_token_equal_exhaustive_search_in_200_random_cases() -> None:
    narrow = np.zeros(3)
    for seed in range(200):
        random = np.random.default_rng(seed)
        problems = beside_ram(seed)
        all_of_them = [everything(problem) for problem in problems]
        one = all_of_them[int(random.integers(len(problems)))]
        limits = one[:3, int(random.integers(one.shape[1]))] * random.choice([1, 1, 1.25, 1e6], 3)
        bounded = [replace(each, memory=(limits[0], limits[1]), seconds=limits[2]) for each in problems]
        allowed = np.concatenate([sums[:, (sums[:3] <= limits[:, None]).all(0)] for sums in all_of_them], 1)
        rate = 2.0 ** -int(random.integers(2, 12))
        for find, value in (
            (planning.least_loss, lambda sums: sums[3]),
            (partial(planning.least_loss, rate=rate), lambda sums, rate=rate: sums[3] + rate * sums[2]),
            (planning.least_product, lambda sums: sums[3] * sums[2]),
        ):
            found = find(bounded)
            assert found is not None, seed
            sums = taken(bounded[found.problem], found)
            assert (sums[:3] <= limits).all(), seed
            assert (found.seconds, found.loss) == tuple(sums[2:]), seed
            assert value(sums) == value(allowed).min(), seed
        for limit in range(3):  # whether it changes what is best
            others = [row for row in range(3) if row != limit]
            wider = [sums[3, (sums[others] <= limits[others, None]).all(0)] for sums in all_of_them]
            narrow[limit] += np.concatenate(wider).min() < allowed[3].min()
    assert narrow.min() > 10, narrow


def test_says_what_would_fit() -> None:
    groups = [Group("a", (Choice("Q4_0", 100, 0.5), Choice("Q8_0", 200, 0.1))), Group("b", (Choice("Q4_0", 50, 0.25),))]
    assert least_loss(groups, 149) is None
    assert Problem((Part(tuple(groups), seconds=2.0),), (149,)).least == ([150], 300.0)
    with pytest.raises(Infeasible) as refused:
        least_bytes(groups, 0.3)
    assert refused.value.least == 0.35
    assert types(least_loss(groups, 150)) == ["Q4_0", "Q4_0"]
    assert types(least_loss(groups, 10**12)) == ["Q8_0", "Q4_0"]


def test_a_dearer_choice_that_is_no_better_is_never_taken() -> None:
    groups = [Group("a", (Choice("Q4_0", 10, 0.5), Choice("Q4_1", 20, 0.5), Choice("Q8_0", 30, 0.1)))]
    assert types(least_loss(groups, 25)) == ["Q4_0"]


def test_no_groups_need_nothing() -> None:
    assert types(least_loss([], 0)) == []


def test_the_frontier_holds_the_best_there_is_and_is_convex() -> None:
    for seed in range(200):
        groups = random_groups(seed)
        nbytes, losses = every(groups)
        corners = planning.frontier(groups)
        assert corners[0, 0] == nbytes.min()
        assert corners[-1, 1] == pytest.approx(losses.min(), abs=1e-12)
        for size, loss in corners:
            assert loss == pytest.approx(losses[nbytes <= size].min(), abs=1e-12), seed
        slopes = np.diff(corners[:, 1]) / np.diff(corners[:, 0])
        assert (np.diff(slopes) >= -1e-12).all(), seed
        # Nothing there is lies under a line between two corners.
        line = np.interp(nbytes, corners[:, 0], corners[:, 1])
        assert (losses >= line - 1e-9).all(), seed
