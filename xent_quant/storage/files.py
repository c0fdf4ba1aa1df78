"""Bytes at offsets of a file, rows of a matrix on disk, small files replaced whole, free space."""

import errno
import hashlib
import os
import shutil
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import DTypeLike, NDArray

from xent_quant.errors import ExportError

Bytes = bytes | bytearray | memoryview | NDArray[Any]

# macOS refuses more than 2 GiB in one call, Linux stops short of it.
CALL_BYTES = 1 << 30

# What a system lacks is left out there. Without waiting, since opening a pipe would never return.
OPEN_FLAGS = sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"))


class PositionalFile:
    """A regular file read and written at byte offsets, by several threads at once if need be.

    What the system refuses is raised as OSError, which `Workspace.open` turns into an ExportError.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        """Use `create` or `open`. The descriptor is closed by `close`."""
        self.path = path
        self._descriptor = descriptor
        self._position = threading.Lock()  # held from seek to read or write, where a system cannot do both in one call

    @classmethod
    def create(cls, path: Path) -> Self:
        """A new, empty file. Raises ExportError where the name is taken, be it by a link to nowhere."""
        try:
            return cls(path, open_itself(path, os.O_RDWR | os.O_CREAT | os.O_EXCL))
        except FileExistsError as error:
            raise ExportError(f"{path}: exists already; remove it, or choose another --output") from error

    @classmethod
    def open(cls, path: Path, write: bool = True) -> Self:
        """A file that exists. Raises ExportError for a link and for anything else that is not a regular file."""
        return cls(path, open_itself(path, os.O_RDWR if write else os.O_RDONLY))

    @property
    def size(self) -> int:
        """In bytes."""
        return os.fstat(self._descriptor).st_size

    def write_at(self, data: Bytes, offset: int) -> None:
        """All of `data` from byte `offset` on; the file grows where that is beyond its end."""
        self._write(_flat(data), offset)

    def read_at(self, nbytes: int, offset: int) -> NDArray[np.uint8]:
        """[nbytes] uint8 from byte `offset` on. Raises ExportError where the file ends before."""
        array = np.empty(nbytes, np.uint8)
        self.read_into(array, offset)
        return array

    def read_into(self, array: NDArray[Any] | memoryview | bytearray, offset: int) -> None:
        """Fill `array`, contiguous, with the bytes from `offset` on. Raises ExportError where the file ends before."""
        if isinstance(array, np.ndarray) and not array.flags.c_contiguous:
            raise ValueError("read_into needs a contiguous array")
        self._read(_flat(array), offset)

    def truncate(self, nbytes: int) -> None:
        """Make the file `nbytes` long; new bytes are zero, and take no room where the file system knows holes."""
        try:
            os.ftruncate(self._descriptor, nbytes)
        except OSError as error:
            raise self._named(error) from None

    def sync(self) -> None:
        """Return when what was written would survive a power cut."""
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            raise self._named(error) from None

    def close(self) -> None:
        """May be called again."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _named(self, error: OSError) -> OSError:
        """The system doesn't name the file of an open descriptor in its errors."""
        error.filename = str(self.path)
        return error

    def _write(self, view: memoryview, offset: int) -> None:
        try:
            while view:
                written = self._write_some(view[:CALL_BYTES], offset)
                view, offset = view[written:], offset + written
        except OSError as error:
            raise self._named(error) from None

    def _read(self, view: memoryview, offset: int) -> None:
        try:
            while view:
                count = self._read_some(view[:CALL_BYTES], offset)
                if not count:
                    raise ExportError(
                        f"{self.path}: ends at byte {self.size}, before byte {offset + len(view)}; "
                        "it was cut short: remove it and run again"
                    )
                view, offset = view[count:], offset + count
        except OSError as error:
            raise self._named(error) from None

    def _write_some(self, view: memoryview, offset: int) -> int:
        if hasattr(os, "pwrite"):
            return os.pwrite(self._descriptor, view, offset)
        with self._position:
            os.lseek(self._descriptor, offset, os.SEEK_SET)
            return os.write(self._descriptor, view)

    def _read_some(self, view: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._descriptor, [view], offset)
        if hasattr(os, "pread"):
            data = os.pread(self._descriptor, len(view), offset)
        else:
            with self._position:
                os.lseek(self._descriptor, offset, os.SEEK_SET)
                data = os.read(self._descriptor, len(view))
        view[: len(data)] = data
        return len(data)


