"""The header of a GGUF file: its keys, and which tensor lies where. Read here rather than by gguf-py, which believes every length
that a file states: an array of 2^40 elements in a file of 49 bytes would keep it busy for hours.

Layout (ggml's docs/gguf.md), little-endian: magic, u32 version, u64 tensors, u64 keys; the keys (text, u32 type, value); the
tensors (text, u32 dimensions, u64 each, u32 type, u64 offset from the data); padding; the data. A text is u64 bytes and UTF-8, an
array u32 type, u64 elements and those.
"""

import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np

from xent_quant.checkpoint.headers import DAMAGED, refuse_pointer
from xent_quant.errors import CheckpointError

VERSIONS = (2, 3)
NUMBERS = ("<u1", "<i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?", None, None, "<u8", "<i8", "<f8")
"""numpy's types by GGUF's number of a value's type; 8 is a text, 9 an array."""
BOOL, TEXT, ARRAY = 7, 8, 9
LARGEST_HEADER = 1 << 26
"""Bytes. That of a model with 256k tokens has some 12 MB."""
MOST_DIMENSIONS = 4
DEEPEST = 4
"""Arrays within arrays; nobody writes any."""


@dataclass(frozen=True)
class GGUFTensor:
    """`shape` is row-major, `type` ggml's name, `offset` from the start of the file."""

    name: str
    shape: tuple[int, ...]
    type: str
    file: Path
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GGUFHeader:
    """Keys to plain values (arrays are lists), and tensors by name in the file's order."""

    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]


def read_gguf(path: Path) -> GGUFHeader:
    """The header of a file, checked against its size. Raises CheckpointError naming the file and what is wrong, or the tensor."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        with path.open("rb") as stream:
            return _Reader(path, stream).header()
    except (ValueError, OverflowError) as error:  # UnicodeDecodeError too
        raise CheckpointError(f"{path}: truncated or not a GGUF file ({error}); {DAMAGED}") from error


class _Reader:
    def __init__(self, path: Path, stream: BinaryIO) -> None:
        self._path, self._stream = path, stream
        self._size = path.stat().st_size
        self._left = min(self._size, LARGEST_HEADER)

    def header(self) -> GGUFHeader:
        """Raises ValueError, or CheckpointError where it can name a tensor."""
        magic = self._bytes(4)
        refuse_pointer(self._path, magic + self._stream.peek(64)[:64])  # type: ignore[attr-defined]
        if magic != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        version = self._number("<u4")
        if version not in VERSIONS:
            raise ValueError(f"version {version}; there are {', '.join(map(str, VERSIONS))}")
        tensors, keys = self._number("<u8"), self._number("<u8")
        metadata: dict[str, Any] = {}
        for _ in range(self._count(keys, 12)):
            key = self._text()
            if key in metadata:
                raise ValueError(f"key {key[:80]!r} comes twice")
            metadata[key] = self._value(self._number("<u4"))
        infos = [self._info() for _ in range(self._count(tensors, 24))]
        return GGUFHeader(metadata, self._placed(infos, metadata.get("general.alignment", 32)))

    def _placed(self, infos: list[tuple[str, tuple[int, ...], int, int]], alignment: Any) -> dict[str, GGUFTensor]:
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"general.alignment is {str(alignment)[:40]}")
        start = -(-self._stream.tell() // alignment) * alignment
        found: dict[str, GGUFTensor] = {}
        expected = 0
        for name, shape, kind, offset in infos:

            def refuse(what: str, name: str = name) -> CheckpointError:
                return CheckpointError(f"{self._path}: {name}: {what}; {DAMAGED}")

            if name in found:
                raise refuse("comes twice")
            if kind not in gguf.GGML_QUANT_SIZES:
                raise refuse(f"quant type {kind} is not known")
            type_ = gguf.GGMLQuantizationType(kind)
            block, block_bytes = gguf.GGML_QUANT_SIZES[type_]
            if not shape or min(shape) < 1 or shape[-1] % block:
                raise refuse(f"shape {list(shape)} is none of type {type_.name}")
            nbytes = prod(shape) // block * block_bytes
            if offset != expected:
                raise refuse(f"lies at {offset}, {expected} was expected")
            if start + offset + nbytes > self._size:
                raise refuse("ends beyond the file: truncated")
            found[name] = GGUFTensor(name, shape, type_.name, self._path, start + offset, nbytes)
            expected = -(-(offset + nbytes) // alignment) * alignment
        return found

    def _bytes(self, count: int) -> bytes:
        self._left -= count
        if self._left < 0:
            raise ValueError("it ends before its header does" if self._size <= LARGEST_HEADER else "its header has no end")
        raw = self._stream.read(count)
        if len(raw) != count:
            raise ValueError("it became shorter")
        return raw

    def _number(self, kind: str) -> Any:
        return np.frombuffer(self._bytes(np.dtype(kind).itemsize), kind)[0].item()

    def _count(self, count: int, least: int) -> int:
        """A number of things of which each takes at least so many bytes."""
        if count * least > self._left:
            raise ValueError(f"it is too short for {count} entries")
        return count

    def _text(self, errors: str = "strict") -> str:
        (size,) = struct.unpack("<Q", self._bytes(8))
        return self._bytes(size).decode("utf-8", errors)

    def _value(self, kind: int, depth: int = 0) -> Any:
        if kind == TEXT:
            return self._text("replace")
        if kind == ARRAY:
            inner, count = struct.unpack("<IQ", self._bytes(12))
            if depth == DEEPEST:
                raise ValueError("arrays within arrays")
            if inner in (TEXT, ARRAY):
                return [self._value(inner, depth + 1) for _ in range(self._count(count, 8))]
            return np.frombuffer(self._bytes(count * np.dtype(self._kind(inner)).itemsize), self._kind(inner)).tolist()
        return self._number(self._kind(kind))

    def _kind(self, kind: int) -> str:
        found = NUMBERS[kind] if kind < len(NUMBERS) else None
        if found is None:
            raise ValueError(f"a value of type {kind}")
        return found

    def _info(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._text()
        (dimensions,) = struct.unpack("<I", self._bytes(4))
        if dimensions > MOST_DIMENSIONS:
            raise ValueError(f"{name[:80]} has {dimensions} dimensions")
        *shape, kind, offset = struct.unpack(f"<{dimensions}QIQ", self._bytes(8 * dimensions + 12))
        return name, tuple(reversed(shape)), kind, offset
