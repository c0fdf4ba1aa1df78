"""How stored values become float32 weights, some rows at a time: floats, one expert of a fused tensor, codes with scales."""

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from xent_quant.checkpoint.headers import Location
from xent_quant.errors import CheckpointError
from xent_quant.tensors import ITEM_SIZE
from xent_quant.values import from_bfloat16

if TYPE_CHECKING:
    import torch

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]


class Source(Protocol):
    """One weight of the architecture, wherever its values lie."""

    @property
    def dtype(self) -> str:
        """What it is stored as, for people: BF16, F8_E4M3, INT4 …"""

    @property
    def locations(self) -> tuple[Location, ...]:
        """Everything that is read for it; its values first."""

    def rows(self, start: int, stop: int) -> F32:
        """Rows start:stop (elements of a vector) as contiguous float32. Holds them and their stored bytes, unless it says more.
        Raises CheckpointError for a file that became shorter."""


@dataclass(frozen=True)
class _OfOneTensor:
    """A source whose values are all in one stored tensor."""

    location: Location

    @property
    def dtype(self) -> str:
        return self.location.info.dtype

    @property
    def locations(self) -> tuple[Location, ...]:
        return (self.location,)


@dataclass(frozen=True)
class Floats(_OfOneTensor):
    """Rows of a float tensor from row `first` on, all dimensions but the last taken together; a vector is its elements."""

    columns: int
    first: int = 0

    def rows(self, start: int, stop: int) -> F32:
        """See `Source`."""
        raw = stored(self.location, (self.first + start) * self.columns, (stop - start) * self.columns)
        values = widen(raw, self.dtype)
        return values.reshape(-1, self.columns) if len(self.location.info.shape) > 1 else values

    def halves(self, rows: int) -> NDArray[np.uint16]:
        """The first rows [rows, columns] of a BF16 matrix, their bits. Raises CheckpointError for a file that became shorter."""
        return stored(self.location, self.first * self.columns, rows * self.columns).view(np.uint16).reshape(rows, self.columns)


@dataclass(frozen=True)
class Transposed(_OfOneTensor):
    """Columns `first`… of matrix `index` of a fused float tensor [experts, in, out], as rows. Holds that whole matrix."""

    index: int
    first: int

    def rows(self, start: int, stop: int) -> F32:
        """See `Source`."""
        _, columns, width = self.location.info.shape
        whole = widen(stored(self.location, self.index * columns * width, columns * width), self.dtype).reshape(columns, width)
        return np.ascontiguousarray(whole[:, self.first + start : self.first + stop].T)


@dataclass(frozen=True)
class ChosenRows:
    """Rows `chosen` of another source, a small one: it is read whole."""

    whole: Source
    chosen: tuple[int, ...]

    @property
    def dtype(self) -> str:
        return self.whole.dtype

    @property
    def locations(self) -> tuple[Location, ...]:
        return self.whole.locations

    def rows(self, start: int, stop: int) -> F32:
        """See `Source`."""
        found: F32 = self.whole.rows(0, max(self.chosen) + 1)[list(self.chosen[start:stop])]
        return found


@dataclass(frozen=True)
class Scaled:
    """FP8 values or 8-bit integers [rows, columns], less a zero point where there is one, times the scale of their block of
    `block` rows and columns. `rounded`: to the type of the scales, as compressed-tensors computes. Holds a scale for each value.
    """

    codes: Location
    scales: Location
    zeros: Location | None
    block: tuple[int, int]
    rounded: bool

    @property
    def dtype(self) -> str:
        return {"I8": "INT8"}.get(self.codes.info.dtype, self.codes.info.dtype)

    @property
    def locations(self) -> tuple[Location, ...]:
        return tuple(part for part in (self.codes, self.scales, self.zeros) if part is not None)

    def rows(self, start: int, stop: int) -> F32:
        """See `Source`."""
        columns = self.codes.info.shape[1]
        values = widen(stored(self.codes, start * columns, (stop - start) * columns), self.codes.info.dtype).reshape(-1, columns)
        group = np.arange(columns) // self.block[1]
        if self.zeros is not None:
            values -= _spread(self.zeros, start, stop, self.block[0], group)
        values *= _spread(self.scales, start, stop, self.block[0], group)
        return _rounded(values, self.scales.info.dtype) if self.rounded else values


