"""Processes that do jobs, on this machine and others: a Ray cluster."""

import pickle
import socket
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any, Protocol, TypeVar

from xent_quant.errors import ConfigError, ExportError, XentQuantError

T = TypeVar("T")

RETRIES = 3
"""Of a job whose worker dies: another one does it again."""
PATIENCE = 10.0
"""Seconds in which a cluster must answer."""
NO_RAY = "--ray needs Ray; pip install 'xent-quant[ray]', on every machine"


class Kept:
    """Something that was sent once, for many jobs: stands for it among their arguments."""

    def __init__(self, reference: Any) -> None:
        self.reference = reference


class Cluster(Protocol):
    """Whoever does jobs. What goes there and comes back is pickled: it is never shared."""

    @property
    def workers(self) -> int:
        """Jobs that run at the same time, at the moment."""

    def keep(self, value: object) -> Kept:
        """Send something that many jobs take."""

    def run(self, function: Callable[..., T], jobs: Iterable[tuple[Any, ...]]) -> Iterator[T]:
        """What a function of a module returns for each tuple of arguments, in their order. Jobs are asked for when somebody is
        free to do them. Raises what the function raises, and ExportError where workers die."""


def _call(function: Callable[..., T], *packed: bytes) -> bytes:
    """Runs where the job is done."""
    return pickle.dumps(function(*map(pickle.loads, packed)), protocol=pickle.HIGHEST_PROTOCOL)


class RayCluster:
    """A Cluster that Ray runs, one job for each of its CPUs.

    What is sent lies in Ray's object store until it was used: the rows of one expert more than there are workers, and as many
    results that were not asked for yet. It goes to disk where that is full.
    """

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        # Ray counts a job that raises as done; only those whose process or machine is lost run again.
        self._call = ray.remote(num_cpus=1, max_retries=RETRIES)(_call)

    @property
    def workers(self) -> int:
        """See `Cluster.workers`."""
        return max(1, int(self._ray.cluster_resources().get("CPU", 1)))

    def keep(self, value: object) -> Kept:
        """See `Cluster.keep`."""
        return Kept(self._ray.put(pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)))

    def run(self, function: Callable[..., T], jobs: Iterable[tuple[Any, ...]]) -> Iterator[T]:
        """See `Cluster.run`."""
        waiting, begun, running = iter(jobs), deque[Any](), set[Any]()
        workers, more = self.workers, True
        try:
            while True:
                while more and len(running) <= workers and len(begun) < 2 * workers + 2:
                    job = next(waiting, None)
                    if more := job is not None:
                        sent = [each if isinstance(each, Kept) else self.keep(each) for each in job or ()]
                        begun.append(self._call.remote(function, *(each.reference for each in sent)))
                        running.add(begun[-1])
                if not begun:
                    return
                if begun[0] in running:
                    running -= set(self._ray.wait(list(running), num_returns=1)[0])
                while begun and begun[0] not in running:
                    yield self._result(begun.popleft())
        finally:
            for each in running:
                self._ray.cancel(each, force=True)

    def _result(self, reference: Any) -> Any:
        errors = self._ray.exceptions
        try:
            return pickle.loads(self._ray.get(reference))
        except errors.RayTaskError as error:
            cause = error.cause
            raise cause if isinstance(cause, XentQuantError) else error from None
        except errors.RayError as error:
            said = " ".join(str(error).split())[:300]
            raise ExportError(f"--ray: a job was begun {RETRIES + 1} times and its worker was lost each time ({said})") from None


def _answers(address: str) -> None:
    """Raise OSError or ValueError where nobody listens: Ray itself would go on asking for half an hour."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError("not HOST:PORT")
    socket.create_connection((host.removeprefix("ray://"), int(port)), PATIENCE).close()


@contextmanager
def ray_cluster(address: str) -> Iterator[RayCluster]:
    """The cluster at an address, HOST:PORT, or with `auto` the one that this machine belongs to. Raises ConfigError where Ray is
    not installed or no cluster answers."""
    try:
        import ray
    except ImportError:
        raise ConfigError(NO_RAY) from None
    joined = ray.is_initialized()
    if not joined:
        try:
            _answers(address)
            ray.init(address=address, log_to_driver=False, logging_level="ERROR", configure_logging=False)
        except (OSError, RuntimeError, ValueError) as error:
            said = " ".join(str(error).split())[:200]
            raise ConfigError(
                f"--ray {address}: no Ray cluster answers there ({said}); `ray start --head` begins one on this machine, "
                "`ray start --address=HOST:6379` on another joins it"
            ) from None
    with redirect_stdout(sys.stderr):  # Ray prints there that a worker died, at the end too, and results are for standard output
        try:
            yield RayCluster(ray)
        finally:
            if not joined:
                ray.shutdown()
