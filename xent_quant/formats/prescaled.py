"""Encodings whose scales are made of a whole weight, before any of its codes: bitsandbytes'. Between the two its rows lie in
memory as those of a block format do, for GPTQ to choose codes in."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from xent_quant.errors import QuantizationError
from xent_quant.formats._codes import CodedFormat, Plane
from xent_quant.formats.base import F32, U8, Effort

SCALE_BYTES = 4


class InMemory(CodedFormat):
    """Blocks of `block_size` weights, scale · levels[code]: a float32 scale and a byte of code each. Nothing is stored so."""

    name = "in memory"

    def __init__(self, block_size: int, levels: F32) -> None:
        self.block_size = self.group_size = block_size
        self.block_bytes = SCALE_BYTES + block_size
        self.planes = (Plane(SCALE_BYTES, self.block_bytes, bits=8, run=1),)
        self.levels = levels

    def pack(self, scale: F32, codes: U8) -> U8:
        """Of scales [rows, blocks] float32 and codes [rows, columns] uint8, indices into the levels."""
        blocks = np.empty((scale.size, self.block_bytes), np.uint8)
        blocks[:, :SCALE_BYTES] = np.ascontiguousarray(scale, "<f4").view(np.uint8).reshape(scale.size, SCALE_BYTES)
        packed = blocks.reshape(len(scale), -1)
        self.store_codes(packed, codes)
        return packed

    def scales(self, blocks: U8) -> tuple[F32, F32 | None]:
        return np.ascontiguousarray(blocks[:, :SCALE_BYTES]).view("<f4"), None

    def quantize_rows(self, weights: F32, importance: F32 | None, packed: U8, effort: Effort) -> str:
        raise QuantizationError("scales come from the whole weight")


@dataclass(frozen=True)
class Scaled:
    """A weight with its scales, and the codes that the encoding itself would choose: `packed` [rows, row_bytes] of `kind`.
    `finish` makes the encoding's own [1, bytes] of such rows; only their codes count."""

    kind: InMemory
    packed: U8
    finish: Callable[[U8], U8]


class Prescaled(ABC):
    """An encoding of this sort, see `Encoding`, which is not `by_rows`."""

    @abstractmethod
    def scaled(self, weights: F32, *, name: str) -> Scaled | None:
        """Scales for a weight [rows, columns] float32; None where groups of scales do not end with rows. Raises QuantizationError
        naming the tensor."""
