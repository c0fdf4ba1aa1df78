"""What every GGUF quant type offers: bytes that mean weights, and a search for good bytes.

A type is one file here and one line in the table of `xent_quant.formats`.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from xent_quant.errors import QuantizationError

Effort = Literal["fast", "normal", "high"]
F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]

IMPORTANCE_FLOOR = 1e-6
"""Share of the mean below which no column's importance counts as less."""


def weighting(importance: F32) -> F32 | None:
    """Importance [columns] as searches weigh with it: scale-free, and with a floor, since a column of no measured energy must
    survive. None where no column has any."""
    mean = np.float32(importance.mean(dtype=np.float64))
    return np.maximum(importance / mean, np.float32(IMPORTANCE_FLOOR)) if mean > 0 else None


@dataclass(frozen=True)
class Grid:
    """The values that packed rows may take once their scales are fixed: what error feedback (GPTQ) rounds onto.

    weight[r, c] = scale[r, g] · levels[code[r, c]] + offset[r, g] with g = c // group_size. `scale` and `offset` are
    [rows, groups] float32, `levels` [n_levels] float32 ascending; codes are indices into `levels`.
    """

    scale: F32
    offset: F32
    levels: F32

    def group_size(self, columns: int) -> int:
        return columns // int(self.scale.shape[1])


class Encoding(Protocol):
    """Bytes that mean weights: block formats of GGUF, groups of ONNX, bitsandbytes' types.

    `by_rows`: any slice of rows gives these rows' bytes. Otherwise a weight is encoded whole, into one row of bytes.
    """

    @property
    def name(self) -> str: ...

    @property
    def by_rows(self) -> bool: ...

    def quantize(self, weights: F32, importance: F32 | None = None, *, effort: Effort = "normal", name: str = "tensor") -> U8:
        """[rows, columns] float32 to [rows, row_bytes] uint8, or [1, bytes]. Raises QuantizationError naming the tensor."""

    def read(self, packed: U8, shape: tuple[int, int]) -> F32:
        """The inverse: what a runtime multiplies with, [rows, columns] float32 of that shape."""


class QuantFormat(ABC):
    """A block format. Subclasses set the variables and write `quantize_rows` and `dequantize_rows`.

    `block_size` counts the weights of one stored block, `block_bytes` its bytes, `ggml_type` is ggml's number (not set by
    `IntGroup`, which ggml does not know).
    """

    name: str
    ggml_type: int
    block_size: int
    block_bytes: int
    by_rows = True
    has_zero: bool = True
    """Whether a zero beside other weights is kept."""

    @property
    def bits_per_weight(self) -> float:
        """Scales included."""
        return 8 * self.block_bytes / self.block_size

    def row_bytes(self, columns: int) -> int:
        """Bytes of one row of `columns` weights. Raises QuantizationError where blocks do not divide it."""
        if columns % self.block_size:
            raise QuantizationError(
                f"{self.name}: rows of {columns} weights are not a multiple of its block of {self.block_size}"
            )
        return columns // self.block_size * self.block_bytes

    def quantize(self, weights: F32, importance: F32 | None = None, *, effort: Effort = "normal", name: str = "tensor") -> U8:
        """Quantise `weights` [rows, columns] float32 to [rows, row_bytes] uint8.

        `importance` [columns] float32 >= 0 is the mean square of each input column (an imatrix); None leaves the
        format its own default weighting. `name` is used in messages only. Holds the result and per-thread block
        buffers, nothing as large as `weights`. Raises QuantizationError naming the tensor for ragged rows, NaN,
        infinities, importance of the wrong shape or negative, and scales that float16 cannot hold.
        """
        if weights.ndim != 2 or weights.dtype != np.float32:
            raise QuantizationError(f"{name}: expected a 2-D float32 array, got {weights.ndim}-D {weights.dtype}")
        try:
            row_bytes = self.row_bytes(weights.shape[1])
        except QuantizationError as error:
            raise QuantizationError(f"{name}: {error}") from None
        if importance is not None:
            importance = np.ascontiguousarray(importance, dtype=np.float32)
            if importance.shape != (weights.shape[1],):
                raise QuantizationError(f"{name}: importance of shape {importance.shape} for {weights.shape[1]} columns")
            if not (np.isfinite(importance).all() and (importance >= 0).all()):
                raise QuantizationError(f"{name}: importance holds negative or non-finite values; calibrate again")
            importance = weighting(importance)
        weights = np.ascontiguousarray(weights)
        packed = np.empty((weights.shape[0], row_bytes), np.uint8)
        problem = self.quantize_rows(weights, importance, packed, effort)
        if problem:
            raise QuantizationError(f"{name}: {problem}")
        return packed

    @abstractmethod
    def quantize_rows(self, weights: F32, importance: F32 | None, packed: U8, effort: Effort) -> str:
        """Fill `packed` [rows, row_bytes]. Returns "" or what is wrong with the weights (NaN, overflow)."""

    def dequantize(self, packed: U8) -> F32:
        """[rows, row_bytes] uint8 to [rows, columns] float32, exactly as ggml does."""
        if packed.ndim != 2 or packed.dtype != np.uint8 or packed.shape[1] % self.block_bytes:
            raise QuantizationError(f"{self.name}: packed rows must be 2-D uint8 of a multiple of {self.block_bytes} bytes")
        return self.dequantize_rows(np.ascontiguousarray(packed))

    def unshrunk(self, packed: U8, weights: F32, importance: F32 | None) -> U8:
        """Packed `weights` [rows, columns] with the codes that they have and scales that make up for what few bits take off all
        weights (`_gain`); `packed` itself where bits are many, or scales too coarse for that."""
        return packed

    def read(self, packed: U8, shape: tuple[int, int]) -> F32:
        """See `Encoding.read`."""
        return self.dequantize(packed)

    @abstractmethod
    def dequantize_rows(self, packed: U8) -> F32:
        """The inverse on checked input."""

    def grid(self, packed: U8) -> Grid | None:
        """The grid of packed rows [rows, row_bytes]; None for types without one code per weight (floats, codebooks)."""
        return None

    def codes(self, packed: U8) -> U8:
        """Of packed rows, [rows, columns] uint8: indices into the grid's levels."""
        raise NotImplementedError(f"{self.name} has no grid")

    def with_codes(self, packed: U8, codes: U8) -> U8:
        """A copy of `packed` that keeps every scale and holds `codes` [rows, columns] uint8, indices into the grid's levels."""
        raise NotImplementedError(f"{self.name} has no grid")