@dataclass(frozen=True)
class Packed:
    """compressed-tensors' pack-quantized: `bits`-bit codes in int32 words, lowest bits first, less 2^(bits − 1) or less a zero
    point (packed likewise, down the rows), times the scale of their group: columns of `group_size`, or as `order` [columns] says.
    """

    codes: Location
    scales: Location
    zeros: Location | None
    order: Location | None
    bits: int
    group_size: int
    columns: int

    @property
    def dtype(self) -> str:
        return f"INT{self.bits}"

    @property
    def locations(self) -> tuple[Location, ...]:
        return tuple(part for part in (self.codes, self.scales, self.zeros, self.order) if part is not None)

    def rows(self, start: int, stop: int) -> F32:
        """See `Source`."""
        words = self.codes.info.shape[1]
        raw = stored(self.codes, start * words, (stop - start) * words).reshape(-1, words * 4)
        # The codes and the zero points have the same offset, 2^(bits − 1), which is 0's code where there are no zero points.
        values = unpacked(raw, self.bits)[:, : self.columns].astype(np.float32)
        group = np.arange(self.columns) // self.group_size
        if self.order is not None:
            order = integers(self.order)
            group = order if (order >= 0).all() else group  # −1 throughout: not ordered
        zeros: F32 | np.float32 = np.float32(1 << (self.bits - 1))
        if self.zeros is not None:
            zeros = self._zero_points(start, stop)[:, group]
        values -= zeros
        values *= _spread(self.scales, start, stop, 1, group)
        return _rounded(values, self.scales.info.dtype)

    def _zero_points(self, start: int, stop: int) -> F32:
        """[stop − start, groups], of words that hold 32 / bits rows each."""
        each, groups = 32 // self.bits, self.zeros.info.shape[1]  # type: ignore[union-attr]
        first, last = start // each, -(-stop // each)
        raw = stored(self.zeros, first * groups, (last - first) * groups).reshape(last - first, groups, 4)  # type: ignore[arg-type]
        codes = unpacked(raw, self.bits).transpose(0, 2, 1).reshape(-1, groups)
        return codes[start - first * each : stop - first * each].astype(np.float32)


def unpacked(raw: U8, bits: int) -> U8:
    """Codes of 2, 4 or 8 bits from the bytes [..., n] that hold 8 / bits of them each, lowest first: [..., n · 8 / bits]."""
    if bits == 8:
        return raw
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return (raw[..., None] >> shifts & np.uint8((1 << bits) - 1)).reshape(*raw.shape[:-1], -1)


def _spread(location: Location, start: int, stop: int, block: int, group: NDArray[np.int64]) -> F32:
    """The scale (or zero point) of every weight of rows start:stop, [stop − start, columns], or what broadcasts to it; rows share
    one in blocks of `block`, columns by their `group`."""
    shape = location.info.shape
    if prod(shape) == 1:
        return widen(stored(location, 0, 1), location.info.dtype)
    groups = shape[1] if len(shape) > 1 else 1
    first, last = start // block, -(-stop // block)
    known = widen(stored(location, first * groups, (last - first) * groups), location.info.dtype).reshape(-1, groups)
    rows = known[np.arange(start, stop) // block - first]
    return rows if groups == 1 else rows[:, group]


def stored(location: Location, first: int, count: int) -> U8:
    """The bytes of `count` elements from `first` on. Raises CheckpointError for a file that became shorter."""
    size = ITEM_SIZE[location.info.dtype]
    if location.offset is None:
        import torch

        return _pickled(location).reshape(-1)[first : first + count].contiguous().view(torch.uint8).numpy().copy()
    raw = np.fromfile(location.file, np.uint8, count=count * size, offset=location.offset + first * size)
    if raw.size != count * size:
        raise CheckpointError(f"{location.file}: {location.info.name}: the file ends before the tensor does; copy it again")
    return raw


def _pickled(location: Location) -> "torch.Tensor":
    from xent_quant.checkpoint.pickles import load

    found = load(location.file).get(location.info.name)
    if found is None or tuple(found.shape) != location.info.shape:
        raise CheckpointError(f"{location.file}: {location.info.name}: changed while it was read; run it again")
    return found


def integers(location: Location) -> NDArray[np.int64]:
    """All of a tensor of integers, flat."""
    raw = stored(location, 0, prod(location.info.shape))
    return raw.view({"I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1"}[location.info.dtype]).astype(np.int64)


def _e4m3() -> F32:
    """What each byte means as F8_E4M3: sign, 4 bits of exponent (bias 7), 3 of mantissa; no infinities, two NaN."""
    byte = np.arange(256)
    exponent, mantissa = byte >> 3 & 15, (byte & 7) / 8
    values = np.where(exponent == 0, mantissa * 2.0**-6, (1 + mantissa) * 2.0 ** (exponent - 7.0))
    values[(byte & 127) == 127] = np.nan
    return np.where(byte >= 128, -values, values).astype(np.float32)


E4M3 = _e4m3()


def widen(raw: U8, dtype: str) -> F32:
    """Little-endian bytes of F32, F16, BF16, F8_E4M3, F8_E8M0, I8 or U8 to float32, exactly."""
    if dtype == "BF16":  # the upper half of a float32
        return from_bfloat16(raw.view("<u2"))
    if dtype == "F8_E4M3":
        return E4M3[raw]
    if dtype == "F8_E8M0":  # an exponent alone
        return np.ldexp(np.float32(1), raw.astype(np.int32) - 127).astype(np.float32)
    kind = {"F32": "<f4", "F16": "<f2", "I8": "i1", "U8": "u1"}[dtype]
    return raw.view(kind).astype(np.float32, copy=False)


def _rounded(values: F32, dtype: str) -> F32:
    """To the nearest of F16 or BF16, ties to even; F32 as it is. In place where that can be."""
    if dtype == "F16":
        with np.errstate(over="ignore"):  # told as an infinite weight
            return values.astype(np.float16).astype(np.float32)
    if dtype == "BF16":
        bits = values.view(np.uint32)
        bits += 0x7FFF + (bits >> 16 & 1)
        bits &= 0xFFFF0000
    return values
