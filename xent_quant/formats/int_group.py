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

The search, sixteen groups in SIMD lanes: candidate steps (for an asymmetric group each with both
integers next to the ideal z), the scale of each by weighted least squares, error in closed form; then rounds that code with
the scale as it is stored and refit. Every group keeps its best round. float32 in a fixed order, rint to even; of equal
errors the first stays.
"""

import math
from functools import cache
from typing import Literal

import numba as nb
import numpy as np
from numpy.typing import NDArray

from xent_quant.errors import ConfigError
from xent_quant.formats._chunks import LIMIT, NOT_FINITE, TOO_LARGE
from xent_quant.formats._codes import CodedFormat, Plane, integers
from xent_quant.formats._half import INFINITY, half_bits, half_value
from xent_quant.formats._search import HUGE
from xent_quant.formats.base import F32, U8, Effort

ScaleType = Literal["F32", "F16", "BF16"]
SCALE_CODES: dict[ScaleType, int] = {"F32": 0, "F16": 1, "BF16": 2}
GROUP_SIZES = (16, 32, 64, 128, 256)
LANES = 16
EFFORTS: dict[Effort, tuple[int, int]] = {"fast": (5, 1), "normal": (12, 2), "high": (32, 6)}
"""Candidate steps per group, and rounds of refinement."""
BAD_WEIGHT, BAD_SCALE = 1, 2
MESSAGES = {BAD_WEIGHT: NOT_FINITE, BAD_SCALE: TOO_LARGE}
TINY = np.float32(1e-30)
"""Scales below it count as zero: their reciprocal would leave float32."""


@nb.njit(cache=True, inline="always")
def stored(scale, kind):  # type: ignore[no-untyped-def]
    """float32 `scale` rounded (to nearest, ties to even) as SCALE_CODES[kind] stores it; infinite where that overflows."""
    if kind == 1:
        bits = half_bits(scale)
        if bits & 0x7FFF >= INFINITY:
            return np.float32(np.inf)
        scale = half_value(bits)
    elif kind == 2:
        mantissa, exponent = math.frexp(np.float64(scale))
        scale = np.float32(math.ldexp(np.rint(mantissa * 256.0) / 256.0, exponent))
    return scale if abs(scale) >= TINY else np.float32(0)


@nb.njit(parallel=True, cache=True, error_model="numpy")
def search(weights, importance, codes, scales, zeros, problems, group, bits, symmetric, kind, steps, rounds):  # type: ignore[no-untyped-def]
    """Fill codes [rows, columns] u8 (q), scales [rows, groups] f32 (as stored) and zeros [rows, groups] u8 (z)."""
    f = np.float32
    groups = weights.shape[1] // group
    top, middle = f(2**bits - 1), f(2 ** (bits - 1))
    for row in nb.prange(weights.shape[0]):
        x, w = np.empty((group, LANES), f), np.empty((group, LANES), f)
        low, high, sxx = np.empty(LANES, f), np.empty(LANES, f), np.empty(LANES, f)
        scc, sxc = np.empty(LANES, f), np.empty(LANES, f)
        inverse, zero, scale, error = np.empty(LANES, f), np.empty(LANES, f), np.empty(LANES, f), np.empty(LANES, f)
        best, best_zero = np.empty(LANES, f), np.empty(LANES, f)
        for first in range(0, groups, LANES):
            lanes = min(LANES, groups - first)
            finite = True
            for j in range(LANES):
                for i in range(group):
                    value, weight = f(0), f(1)
                    if j < lanes:
                        value = weights[row, (first + j) * group + i]
                        weight = importance[(first + j) * group + i]
                    x[i, j] = value
                    w[i, j] = weight
                    if not (-LIMIT < value < LIMIT):
                        finite = False
            if not finite:
                problems[row] = BAD_WEIGHT
                break
            for j in range(LANES):
                low[j] = high[j] = sxx[j] = f(0)  # the range holds zero, which z stands for
            for i in range(group):
                for j in range(LANES):
                    value = x[i, j]
                    low[j] = value if value < low[j] else low[j]
                    high[j] = value if value > high[j] else high[j]
                    sxx[j] += w[i, j] * value * value
            for j in range(LANES):
                best[j] = f(0)
                best_zero[j] = middle
                error[j] = sxx[j]
            for step in range(steps):
                for j in range(LANES):
                    if symmetric:
                        half = (steps + 1) // 2
                        spread = f(1.8) * f(step % half) / f(max(1, half - 1)) - f(0.9) if steps > 1 else f(0)
                        reach = -middle - spread if step < half and steps > 1 else middle - f(1) + spread
                        extreme = high[j] if high[j] > -low[j] else low[j]
                        zero[j] = middle
                    else:
                        half = (steps + 1) // 2
                        reach = top + (f(1.8) * f(step % half) / f(max(1, half - 1)) - f(0.9) if half > 1 else f(0))
                        extreme = high[j] - low[j]
                    inverse[j] = reach / extreme if abs(extreme) >= TINY else f(0)
                    if not symmetric:
                        ideal = np.floor(-low[j] * inverse[j]) + (f(0) if step < half else f(1))
                        zero[j] = ideal if ideal < top else top
                    scc[j] = sxc[j] = f(0)
                for i in range(group):
                    for j in range(LANES):
                        c = np.rint(inverse[j] * x[i, j])
                        c = -zero[j] if c < -zero[j] else c
                        c = top - zero[j] if c > top - zero[j] else c
                        wc = w[i, j] * c
                        scc[j] += wc * c
                        sxc[j] += wc * x[i, j]
                for j in range(LANES):
                    if scc[j] > f(0):
                        e = sxx[j] - sxc[j] / scc[j] * sxc[j]
                        if e < error[j]:
                            error[j], best[j], best_zero[j] = e, sxc[j] / scc[j], zero[j]
            for j in range(LANES):
                error[j] = HUGE
                scale[j] = stored(best[j], kind)
                best[j] = scale[j]
            for _ in range(rounds):
                for j in range(LANES):
                    inverse[j] = f(1) / scale[j] if scale[j] != f(0) else f(0)
                    scc[j] = sxc[j] = f(0)
                for i in range(group):
                    for j in range(LANES):
                        c = np.rint(inverse[j] * x[i, j])
                        c = -best_zero[j] if c < -best_zero[j] else c
                        c = top - best_zero[j] if c > top - best_zero[j] else c
                        wc = w[i, j] * c
                        scc[j] += wc * c
                        sxc[j] += wc * x[i, j]
                for j in range(LANES):
                    if abs(scale[j]) < HUGE:
                        e = sxx[j] + scale[j] * scale[j] * scc[j] - f(2) * scale[j] * sxc[j]
                        if e < error[j]:
                            error[j], best[j] = e, scale[j]
                        if scc[j] > f(0):
                            scale[j] = stored(sxc[j] / scc[j], kind)
            for j in range(lanes):
                if not abs(best[j]) < HUGE:
                    problems[row] = BAD_SCALE
                    break
                scales[row, first + j] = best[j]
                zeros[row, first + j] = np.uint8(best_zero[j])
                inverse_j = f(1) / best[j] if best[j] != f(0) else f(0)
                for i in range(group):
                    c = np.rint(inverse_j * x[i, j])
                    c = -best_zero[j] if c < -best_zero[j] else c
                    c = top - best_zero[j] if c > top - best_zero[j] else c
                    codes[row, (first + j) * group + i] = np.uint8(c + best_zero[j])


class IntGroup(CodedFormat):
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
        self.scale_bytes = 4 if scale == "F32" else 2
        self.block_bytes = code_bytes + self.scale_bytes + (0 if symmetric else 1)
        self.planes = (Plane(0, code_bytes, bits=bits, run=1),)
        self.levels = integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else integers(0, 2**bits - 1)

    def quantize_rows(self, weights: F32, importance: F32 | None, packed: U8, effort: Effort) -> str:
        rows, columns = weights.shape
        if importance is None:
            importance = np.ones(columns, np.float32)
        steps, rounds = EFFORTS[effort]
        if self.bits == 8:  # 255 levels: the rounding error is flat in the step, so one candidate does
            steps = 9 if effort == "high" else 1
        if not self.symmetric:  # z is a second unknown
            steps *= 2
        codes = np.empty((rows, columns), np.uint8)
        groups = columns // self.group_size
        scales, zeros = np.empty((rows, groups), np.float32), np.empty((rows, groups), np.uint8)
        problems = np.zeros(rows, np.int8)
        kind = SCALE_CODES[self.scale_type]
        search(
            weights,
            importance,
            codes,
            scales,
            zeros,
            problems,
            self.group_size,
            self.bits,
            self.symmetric,
            kind,
            steps,
            rounds,
        )
        if problems.any():
            return MESSAGES[int(problems.max())]
        blocks = packed.reshape(rows, groups, self.block_bytes)
        start = self.planes[0].stop
        blocks[:, :, start : start + self.scale_bytes] = self._scale_bytes(scales)
        if not self.symmetric:
            blocks[:, :, -1] = zeros
        self.store_codes(packed, codes)
        return ""

    def _scale_bytes(self, scales: F32) -> U8:
        """[rows, groups] float32, already rounded, to [rows, groups, scale_bytes] as stored."""
        if self.scale_type == "BF16":
            exact = (scales.view("<u4") >> 16).astype("<u2")
        else:
            exact = scales.astype("<f4" if self.scale_type == "F32" else "<f2")
        return exact.view(np.uint8).reshape(*scales.shape, self.scale_bytes)

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
