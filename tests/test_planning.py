"""The planner against exhaustive search, and against dynamic programming over every single byte."""

from dataclasses import replace
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


def test_several_memories_and_the_time_of_a_token_equal_exhaustive_search_in_200_random_cases() -> None:
    """The shape of a model beside a card: groups that are read whole, experts on the card, and in RAM, where a byte takes more
    time; how many of them are where is to be found too. Seconds and rates are binary fractions, so that sums are exact."""
    limited = {"card": 0, "ram": 0, "seconds": 0}
    for seed in range(200):
        random = np.random.default_rng(seed)
        groups = random_groups(seed)
        always, experts = groups[: len(groups) // 2], groups[len(groups) // 2 :]
        slow = [2.0 ** -int(power) for power in random.integers(1, 8, 3)]
        problems, all_of_them = [], []
        for moved in range(len(experts) + 1):
            parts = [Part(tuple(always), (0,), slow[0]), Part(tuple(experts[moved:]), (0,), slow[1])]
            parts += [Part(tuple(experts[:moved]), (1,), slow[2])]
            fixed = (1 + moved) / 16
            card, ram, seconds, losses = np.zeros(1), np.zeros(1), np.full(1, fixed), np.zeros(1)
            for part in parts:
                nbytes, loss = every(list(part.groups))
                card, ram = (np.add.outer(each, nbytes * (i in part.memories)).ravel() for i, each in enumerate((card, ram)))
                seconds, losses = np.add.outer(seconds, part.seconds * nbytes).ravel(), np.add.outer(losses, loss).ravel()
            problems.append(Problem(tuple(parts), (inf, inf), fixed=fixed))
            all_of_them.append((card, ram, seconds, losses))
        for round in range(3):
            one = all_of_them[int(random.integers(len(problems)))]
            case = int(random.integers(len(one[0])))
            card, ram, seconds = (float(each[case]) * float(random.choice([1, 1.25, inf])) for each in one[:3])
            card, ram, seconds = (inf if limit != limit else limit for limit in (card, ram, seconds))  # 0 · inf
            bounded = [replace(problem, memory=(card, ram), seconds=seconds) for problem in problems]
            allowed = np.concatenate(
                [np.array(of)[:, (of[0] <= card) & (of[1] <= ram) & (of[2] <= seconds)] for of in all_of_them], 1
            )
            rate = 2.0 ** -int(random.integers(2, 12))
            for found, value in (
                (planning.least_loss(bounded), lambda seconds, loss: loss),
                (planning.least_loss(bounded, rate), lambda seconds, loss, rate=rate: loss + rate * seconds),
                *([(planning.least_product(bounded), lambda seconds, loss: loss * seconds)] if round == 0 else []),
            ):
                assert found is not None, seed
                used = np.zeros(3)
                choices = iter(found.choices)
                for part in problems[found.problem].parts:
                    for _ in part.groups:
                        nbytes = next(choices).nbytes
                        used[[*part.memories, 2]] += nbytes, part.seconds * nbytes
                assert found.seconds == used[2] + problems[found.problem].fixed, seed
                assert used[0] <= card, seed
                assert used[1] <= ram, seed
                assert found.seconds <= seconds, seed
                assert value(found.seconds, found.loss) == pytest.approx(value(*allowed[2:]).min(), rel=1e-11), seed
            for name, row, limit in zip(limited, allowed, (card, ram, seconds), strict=False):
                limited[name] += bool((allowed[3] > allowed[3].min()).any() and row.max() >= 0.9 * limit)
    assert min(limited.values()) > 50, limited


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
