"""Scales that leave weights as large as they are.

The least Σ w · (x − x̂)², which searches look for, makes weights x smaller, the more the fewer bits there are: at it
Σ w · x · x̂ = Σ w · x̂² < Σ w · x². All weights shrink alike, along the weights themselves, and so the errors of one output do not
average out but add up, from layer to layer. A block's scale is therefore stretched to Σ w · x · x̂ = Σ w · x², at the price of a
somewhat larger error of single weights.
"""

from typing import Protocol

import numpy as np

from xent_quant.compilation import jit
from xent_quant.formats._chunks import in_chunks
from xent_quant.formats._search import LARGEST
from xent_quant.formats.base import F32, U8, Grid, weighting

MOST = np.float32(2)
"""A block is not stretched by more: its bytes then say next to nothing of its weights."""


class Stretched(Protocol):
    """A type whose scales can be multiplied."""

    @property
    def block_size(self) -> int: ...

    @property
    def block_bytes(self) -> int: ...

    @property
    def group_size(self) -> int: ...

    def grid(self, packed: U8) -> Grid | None: ...

    def codes(self, packed: U8) -> U8: ...

    def dequantize_rows(self, packed: U8) -> F32: ...

    def stretch(self, blocks: U8, gains: F32) -> None:
        """Multiply what blocks [n, block_bytes] stand for by gains [n, 1], as near as float16 comes."""


@jit
def gains(weights, values, importance, block, group, out):  # type: ignore[no-untyped-def]
    """Fill out [rows, blocks] with what values [rows, columns] are to be multiplied with. Sums go over a group one by one, then
    over groups, as on a device."""
    for row in range(weights.shape[0]):
        for number in range(out.shape[1]):
            energy = kept = np.float32(0)
            for start in range(number * block, (number + 1) * block, group):
                energy_g = kept_g = np.float32(0)
                for i in range(start, start + group):
                    weighted = weights[row, i] * importance[i]
                    energy_g += weighted * weights[row, i]
                    kept_g += weighted * values[row, i]
                energy += energy_g
                kept += kept_g
            out[row, number] = min(energy / kept, MOST) if kept > 0 else np.float32(1)


@jit
def gains_of_codes(weights, codes, scale, offset, levels, importance, block, out):  # type: ignore[no-untyped-def]
    """The same of codes [rows, columns] uint8 on the `Grid` of these scales."""
    group = weights.shape[1] // scale.shape[1]
    values = np.empty((1, weights.shape[1]), np.float32)
    for row in range(weights.shape[0]):
        for number in range(scale.shape[1]):
            s, m = scale[row, number], offset[row, number]
            for i in range(number * group, (number + 1) * group):
                values[0, i] = s * levels[codes[row, i]] + m
        gains(weights[row : row + 1], values, importance, block, group, out[row : row + 1])


def stretched(kind: Stretched, packed: U8, weights: F32, importance: F32 | None) -> U8:
    """See the module: a copy of packed `weights` [rows, columns]; `importance` as of `QuantFormat.quantize`."""
    known = None if importance is None else weighting(importance)
    weights_of = np.ones(weights.shape[1], np.float32) if known is None else known
    made = packed.copy()

    def work(part: F32, out: U8) -> str:
        blocks = out.reshape(-1, kind.block_bytes)
        found = np.empty((len(part), part.shape[1] // kind.block_size), np.float32)
        if (grid := kind.grid(out)) is None:
            gains(part, kind.dequantize_rows(out), weights_of, kind.block_size, kind.group_size, found)
        else:
            gains_of_codes(part, kind.codes(out), grid.scale, grid.offset, grid.levels, weights_of, kind.block_size, found)
        kind.stretch(blocks, found.reshape(-1, 1))
        return ""

    in_chunks(np.ascontiguousarray(weights), made, work)
    return made


def within_float16(scales: F32) -> F32:
    """The nearest that float16 holds without becoming infinite."""
    return np.clip(scales, -LARGEST, LARGEST)