class Rows:
    """A [count, columns] array of one dtype in a file, row after row, never mapped: pages of a mapping would count as memory
    of the process. Byte order is the machine's."""

    def __init__(self, file: PositionalFile, count: int, columns: int, dtype: DTypeLike) -> None:
        """Use `create` or `open`."""
        self.file = file
        self.count = count
        self.columns = columns
        self.dtype: np.dtype[Any] = np.dtype(dtype)
        self._row_bytes = columns * self.dtype.itemsize

    @classmethod
    def create(cls, path: Path, count: int, columns: int, dtype: DTypeLike = np.float32) -> Self:
        """A new file of `count` rows of zeros. Raises ExportError where the name is taken."""
        rows = cls(PositionalFile.create(path), count, columns, dtype)
        rows.file.truncate(count * rows._row_bytes)
        return rows

    @classmethod
    def open(cls, path: Path, count: int, columns: int, dtype: DTypeLike = np.float32) -> Self:
        """A file made by `create` with the same arguments. Raises ExportError for a link or another size."""
        rows = cls(PositionalFile.open(path), count, columns, dtype)
        size, wanted = rows.file.size, count * rows._row_bytes
        if size != wanted:
            rows.close()
            raise ExportError(f"{path}: holds {size} bytes, {count} rows of {columns} {rows.dtype} are {wanted}; remove it")
        return rows

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """[stop - start, columns], a new array. Raises ValueError beyond the rows."""
        self._check_range(start, stop)
        rows = np.empty((stop - start, self.columns), self.dtype)
        self.file.read_into(rows, start * self._row_bytes)
        return rows

    def write(self, start: int, rows: NDArray[Any]) -> None:
        """`rows`, [n, columns] of this dtype, as rows `start` to `start + n`. Raises ValueError for another shape or dtype."""
        self._check_rows(rows, len(rows))
        self._check_range(start, start + len(rows))
        self.file.write_at(rows, start * self._row_bytes)

    def take(self, indices: NDArray[np.int64]) -> NDArray[Any]:
        """[n, columns], a new array: the rows at `indices`, [n], which ascend and do not repeat (ValueError otherwise)."""
        rows = np.empty((len(indices), self.columns), self.dtype)
        view, size = _flat(rows), self._row_bytes
        for first, stop, index in self._runs(indices):
            self.file._read(view[first * size : stop * size], index * size)
        return rows

    def put(self, indices: NDArray[np.int64], rows: NDArray[Any]) -> None:
        """Write `rows`, [n, columns] of this dtype, at `indices`, [n], which ascend and do not repeat (ValueError otherwise)."""
        self._check_rows(rows, len(indices))
        view, size = _flat(rows), self._row_bytes
        for first, stop, index in self._runs(indices):
            self.file._write(view[first * size : stop * size], index * size)

    def sync(self) -> None:
        """Return when what was written would survive a power cut."""
        self.file.sync()

    def close(self) -> None:
        """May be called again."""
        self.file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _runs(self, indices: NDArray[np.int64]) -> Iterator[tuple[int, int, int]]:
        """Split `indices` into runs of consecutive ones: (first and stop position in `indices`, row of the first)."""
        steps = np.diff(indices)
        if (steps <= 0).any():
            raise ValueError("indices must ascend and not repeat")
        if len(indices):
            self._check_range(int(indices[0]), int(indices[-1]) + 1)
        firsts = np.concatenate([[0], np.flatnonzero(steps != 1) + 1]) if len(indices) else np.empty(0, np.int64)
        stops = np.append(firsts[1:], len(indices)) if len(indices) else firsts
        return zip(firsts.tolist(), stops.tolist(), indices[firsts].tolist(), strict=True)

    def _check_range(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= self.count:
            raise ValueError(f"rows {start} to {stop} of {self.count}")

    def _check_rows(self, rows: NDArray[Any], count: int) -> None:
        if rows.shape != (count, self.columns) or rows.dtype != self.dtype:
            raise ValueError(f"{rows.shape} {rows.dtype} in place of {(count, self.columns)} {self.dtype}")


def replace_bytes(path: Path, data: bytes) -> None:
    """Make `data` the whole content of `path`: readers, and whoever comes after a power cut, find the old or the new.

    One process at a time. Raises OSError, and then `path` is as it was unless only the sync of its folder failed.
    """
    temporary = path.with_name(f".{path.name}.part")
    temporary.unlink(missing_ok=True)  # of a killed run
    try:
        with PositionalFile.create(temporary) as file:
            file.write_at(data, 0)
            file.sync()
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def read_bytes(path: Path) -> bytes | None:
    """The whole content of `path`; None where nothing has that name. Raises ExportError for a link or a folder."""
    try:
        with PositionalFile.open(path, write=False) as file:
            return file.read_at(file.size, 0).tobytes()
    except FileNotFoundError:
        return None


def sealed(data: bytes) -> bytes:
    """`data` behind its digest, for files that only this program reads: see `unsealed`."""
    return hashlib.sha256(data).digest() + data


def unsealed(raw: bytes) -> bytes | None:
    """What `sealed` was given; None where that did not make `raw`, whole. Libraries that read arrays trust every length in a
    file, so what is damaged must not come to them."""
    digest, data = raw[: hashlib.sha256().digest_size], raw[hashlib.sha256().digest_size :]
    return data if digest == hashlib.sha256(data).digest() else None


def free_bytes(folder: Path) -> int:
    """What this user may still write to the file system of `folder`, which exists."""
    return shutil.disk_usage(folder).free


def check_free_space(folder: Path, needed: int) -> None:
    """Raise ExportError unless the file system of `folder` (which exists) has `needed` bytes free."""
    free = free_bytes(folder)
    if free < needed:
        raise ExportError(
            f"{folder}: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free; make room or choose another --output"
        )


def open_itself(path: Path, flags: int) -> int:
    """A descriptor of the regular file `path`, which the caller closes. Raises ExportError for a link, followed nowhere, and
    for anything else that is not a regular file; OSError for what the system refuses."""
    try:
        if not hasattr(os, "O_NOFOLLOW"):
            _refuse_unless_regular(path)
        descriptor = os.open(path, flags | OPEN_FLAGS, 0o666)
    except OSError as error:
        if not isinstance(error, FileExistsError):
            _refuse_unless_regular(path, error)
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ExportError(f"{path}: is not a regular file; remove it, or choose another --output")
    return descriptor


def sync(path: Path) -> None:
    """Return when the file or folder `path` would survive a power cut as it is. Raises OSError."""
    folders_open = hasattr(os, "O_DIRECTORY")
    if not folders_open and path.is_dir():
        return  # Windows opens no folders, and journals their changes itself
    descriptor = os.open(path, os.O_RDONLY if folders_open else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():  # some network drives sync no folders
            raise
    finally:
        os.close(descriptor)


def sync_tree(path: Path) -> None:
    """`sync` the file `path`, or the folder with all it holds. Raises ExportError for a link or a special file in it."""
    mode = os.lstat(path).st_mode
    if stat.S_ISDIR(mode):
        for entry in sorted(path.iterdir()):
            sync_tree(entry)
    elif not stat.S_ISREG(mode):
        raise ExportError(f"{path}: is a link or a special file, which is not published; remove it and run again")
    sync(path)


def remove(path: Path) -> None:
    """Delete a file, a link (not what it points to) or a folder with all it holds; nothing where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def can_be_written(file: Path) -> bool:
    """Whether a file could be made there, in folders that are not there yet too; no more than a first look."""
    there = next(parent for parent in file.absolute().parents if parent.exists())
    return not file.is_dir() and there.is_dir() and os.access(there, os.W_OK)


@contextmanager
def reporting(folder: Path, choose: str = "--output") -> Iterator[None]:
    """Turn OSError within the block into ExportError in one line; `folder` is named where the system names no file, and `choose`
    is what to choose another of."""
    try:
        yield
    except OSError as error:
        file = error.filename2 or error.filename or folder
        raise ExportError(f"{file}: {error.strerror or error}; put that right, or choose another {choose}") from error


def _flat(data: Bytes) -> memoryview:
    """The bytes of `data` one after the other, copied only where an array is not contiguous."""
    if isinstance(data, np.ndarray):
        return np.ascontiguousarray(data).reshape(-1).view(np.uint8).data  # a memoryview of an empty array cannot be cast
    return memoryview(data).cast("B")


def _refuse_unless_regular(path: Path, error: OSError | None = None) -> None:
    try:
        mode = os.lstat(path).st_mode
    except OSError:
        return
    if stat.S_ISLNK(mode):
        raise ExportError(f"{path}: is a link, which is not followed; remove it, or choose another --output") from error
    if not stat.S_ISREG(mode):
        raise ExportError(f"{path}: is not a regular file; remove it, or choose another --output") from error
