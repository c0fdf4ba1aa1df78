"""Jobs side by side, each on one thread: an expert, or a few hundred rows of a large weight.

Products of an expert's size do not keep several threads busy, and what lies between them is one thread's work anyway. And a
job on one thread gives the same bits however many there are.
"""

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any, Generic, TypeVar, overload

import numba

T = TypeVar("T")

_looking = threading.Lock()

PATIENCE = 0.2
"""Seconds after which one who waits for another job looks whether there is still a point in it."""


class Stopped(Exception):
    """Another job failed, or a person wants to stop."""


class _Mine(threading.local):
    stop: threading.Event | None = None


_mine = _Mine()


def run(jobs: Sequence[Callable[[], T]], most: int | None = None, *, each: int = 1, every: bool = False) -> list[T]:
    """What the jobs return, in their order. They are begun in it too, so one may wait for those before it (`Turns`).

    As many run at a time as numba has threads here, or `most`, or `every` one, if later ones are waited for too; a job's own
    products, factorisations and kernels have one thread, or `each` where several jobs run, and jobs within it run one after the
    other, or so many at a time. Raises what the first of them that fails raises; the others stop at their next `check`.
    """
    count = len(jobs) if every else min(numba.get_num_threads(), len(jobs), most or len(jobs))
    stop = threading.Event()

    def begin() -> None:
        numba.set_num_threads(each)
        if torch := sys.modules.get("torch"):
            torch.get_num_threads()  # else a thread's first product takes the number that was set last, wherever that was
            torch.set_num_threads(each)
        _mine.stop = stop

    with one_thread():
        if count <= 1:
            return [job() for job in jobs]
        with ThreadPoolExecutor(count, initializer=begin) as pool:
            futures = [pool.submit(job) for job in jobs]
            try:
                if every:  # else those before one that failed may wait for it
                    wait(futures, return_when=FIRST_EXCEPTION)
                    _ = [future.result() for future in futures if future.done()]
                return [future.result() for future in futures]
            except BaseException:
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def check() -> None:
    """Raise `Stopped` where nobody waits any more for the job that runs here."""
    if _mine.stop is not None and _mine.stop.is_set():
        raise Stopped


@contextmanager
def one_thread() -> Iterator[None]:
    """For torch, if it is there at all: products and LAPACK."""
    torch = sys.modules.get("torch")
    threads = torch.get_num_threads() if torch else 1
    if torch is None or threads == 1:
        yield
        return
    torch.set_num_threads(1)  # of this thread, of MKL, and of threads that begin now
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Turns:
    """Lets jobs that are numbered from 0 go over the same places, which ascend, each behind the one before it."""

    def __init__(self, jobs: int) -> None:
        self._passed = [-1] * jobs
        self._moved = threading.Condition()

    @contextmanager
    def at(self, job: int, place: int) -> Iterator[None]:
        """For job `job`, all places up to `place`: entered when the job before has left them."""
        with self._moved:
            while job and self._passed[job - 1] < place:
                check()
                self._moved.wait(PATIENCE)
        yield
        with self._moved:
            self._passed[job] = place
            self._moved.notify_all()


class once(Generic[T]):
    """A method that is read as an attribute: what it makes is kept. Jobs that ask the same object meanwhile wait.

    functools.cached_property has, up to Python 3.11, one lock for all objects of a class: experts side by side waited for each
    other's factorisations.
    """

    def __init__(self, make: Callable[[Any], T]) -> None:
        self._make, self._name, self.__doc__ = make, make.__name__, make.__doc__

    @overload
    def __get__(self, of: None, owner: Any) -> "once[T]": ...

    @overload
    def __get__(self, of: object, owner: Any) -> T: ...

    def __get__(self, of: object | None, owner: Any = None) -> "T | once[T]":
        if of is None:
            return self
        kept, key = of.__dict__, f"{self._name} is being made"
        with _looking:
            making = kept.setdefault(key, threading.RLock())
        with making:
            try:
                if self._name not in kept:
                    kept[self._name] = self._make(of)
                found: T = kept[self._name]
                return found
            finally:
                kept.pop(key, None)  # locks are not pickled
