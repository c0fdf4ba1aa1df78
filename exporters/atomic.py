"""Files and folders that appear whole or not at all."""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from xent_quant.errors import ExportError


def temporary_name(target: Path) -> Path:
    """The hidden name beside `target` under which it is written; always the same, so that a killed run's leftover is
    overwritten by the next."""
    return target.with_name(f".{target.name}.part")


@contextmanager
def writing(targets: Sequence[Path], *, force: bool) -> Iterator[None]:
    """Make the folder of `targets`. Raises ExportError where one of them exists and `force` is False, and for what the system
    refuses within the block, which leaves nothing behind: see `staged`."""
    folder = targets[0].parent
    try:
        if folder.exists() and not folder.is_dir():
            raise ExportError(f"{folder}: is a file; choose a folder as --output")
        folder.mkdir(parents=True, exist_ok=True)
        for target in targets:
            if target.exists() and not force:
                raise ExportError(f"{target}: exists already; add --force to replace it, or choose another --output")
        yield
    except OSError as error:
        raise ExportError(
            f"{error.filename or targets[0]}: {error.strerror or error}; nothing was written, choose another --output"
        ) from error


@contextmanager
def staged(targets: Sequence[Path]) -> Iterator[list[Path]]:
    """Yield temporary names for `targets`; when the block ends well, sync the files and rename them.

    An exception removes them. The first target is renamed last, and where it already existed it is removed before the
    others are replaced: whoever opens it never sees it with files of another run. Raises OSError; files renamed by then
    are removed.
    """
    temporary = [temporary_name(target) for target in targets]
    try:
        yield temporary
        for path in temporary:
            _sync(path)
        if len(targets) > 1:
            targets[0].unlink(missing_ok=True)
        renamed: list[Path] = []
        try:
            for path, target in reversed(list(zip(temporary, targets, strict=True))):
                path.replace(target)
                renamed.append(target)
        except BaseException:
            for target in renamed:
                target.unlink(missing_ok=True)
            raise
        for folder in {target.parent for target in targets}:
            _sync(folder)
    finally:
        for path in temporary:
            path.unlink(missing_ok=True)


@contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """Yield a new hidden folder beside `target`; when the block ends well, sync what it holds and give it that name.

    An exception removes it. A folder that has the name already is replaced; between moving it aside and the new one's
    appearance there is none, never a mixture. Raises OSError.
    """
    temporary, old = temporary_name(target), target.with_name(f".{target.name}.old")
    for leftover in (temporary, old):  # of a killed run
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            _sync(path)
        if target.exists():
            target.replace(old)
        try:
            temporary.replace(target)
        except BaseException:
            if old.exists():
                old.replace(target)
            raise
        _sync(target.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_at(file: int, data: NDArray[np.uint8], offset: int) -> None:
    """All of `data` to an open file descriptor, from byte `offset` on. Raises OSError."""
    view = np.ascontiguousarray(data).data.cast("B")
    while view:
        written = os.pwrite(file, view, offset)
        view, offset = view[written:], offset + written


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
