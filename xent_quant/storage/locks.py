"""One process at a time: locks that the system itself releases when their holder dies."""

import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from xent_quant.errors import ExportError
from xent_quant.storage.files import open_itself, read_bytes

try:
    import fcntl
except ImportError:
    import msvcrt

    def _lock_descriptor(descriptor: int) -> None:
        """Raise BlockingIOError where another open file of any process holds the lock."""
        # One byte far beyond the end: what is locked cannot be read by others, and they are to read who holds it.
        os.lseek(descriptor, 1 << 30, os.SEEK_SET)
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
        except OSError as error:
            raise BlockingIOError(*error.args) from error

    REMOVED_WHILE_OPEN = False
else:

    def _lock_descriptor(descriptor: int) -> None:
        """Raise BlockingIOError where another open file of any process holds the lock."""
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

    REMOVED_WHILE_OPEN = True

POLL_SECONDS = 0.02


@dataclass(eq=False)
class _Held:
    path: Path
    descriptor: int


_held: set[_Held] = set()


@contextmanager
def lock(path: Path, what: str, wait: float = 0.0) -> Iterator[None]:
    """Hold the lock file `path` (made and removed here) within the block; no other process, nor another block of this one,
    gets it meanwhile. A dead process's lock is free.

    Raises ExportError, in the name of `what`, where it is still held after `wait` seconds, and where `path` is a link;
    OSError for what the system refuses.
    """
    held = _acquire(path, what, wait)
    try:
        yield
    finally:
        _release(held)


def remove_if_dead(path: Path) -> None:
    """Remove the lock file of a process that died; not one that is held, nor a file that no `lock` wrote. Raises OSError."""
    if path.is_symlink() or not path.is_file() or _holder(path) is None:
        return
    held = _try(path)
    if held is not None:
        _release(held)


def _acquire(path: Path, what: str, wait: float) -> _Held:
    # Refused only at the second attempt: `remove_if_dead` holds a lock for an instant, and a new holder needs one to write
    # its name over that of a dead one.
    deadline = time.monotonic() + max(wait, POLL_SECONDS)
    while (held := _try(path)) is None:
        if time.monotonic() >= deadline:
            raise ExportError(_refusal(path, what))
        time.sleep(POLL_SECONDS)
    return held


def _try(path: Path) -> _Held | None:
    """The lock, or None where it is held."""
    while True:
        descriptor = open_itself(path, os.O_RDWR | os.O_CREAT)
        try:
            _lock_descriptor(descriptor)
            # The holder before may have removed the file between our opening and our locking it: then another process can
            # hold a new one of that name.
            if os.path.samestat(os.fstat(descriptor), os.lstat(path)):
                _write_holder(descriptor)
                held = _Held(path, descriptor)
                _held.add(held)
                return held
        except BlockingIOError:
            os.close(descriptor)
            return None
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _release(held: _Held) -> None:
    if held not in _held:
        return  # in a forked child: the lock is its parent's
    _held.remove(held)
    try:
        if REMOVED_WHILE_OPEN:  # before it is released, or the next holder's file would be removed
            with suppress(OSError):
                held.path.unlink()
    finally:
        os.close(held.descriptor)
    if not REMOVED_WHILE_OPEN:
        with suppress(OSError):  # the next holder has it open
            held.path.unlink()


def _write_holder(descriptor: int) -> None:
    since = datetime.now().astimezone().isoformat(timespec="seconds")
    data = json.dumps({"pid": os.getpid(), "host": platform.node(), "since": since}).encode()
    os.ftruncate(descriptor, 0)
    os.lseek(descriptor, 0, os.SEEK_SET)
    os.write(descriptor, data)


def _holder(path: Path) -> dict[str, Any] | None:
    """What the lock file says about its holder; None where it does not (yet), or is gone."""
    try:
        holder = json.loads(read_bytes(path) or b"")
    except (OSError, ValueError, RecursionError, ExportError):
        return None
    return holder if isinstance(holder, dict) and {"pid", "host", "since"} <= holder.keys() else None


def _refusal(path: Path, what: str) -> str:
    for _ in range(10):
        holder = _holder(path)
        if holder is not None:
            return (
                f"{what}: process {holder['pid']} on {holder['host']} has been writing it since {holder['since']}; "
                "wait for it, or stop it"
            )
        time.sleep(POLL_SECONDS)
    return f"{what}: another process has been writing it; wait for it, or stop it"


def _forget_in_child() -> None:
    """Workers forked by the holder would keep its locks beyond its death."""
    for held in _held:
        with suppress(OSError):
            os.close(held.descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
