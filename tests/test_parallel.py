"""Jobs side by side: their order, what becomes of one that fails, and places that are gone over in turn."""

import pickle
import threading
from collections.abc import Iterator
from functools import partial

import numba
import pytest
import torch

from xent_quant import parallel
from xent_quant.parallel import Turns, once


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


class Maker:
    """Makes a value when two have asked for it, or as many as `fails` says not at all."""

    def __init__(self, fails: int = 0) -> None:
        self.made, self.fails, self.begun, self.others = 0, fails, threading.Event(), threading.Event()

    @once
    def value(self) -> list[int]:
        """What is made."""
        self.made += 1
        self.begun.set()
        if self.made <= self.fails:
            raise ArithmeticError
        self.others.wait(5)
        return [self.made]


def test_what_is_made_once_is_waited_for_by_those_who_ask_the_same_object() -> None:
    maker, other, found = Maker(), Maker(), []
    asking = [threading.Thread(target=lambda: found.append(maker.value)) for _ in range(2)]
    for thread in asking:
        thread.start()
    assert maker.begun.wait(5)
    other.others.set()
    assert other.value == [1]  # nobody waits for another object
    assert found == []
    maker.others.set()
    for thread in asking:
        thread.join()
    assert found == [[1], [1]]
    assert found[0] is found[1] is maker.value
    assert Maker.value.__doc__ == "What is made."


def test_what_failed_is_made_again_and_no_lock_stays() -> None:
    maker = Maker(fails=1)
    maker.others.set()
    with pytest.raises(ArithmeticError):
        _ = maker.value
    assert maker.value == [2]
    del maker.begun, maker.others  # whose locks are the test's own
    assert pickle.loads(pickle.dumps(maker)).value == [2]


def test_one_that_fails_ends_those_before_it_that_wait_for_it(threads: int) -> None:
    """All of them are under way, whatever the threads."""
    stopped = []

    def waits() -> None:
        try:
            while True:
                parallel.check()
                threading.Event().wait(0.01)
        except parallel.Stopped:
            stopped.append(True)
            raise

    def fails() -> None:
        raise ValueError("no memory")

    with pytest.raises(ValueError, match="no memory"):
        parallel.run([waits, waits, fails], every=True)
    assert stopped == [True, True]
