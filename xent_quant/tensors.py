"""Frozen records that travel between the parts."""

from dataclasses import dataclass
from math import prod


@dataclass(frozen=True)
class TensorInfo:
    """What a checkpoint's header says of one tensor.

    `shape` is row-major as in torch, `dtype` one of "F32", "F16", "BF16" (safetensors spelling).
    """

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def n_weights(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes as stored."""
        return self.n_weights * (4 if self.dtype == "F32" else 2)
