"""Jobs side by side: their order, what becomes of one that fails, and places that are gone over in turn."""

import threading
from collections.abc import Iterator
from functools import partial

import numba
import pytest
import torch

from xent_quant import parallel
from xent_quant.parallel import Turns


@pytest.fixture(params=[1, 2])
def threads(request) -> Iterator[int]:
    before = numba.get_num_threads(), torch.get_num_threads()
    numba.set_num_threads(min(request.param, before[0]))
    torch.set_num_threads(request.param)
    yield numba.get_num_threads()
    numba.set_num_threads(before[0])
    torch.set_num_threads(before[1])


def test_results_come_in_order_and_each_job_has_one_thread(threads) -> None:
    def job(number: int) -> tuple[int, int]:
        assert threads == 1 or numba.get_num_threads() == 1
        return number, torch.get_num_threads()

    assert parallel.run([partial(job, number) for number in range(9)]) == [(number, 1) for number in range(9)]
    assert numba.get_num_threads() == threads


@pytest.mark.skipif(numba.config.NUMBA_NUM_THREADS < 2, reason="one core")
def test_each_job_has_as_many_threads_as_it_is_given() -> None:
    def job() -> tuple[int, int]:
        return numba.get_num_threads(), torch.get_num_threads()

    before = numba.get_num_threads(), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        numba.set_num_threads(2)
        assert parallel.run([job, job], each=2) == [(2, 2)] * 2
        assert (numba.get_num_threads(), torch.get_num_threads()) == (2, 2)
    finally:
        numba.set_num_threads(before[0])
        torch.set_num_threads(before[1])


def test_no_more_run_at_a_time_than_asked() -> None:
    under_way, most = [0], [0]
    counting = threading.Lock()

    def job() -> None:
        with counting:
            under_way[0] += 1
            most[0] = max(most[0], under_way[0])
        threading.Event().wait(0.01)
        with counting:
            under_way[0] -= 1

    parallel.run([job] * 6, most=1)
    assert most == [1]


def test_the_first_failure_is_raised_and_the_others_stop(threads) -> None:
    """Jobs behind the one that fails wait for it, and would wait for ever."""
    turns = Turns(4)

    def job(number: int) -> None:
        if number == 1:
            raise KeyError(number)
        with turns.at(number, 0):
            pass

    with pytest.raises(KeyError, match="1"):
        parallel.run([partial(job, number) for number in range(4)])


@pytest.mark.parametrize("threads", [2], indirect=True)
def test_every_place_is_passed_in_the_jobs_order(threads) -> None:
    turns, seen = Turns(6), []

    def job(number: int) -> None:
        for place in range(number % 2, 20, 1 + number % 3):  # each at other places
            with turns.at(number, place):
                seen.append((place, number))
        with turns.at(number, 20):
            pass

    parallel.run([partial(job, number) for number in range(6)])
    for place in range(20):
        order = [number for at, number in seen if at == place]
        assert order == sorted(order)
    assert len(seen) > 60
