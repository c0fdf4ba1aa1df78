"""How kernels are compiled, and kept so that the next process need not: machine code in a folder that only its owner writes.

What is read back is run, so it is only taken from a folder that is this user's own, and only where it is whole: numba's files are
pickles without a checksum, and one that a full disk cut short would fail every later run.

File: 32 bytes of SHA-256 over a stamp and the rest, then the rest, numba's pickle. The stamp holds the versions of Python and
numba, the file's name and all sources beside the kernel's and of `formats`, since kernels of other files are compiled into it.
"""

import hashlib
import logging
import os
import pickle
import stat
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Self

import numba
from numba.core.caching import CompileResultCacheImpl, FunctionCache, IndexDataCacheFile

log = logging.getLogger(__name__)

LARGEST = 1 << 28
"""Bytes of a file of the cache; a damaged one may be any size."""
DIGEST_BYTES = 32
KERNELS = Path(__file__).with_name("formats")
"""Whose kernels others call."""


def jit(function: Callable[..., Any], *, parallel: bool = False) -> Any:
    """numba without the interpreter lock, IEEE division by zero, nothing fused or reordered. The first use compiles (seconds)
    and is kept under ~/.cache/xent-quant, or NUMBA_CACHE_DIR; where that cannot be this user's own, every process compiles, and
    the log says so once."""
    kernel = numba.njit(nogil=True, error_model="numpy", parallel=parallel)(function)
    if folder() is not None:
        kernel._cache = _Cache(function)
    return kernel


@cache
def folder() -> Path | None:
    """Where compiled kernels are kept: made for this user alone. None where there can be no such folder."""
    try:
        base = Path(numba.config.CACHE_DIR) if numba.config.CACHE_DIR else Path.home() / ".cache"
        path = base / "xent-quant" / "kernels"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
        status = os.lstat(path)
        if not stat.S_ISDIR(status.st_mode):
            raise NotADirectoryError(f"{path} is no folder")
        if hasattr(os, "geteuid"):
            if status.st_uid != os.geteuid():
                raise PermissionError(f"{path} is another user's")
            path.chmod(0o700)
        if not os.access(path, os.W_OK):
            raise PermissionError(f"{path} cannot be written")
    except (OSError, RuntimeError) as error:  # RuntimeError: a user without a home
        log.warning("compiled kernels cannot be kept (%s): compiling anew; set NUMBA_CACHE_DIR to a folder of your own", error)
        return None
    return path


@cache
def _sources(of: Path) -> bytes:
    """A hash of all Python files of a folder."""
    digest = hashlib.sha256()
    for file in sorted(of.glob("*.py")):
        digest.update(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return digest.digest()


class _Locator:
    """Tells numba where a function's files lie, how they are named, and what they depend on."""

    def __init__(self, function: Callable[..., Any], file: Path, base: Path) -> None:
        self._line = function.__code__.co_firstlineno
        self._sources = file.parent
        self._path = base / f"{file.parent.name}-{hashlib.sha256(str(file.parent).encode()).hexdigest()[:16]}"

    @classmethod
    def from_function(cls, function: Callable[..., Any], file: str) -> Self | None:
        base = folder()
        if base is None:
            return None
        return cls(function, Path(file).resolve(), base)

    def ensure_cache_path(self) -> None:
        self._path.mkdir(mode=0o700, exist_ok=True)

    def get_cache_path(self) -> str:
        return str(self._path)

    def get_source_stamp(self) -> bytes:
        return _sources(self._sources) + _sources(KERNELS)

    def get_disambiguator(self) -> str:
        return str(self._line)


class _Implementation(CompileResultCacheImpl):  # type: ignore[misc]
    _locator_classes = (_Locator,)


class _Sealed(IndexDataCacheFile):  # type: ignore[misc]
    """numba's index and data files, each behind a digest. One that is damaged is not there: it is written anew."""

    def _load_index(self) -> dict[Any, str]:
        raw = self._read(self._index_name)
        return {} if raw is None else pickle.loads(raw)

    def _save_index(self, overloads: dict[Any, str]) -> None:
        self._write(self._index_name, self._dump(overloads))

    def _load_data(self, name: str) -> Any:
        raw = self._read(name)
        return None if raw is None else pickle.loads(raw)

    def _save_data(self, name: str, data: Any) -> None:
        self._write(name, self._dump(data))

    def _digest(self, name: str, content: bytes) -> bytes:
        stamp = (sys.version, self._version, self._source_stamp, name)
        return hashlib.sha256(repr(stamp).encode() + content).digest()

    def _read(self, name: str) -> bytes | None:
        path = Path(self._cache_path, name)
        try:
            if not path.is_file() or path.stat().st_size > LARGEST:
                return None
            raw = path.read_bytes()
        except OSError:
            return None
        digest, content = raw[:DIGEST_BYTES], raw[DIGEST_BYTES:]
        return content if digest == self._digest(name, content) else None

    def _write(self, name: str, content: bytes) -> None:
        with self._open_for_write(self._data_path(name)) as file:
            file.write(self._digest(name, content) + content)


class _Cache(FunctionCache):  # type: ignore[misc]
    _impl_class = _Implementation

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        self._cache_file = _Sealed(
            cache_path=self._cache_path,
            filename_base=self._impl.filename_base,
            source_stamp=self._impl.locator.get_source_stamp(),
        )

    def save_overload(self, signature: Any, compiled: Any) -> None:
        """A full disk costs the next process a compilation, not this one its work."""
        try:
            super().save_overload(signature, compiled)
        except OSError as error:
            log.warning("%s: a compiled kernel cannot be kept: %s", self._cache_path, error)
            self.disable()
