"""Processes that are forked, hold things, and are killed."""

import os
import signal
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path


def fork(work: Callable[[], object]) -> int:
    """The id of a child that does `work` and exits: 0, or 99 after an exception, which it prints."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, which the child does not use
        process = os.fork()
    if process:
        return process
    try:
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(99)


def wait(process: int) -> int:
    """Its exit code; minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def kill(process: int) -> None:
    os.kill(process, signal.SIGKILL)
    assert wait(process) == -signal.SIGKILL


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.002)
