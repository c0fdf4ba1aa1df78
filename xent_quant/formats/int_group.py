"""Plain integer groups, as ONNX Runtime's MatMulNBits, QMoE and GatherBlockQuantized read them.

`group_size` weights w = s·(q − z), q of 4 or 8 bits. Symmetric: z = 2^(bits−1) and not stored. Asymmetric: z is an integer
of the same bits. s is stored as float32, float16 or bfloat16, whichever the graph computes in. Bits per weight: bits +
8·(scale bytes + 1 if asymmetric)/group_size; 4.25 for symmetric INT4 groups of 64 with float16 scales.

| offset | bytes | field |
|---|---|---|
| 0 | group_size·bits/8 | codes; of two 4-bit codes the even one in the low nibble |
| … | 2 or 4 | s, little-endian |
| … | 0 or 1 | z |

A file keeps the three apart: `split` does that. Source of truth: ContribOperators.md of ONNX Runtime.

The search is `_search`'s with z in place of minima. Candidates put a group's largest weight at a level (symmetric), or its
range, widened to hold 0, over so many steps with z moved by so much before rounding (asymmetric); codes by rounding, s by
weighted least squares, error in closed form. Then `rounds` times the codes for s as it is stored, and s refitted to them;
the round of least error stays. Sixteen rows in SIMD lanes, float32, rounding ties to even, the first of equal errors.
"""

from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from xent_quant.compilation import jit
from xent_quant.errors import ConfigError
from xent_quant.formats._codes import Efforts, Found, Plane, SearchedFormat, integers, ladder
from xent_quant.formats._lanes import WIDTH, absolute, half, larger, rint, smaller, spread, store, store_bytes, where_less
from xent_quant.formats._search import HUGE, LARGEST, ONE, TINY, TWO, ZERO, empty, encode, fill, moments, sums
from xent_quant.formats.base import F32, U8, Effort

ScaleType = Literal["F32", "F16", "BF16"]
SCALE_CODES: dict[ScaleType, int] = {"F32": 0, "F16": 1, "BF16": 2}
GROUP_SIZES = (16, 32, 64, 128, 256)


def _moved(reach: tuple[float, float, int], moves: tuple[float, ...]) -> F32:
    """Candidates of an asymmetric group, [n, 2]: steps over the range, and what is added to z before it is rounded."""
    return np.array([(steps, move) for steps in np.linspace(*reach) for move in moves], np.float32)


def _levels(*rungs: tuple[float, float, int]) -> F32:
    """Candidates of a symmetric group, [n, 2]: the level of its largest weight, and 0."""
    levels = ladder(*rungs)
    return np.stack([levels, np.zeros_like(levels)], axis=1)


EFFORTS = {
    (4, True): Efforts(
        fast=(_levels((-7.6, -10, 3), (6.6, 9, 3)), 1),
        normal=(_levels((-7.4, -11, 8), (6.4, 10, 8)), 2),
        high=(_levels((-7, -14, 32), (6, 13, 32)), 6),
    ),
    (4, False): Efforts(
        fast=(_moved((14.5, 18, 4), (-0.25, 0.25)), 1),
        normal=(_moved((14, 20, 8), (-0.5, 0, 0.5)), 2),
        high=(_moved((13, 24, 16), (-0.75, -0.5, -0.25, 0, 0.25, 0.5, 0.75)), 6),
    ),
    (8, True): Efforts(
        fast=(_levels((-128, -128, 1)), 1), normal=(_levels((-128, -127, 2)), 2), high=(_levels((-132, -126, 9)), 6)
    ),
    (8, False): Efforts(
        fast=(_moved((255, 255, 1), (0,)), 1),
        normal=(_moved((254.5, 255.5, 2), (0,)), 2),
        high=(_moved((253, 260, 5), (-0.25, 0.25)), 6),
    ),
}
"""By bits and symmetry."""


@jit
def stored(scale, kind):  # type: ignore[no-untyped-def]
    """Scales rounded to nearest as SCALE_CODES[kind] stores them; beyond LARGEST where float16 overflows."""
    if kind == 1:
        return half(scale)
    if kind == 2:  # T. J. Dekker's split, which leaves eight significant bits
        wide = scale * np.float32(65537)
        return wide - (wide - scale)
    return scale


