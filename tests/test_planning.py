"""The planner against exhaustive search, and against dynamic programming over every single byte."""

from math import inf

import numpy as np
import pytest

from xent_quant.planning import Choice, Group, Infeasible, least_bytes, least_loss


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
    assert found.nbytes <= budget
    assert found.loss == pytest.approx(least[budget], rel=1e-9)


def test_says_what_would_fit() -> None:
    groups = [Group("a", (Choice("Q4_0", 100, 0.5), Choice("Q8_0", 200, 0.1))), Group("b", (Choice("Q4_0", 50, 0.25),))]
    with pytest.raises(Infeasible) as refused:
        least_loss(groups, 149)
    assert refused.value.least == 150
    with pytest.raises(Infeasible) as refused:
        least_bytes(groups, 0.3)
    assert refused.value.least == 0.35
    assert [choice.type for choice in least_loss(groups, 150).choices] == ["Q4_0", "Q4_0"]
    assert [choice.type for choice in least_loss(groups, 10**12).choices] == ["Q8_0", "Q4_0"]


def test_a_dearer_choice_that_is_no_better_is_never_taken() -> None:
    groups = [Group("a", (Choice("Q4_0", 10, 0.5), Choice("Q4_1", 20, 0.5), Choice("Q8_0", 30, 0.1)))]
    assert least_loss(groups, 25).choices[0].type == "Q4_0"


def test_no_groups_need_nothing() -> None:
    assert least_loss([], 0).nbytes == 0
