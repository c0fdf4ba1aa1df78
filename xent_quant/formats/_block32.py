"""The search behind the types of 32-weight blocks with float16 scales: Q4_0, Q5_0, Q8_0 (w = d·q) and Q4_1, Q5_1
(w = d·q + m). Sixteen blocks of a row go through SIMD lanes together.

As in `_superblock`: candidate steps with least-squares scales and closed-form error, then rounds that code with the
scale as float16 stores it and refit. Every block keeps its best round. float32, fixed order, rint to even.
"""

from collections.abc import Callable

import numba as nb
import numpy as np

from xent_quant.formats._codes import CodedFormat, halves
from xent_quant.formats._half import INFINITY, half_bits, half_value
from xent_quant.formats._superblock import HUGE, JIT, LIMIT, MESSAGES, NOT_FINITE, OVERFLOW
from xent_quant.formats.base import F32, U8, Effort

LANES = 16
EFFORTS: dict[Effort, tuple[int, int]] = {"fast": (5, 1), "normal": (12, 2), "high": (32, 6)}
"""Candidate steps per block, and rounds of refinement."""


def block32(bits: int, affine: bool, block_bytes: int) -> Callable[..., None]:
    """Kernel(weights [rows, columns] f32, importance [columns] f32, packed u8, problems [rows] i8, steps, rounds)."""
    lowest = 0 if affine else -(2 ** (bits - 1)) + (1 if bits == 8 else 0)
    highest = 2**bits - 1 if affine else 2 ** (bits - 1) - 1

    @nb.njit(parallel=True, **JIT)
    def kernel(weights, importance, packed, problems, steps, rounds):  # type: ignore[no-untyped-def]
        f = np.float32
        blocks = weights.shape[1] // 32
        for row in nb.prange(weights.shape[0]):
            x, w = np.empty((32, LANES), f), np.empty((32, LANES), f)
            base, reach0 = np.empty(LANES, f), np.empty(LANES, f)
            sw, sx, sxx = np.empty(LANES, f), np.empty(LANES, f), np.empty(LANES, f)
            sl, sll, sxl = np.empty(LANES, f), np.empty(LANES, f), np.empty(LANES, f)
            inverse, scale, offset, error = np.empty(LANES, f), np.empty(LANES, f), np.empty(LANES, f), np.empty(LANES, f)
            d, m, d_bits, m_bits = np.empty(LANES, f), np.empty(LANES, f), np.empty(LANES, np.int64), np.empty(LANES, np.int64)
            best_d, best_m = np.empty(LANES, np.int64), np.empty(LANES, np.int64)
            codes = np.empty(32, np.uint8)
            for first in range(0, blocks, LANES):
                lanes = min(LANES, blocks - first)
                finite = True
                for j in range(LANES):
                    for i in range(32):
                        value, weight = f(0), f(1)
                        if j < lanes:
                            value = weights[row, (first + j) * 32 + i]
                            weight = importance[(first + j) * 32 + i]
                        x[i, j] = value
                        w[i, j] = weight
                        if not (-LIMIT < value < LIMIT):
                            finite = False
                if not finite:
                    problems[row] = NOT_FINITE
                    break
                for j in range(LANES):
                    base[j] = reach0[j] = x[0, j]
                    sw[j] = sx[j] = sxx[j] = f(0)
                for i in range(32):
                    for j in range(LANES):
                        value = x[i, j]
                        if affine:
                            base[j] = value if value < base[j] else base[j]
                            reach0[j] = value if value > reach0[j] else reach0[j]
                        else:
                            reach0[j] = value if abs(value) > abs(reach0[j]) else reach0[j]
                        wx = w[i, j] * value
                        sw[j] += w[i, j]
                        sx[j] += wx
                        sxx[j] += wx * value
                for j in range(LANES):
                    scale[j] = f(0)
                    if affine:
                        reach0[j] -= base[j]
                        offset[j] = sx[j] / sw[j]
                        error[j] = sxx[j] - offset[j] * sx[j]
                    else:
                        base[j] = offset[j] = f(0)
                        error[j] = sxx[j]
                for step in range(steps):
                    if affine:
                        reach = f(highest) + f(1.8) * f(step) / f(max(1, steps - 1)) - f(0.9)
                    elif bits == 8:
                        reach = f(highest) + f(step) / f(max(1, steps - 1)) - f(0.5) if steps > 1 else f(highest)
                    else:
                        half_steps = (steps + 1) // 2
                        which = step if step < half_steps else step - half_steps
                        spread = f(1.8) * f(which) / f(max(1, half_steps - 1)) - f(0.9)
                        reach = f(lowest) - spread if step < half_steps else f(highest) + spread
                    for j in range(LANES):
                        inverse[j] = reach / reach0[j] if reach0[j] != f(0) else f(0)
                        sl[j] = sll[j] = sxl[j] = f(0)
                    for i in range(32):
                        for j in range(LANES):
                            q = np.rint(inverse[j] * (x[i, j] - base[j]))
                            q = f(lowest) if q < f(lowest) else q
                            q = f(highest) if q > f(highest) else q
                            wq = w[i, j] * q
                            sl[j] += wq
                            sll[j] += wq * q
                            sxl[j] += wq * x[i, j]
                    for j in range(LANES):
                        if affine:
                            determinant = sw[j] * sll[j] - sl[j] * sl[j]
                            if determinant > f(0):
                                a = (sw[j] * sxl[j] - sx[j] * sl[j]) / determinant
                                b = (sll[j] * sx[j] - sl[j] * sxl[j]) / determinant
                                e = sxx[j] - a * sxl[j] - b * sx[j]
                                if e < error[j]:
                                    error[j], scale[j], offset[j] = e, a, b
                        elif sll[j] > f(0):
                            a = sxl[j] / sll[j]
                            e = sxx[j] - a * sxl[j]
                            if e < error[j]:
                                error[j], scale[j] = e, a
                for j in range(LANES):
                    error[j] = HUGE
                    d_bits[j], m_bits[j] = half_bits(scale[j]), half_bits(offset[j])
                    best_d[j], best_m[j] = d_bits[j], m_bits[j]
                for _ in range(rounds):
                    for j in range(LANES):
                        d[j] = half_value(d_bits[j]) if d_bits[j] & 0x7FFF < INFINITY else f(0)
                        m[j] = half_value(m_bits[j]) if m_bits[j] & 0x7FFF < INFINITY else f(0)
                        inverse[j] = f(1) / d[j] if d[j] != f(0) else f(0)
                        sl[j] = sll[j] = sxl[j] = f(0)
                    for i in range(32):
                        for j in range(LANES):
                            q = np.rint(inverse[j] * (x[i, j] - m[j]))
                            q = f(lowest) if q < f(lowest) else q
                            q = f(highest) if q > f(highest) else q
                            wq = w[i, j] * q
                            sl[j] += wq
                            sll[j] += wq * q
                            sxl[j] += wq * x[i, j]
                    for j in range(LANES):
                        a, b = d[j], m[j]
                        e = sxx[j] + a * a * sll[j] + b * b * sw[j] + f(2) * (a * b * sl[j] - a * sxl[j] - b * sx[j])
                        if e < error[j]:
                            error[j], best_d[j], best_m[j] = e, d_bits[j], m_bits[j]
                        if affine:
                            determinant = sw[j] * sll[j] - sl[j] * sl[j]
                            if determinant > f(0):
                                d_bits[j] = half_bits((sw[j] * sxl[j] - sx[j] * sl[j]) / determinant)
                                m_bits[j] = half_bits((sll[j] * sx[j] - sl[j] * sxl[j]) / determinant)
                        elif sll[j] > f(0):
                            d_bits[j] = half_bits(sxl[j] / sll[j])
                for j in range(lanes):
                    if best_d[j] & 0x7FFF >= INFINITY or best_m[j] & 0x7FFF >= INFINITY:
                        problems[row] = OVERFLOW
                        break
                    scale_j, offset_j = half_value(best_d[j]), half_value(best_m[j])
                    inverse_j = f(1) / scale_j if scale_j != f(0) else f(0)
                    shift = 0 if affine or bits == 8 else -lowest
                    for i in range(32):
                        q = np.rint(inverse_j * (x[i, j] - offset_j))
                        q = f(lowest) if q < f(lowest) else q
                        q = f(highest) if q > f(highest) else q
                        codes[i] = np.uint8((int(q) + shift) & 255)
                    out = (first + j) * block_bytes
                    packed[row, out], packed[row, out + 1] = best_d[j] & 255, best_d[j] >> 8
                    out += 2
                    if affine:
                        packed[row, out], packed[row, out + 1] = best_m[j] & 255, best_m[j] >> 8
                        out += 2
                    if bits == 8:
                        for i in range(32):
                            packed[row, out + i] = codes[i]
                        continue
                    if bits == 5:
                        for part in range(4):
                            high = 0
                            for i in range(8):
                                high |= (codes[8 * part + i] >> 4) << i
                            packed[row, out + part] = high
                        out += 4
                    for i in range(16):
                        packed[row, out + i] = (codes[i] & 15) | ((codes[i + 16] & 15) << 4)

    return kernel  # type: ignore[no-any-return]


class Block32(CodedFormat):
    """A type of 32-weight blocks; subclasses set `kernel` and what `CodedFormat` asks for."""

    block_size = group_size = 32
    kernel: Callable[..., None]
    bits: int
    affine: bool

    def quantize_rows(self, weights: F32, importance: F32 | None, packed: U8, effort: Effort) -> str:
        if importance is None:
            importance = np.ones(weights.shape[1], np.float32)
        problems = np.zeros(weights.shape[0], np.int8)
        steps, rounds = EFFORTS[effort]
        if self.bits == 8:  # 255 levels: the rounding error is flat in the step, so one candidate does
            steps = 9 if effort == "high" else 1
        if self.affine:  # two unknowns need a finer ladder
            steps, rounds = 2 * steps, 2 * rounds
        type(self).kernel(weights, importance, packed, problems, steps, rounds)
        return MESSAGES[int(problems.max())] if problems.any() else ""

    def scales(self, blocks: U8) -> tuple[F32, F32 | None]:
        return halves(blocks[:, 0:2]), halves(blocks[:, 2:4]) if self.affine else None