@jit
def with_zeros(weights, importance, candidates, rounds, group, top, symmetric, kind, codes, zeros, scales):  # type: ignore[no-untyped-def]
    """Fill codes [rows, columns / 4] u32 (four bytes), zeros [rows, groups] u8 (z) and scales [rows, groups] f32 (s)."""
    x = np.empty(group * WIDTH, np.float32)
    quads = np.empty(group // 4 * WIDTH, np.uint32)
    zero_bytes, scale_floats = np.empty(WIDTH, np.uint8), np.empty(WIDTH, np.float32)
    none = spread(ZERO)
    for first in range(0, weights.shape[0], WIDTH):
        for block in range(weights.shape[1] // group):
            fill(weights, first, block * group, group, x)
            w = importance[block * group : (block + 1) * group]
            _, _, sxx, low, high, peak = moments(x, w, 0, group)
            low, high = smaller(low, ZERO), larger(high, ZERO)
            extent = peak if symmetric else high - low
            z = best_z = spread((top + ONE) / TWO)
            scale, gain = none, none  # error = Σwx² − gain
            for k in range(len(candidates)):
                inverse = where_less(TINY, absolute(extent), candidates[k, 0] / extent, ZERO)
                if not symmetric:
                    z = larger(smaller(rint(candidates[k, 1] - low * inverse), top), ZERO)
                _, scc, sxc = sums(x, w, 0, group, ZERO, inverse, none - z, top - z)
                own = where_less(ZERO, scc, sxc / scc, ZERO)
                scale, best_z = where_less(gain, own * sxc, own, scale), where_less(gain, own * sxc, z, best_z)
                gain = larger(own * sxc, gain)
            scale = stored(scale, kind)
            least, best = spread(HUGE), scale
            for _ in range(rounds):
                inverse = where_less(TINY, absolute(scale), ONE / scale, ZERO)
                _, scc, sxc = sums(x, w, 0, group, ZERO, inverse, none - best_z, top - best_z)
                error = sxx + scale * scale * scc - TWO * scale * sxc
                best, least = where_less(error, least, scale, best), smaller(error, least)
                scale = where_less(ZERO, scc, stored(sxc / scc, kind), scale)
            inverse = where_less(TINY, absolute(best), ONE / best, ZERO)
            encode(x, 0, group, ZERO, inverse, none - best_z, top - best_z, quads)
            store_bytes(zero_bytes, 0, best_z)
            store(scale_floats, 0, best)
            empty(quads, first, block * group // 4, group // 4, codes)
            empty(zero_bytes, first, block, 1, zeros)
            empty(scale_floats, first, block, 1, scales)


class IntGroup(SearchedFormat):
    """See the module. Raises ConfigError for bits or a group size that the operators do not take."""

    def __init__(self, bits: int, group_size: int, symmetric: bool, scale: ScaleType) -> None:
        if bits not in (4, 8):
            raise ConfigError(f"{bits}-bit groups: ONNX Runtime runs 4 and 8 bits")
        if group_size not in GROUP_SIZES:
            raise ConfigError(f"groups of {group_size}: ONNX Runtime takes {', '.join(map(str, GROUP_SIZES))}")
        self.name = f"INT{bits}_G{group_size}{'' if symmetric else '_ASYM'}_{scale}"
        self.bits, self.symmetric, self.scale_type = bits, symmetric, scale
        self.block_size = self.group_size = group_size
        code_bytes = group_size * bits // 8
        self.largest_scale = LARGEST if scale == "F16" else HUGE
        self.scale_bytes = 4 if scale == "F32" else 2
        self.block_bytes = code_bytes + self.scale_bytes + (0 if symmetric else 1)
        self.planes = (Plane(0, code_bytes, bits=bits, run=1),)
        self.levels = integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else integers(0, 2**bits - 1)

    def search(self, weights: F32, importance: F32, effort: Effort) -> Found:
        rows, columns = weights.shape
        codes = np.empty((rows, columns), np.uint8)
        zeros = np.empty((rows, columns // self.group_size), np.uint8)
        scales = np.empty(zeros.shape, np.float32)
        candidates, rounds = getattr(EFFORTS[self.bits, self.symmetric], effort)
        with_zeros(
            weights, importance, candidates, rounds, self.group_size, np.float32(2**self.bits - 1), self.symmetric,
            SCALE_CODES[self.scale_type], codes.view(np.uint32), zeros, scales,
        )  # fmt: skip
        return Found(codes, zeros.reshape(-1, 1), scales.reshape(-1, 1))

    def store_scales(self, blocks: U8, found: Found) -> None:
        start = self.planes[0].stop
        blocks[:, start : start + self.scale_bytes] = self._scale_bytes(found.outer)
        if not self.symmetric:
            blocks[:, -1:] = found.inner

    def _scale_bytes(self, scales: F32) -> U8:
        """[n, 1] float32, already rounded, to [n, scale_bytes] as stored."""
        if self.scale_type == "BF16":
            exact = (scales.view("<u4") >> 16).astype("<u2")
        else:
            exact = scales.astype("<f4" if self.scale_type == "F32" else "<f2")
        return np.ascontiguousarray(exact).view(np.uint8)

    def scales(self, blocks: U8) -> tuple[F32, F32 | None]:
        start = self.planes[0].stop
        raw = np.ascontiguousarray(blocks[:, start : start + self.scale_bytes])
        if self.scale_type == "BF16":
            scale = (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
        else:
            scale = raw.view("<f4" if self.scale_type == "F32" else "<f2").astype(np.float32)
        return scale, None if self.symmetric else -scale * blocks[:, -1:].astype(np.float32)

    def split(self, packed: U8) -> tuple[U8, U8, U8 | None]:
        """Packed rows as the operators' initialisers: bytes of codes [rows, columns·bits/8], of scales
        [rows, groups·scale_bytes], and of zero points [rows, ceil(groups·bits/8)], packed as codes are, or None."""
        blocks = packed.reshape(len(packed), -1, self.block_bytes)
        start = self.planes[0].stop
        codes = blocks[:, :, :start].reshape(len(packed), -1)
        scales = blocks[:, :, start : start + self.scale_bytes].reshape(len(packed), -1)
        if self.symmetric:
            return codes, scales, None
        zeros: NDArray[np.uint8] = blocks[:, :, -1]
        if self.bits == 4:
            zeros = np.pad(zeros, ((0, 0), (0, zeros.shape[1] % 2)))
            zeros = zeros[:, 0::2] | (zeros[:, 1::2] << np.uint8(4))
        return codes, scales, np.ascontiguousarray(zeros)


@cache
def int_group(bits: int, group_size: int, symmetric: bool, scale: ScaleType) -> IntGroup:
    """The one instance of these parameters."""
    return IntGroup(bits, group_size, symmetric, scale)
