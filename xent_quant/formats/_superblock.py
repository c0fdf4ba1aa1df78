"""The search behind the K types: super-blocks of 256 weights, sub-blocks with integer scales, float16 outer scales.

Two kernels, made for a layout by `affine` (Q2_K, Q4_K, Q5_K: w = d·s·q − dmin·m) and `symmetric` (Q3_K, Q6_K:
w = d·s·q). Each fills packed bytes directly, rows in parallel, sub-blocks of one super-block in SIMD lanes.

1. Per sub-block: candidate step sizes; for each, codes by rounding, then scale (and minimum) by weighted least squares,
   error in closed form from five sums. The best candidate wins.
2. Per super-block, `rounds` times: d (and dmin) rounded to float16; for every sub-block the integer scale and both its
   neighbours are tried with the codes, and the minimum, that suit them; then d and dmin are refitted to all codes by
   least squares. The round of least error is kept, so every choice is made after the quantisation of the scales.

All arithmetic is float32 in a fixed order without fused or reordered operations, so the slow reference in tests gives
the same bytes. Ties: rint is to even; of equal errors the first candidate stays.
"""

from collections.abc import Callable
from typing import Any

import numba as nb
import numpy as np

from xent_quant.formats._half import INFINITY, half_bits, half_value

# Problems that a kernel reports, per row.
FINE, NOT_FINITE, OVERFLOW = 0, 1, 2
MESSAGES = {
    NOT_FINITE: "NaN or infinite weight; the checkpoint is damaged",
    OVERFLOW: "a block's scale exceeds float16 (65504); keep this tensor in BF16 or F32",
}
HUGE = np.float32(3e38)
LIMIT = np.float32(1e15)  # beyond it, sums of squares leave float32; float16 scales overflow long before
JIT: dict[str, Any] = {"cache": True, "error_model": "numpy"}


def affine(sub_blocks: int, bits: int, scale_codes: int, block_bytes: int) -> Callable[..., None]:
    """Kernel(weights [rows, columns] f32, importance [columns] f32, packed u8, problems [rows] i8, steps, rounds, lanes).

    `lanes` equals sub_blocks: a trip count unknown to the compiler keeps it from unrolling what it should vectorise.
    """
    size = 256 // sub_blocks
    top = 2**bits - 1

    @nb.njit(parallel=True, **JIT)
    def kernel(weights, importance, packed, problems, steps, rounds, lanes):  # type: ignore[no-untyped-def]
        f = np.float32
        for row in nb.prange(weights.shape[0]):
            x = np.empty((size, sub_blocks), f)  # transposed: lanes are sub-blocks
            w = np.empty((size, sub_blocks), f)
            low, span, sw, sx, sxx = (
                np.empty(sub_blocks, f),
                np.empty(sub_blocks, f),
                np.empty(sub_blocks, f),
                np.empty(sub_blocks, f),
                np.empty(sub_blocks, f),
            )
            sl, sll, sxl = np.empty(sub_blocks, f), np.empty(sub_blocks, f), np.empty(sub_blocks, f)
            inverse, scale, offset, error = (
                np.empty(sub_blocks, f),
                np.empty(sub_blocks, f),
                np.empty(sub_blocks, f),
                np.empty(sub_blocks, f),
            )
            s, m = np.empty(sub_blocks, f), np.empty(sub_blocks, f)
            code_s, code_m = np.empty(sub_blocks, f), np.empty(sub_blocks, f)
            try_s, try_m = np.empty(sub_blocks, f), np.empty(sub_blocks, f)
            best_s, best_m = np.empty(sub_blocks, f), np.empty(sub_blocks, f)
            keep_l, keep_ll, keep_xl = np.empty(sub_blocks, f), np.empty(sub_blocks, f), np.empty(sub_blocks, f)
            codes = np.empty(256, np.uint8)
            for block in range(weights.shape[1] // 256):
                start = block * 256
                finite = True
                for j in range(lanes):
                    for i in range(size):
                        value = weights[row, start + j * size + i]
                        x[i, j] = value
                        w[i, j] = importance[start + j * size + i]
                        if not (-LIMIT < value < LIMIT):
                            finite = False
                if not finite:
                    problems[row] = NOT_FINITE
                    break
                for j in range(lanes):
                    low[j] = f(0)
                    span[j] = x[0, j]
                    sw[j] = sx[j] = sxx[j] = f(0)
                for i in range(size):
                    for j in range(lanes):
                        value = x[i, j]
                        low[j] = value if value < low[j] else low[j]
                        span[j] = value if value > span[j] else span[j]
                        wx = w[i, j] * value
                        sw[j] += w[i, j]
                        sx[j] += wx
                        sxx[j] += wx * value
                for j in range(lanes):
                    span[j] -= low[j]
                    mean = sx[j] / sw[j]
                    scale[j] = f(0)
                    offset[j] = mean if mean < f(0) else f(0)  # a constant: all codes zero
                    error[j] = sxx[j] - f(2) * offset[j] * sx[j] + offset[j] * offset[j] * sw[j]
                # 1. step sizes from (top - 0.9) to (top + 0.9) steps over the range
                for step in range(steps):
                    reach = f(top) + f(1.8) * f(step) / f(max(1, steps - 1)) - f(0.9)
                    for j in range(lanes):
                        inverse[j] = reach / span[j] if span[j] > f(0) else f(0)
                        sl[j] = sll[j] = sxl[j] = f(0)
                    for i in range(size):
                        for j in range(lanes):
                            q = np.rint(inverse[j] * (x[i, j] - low[j]))
                            q = f(0) if q < f(0) else q
                            q = f(top) if q > f(top) else q
                            wq = w[i, j] * q
                            sl[j] += wq
                            sll[j] += wq * q
                            sxl[j] += wq * x[i, j]
                    for j in range(lanes):
                        determinant = sw[j] * sll[j] - sl[j] * sl[j]
                        if determinant > f(0):
                            a = (sw[j] * sxl[j] - sx[j] * sl[j]) / determinant
                            b = (sll[j] * sx[j] - sl[j] * sxl[j]) / determinant
                            if b > f(0):
                                b = f(0)
                                a = sxl[j] / sll[j]
                            e = sxx[j] + a * a * sll[j] + b * b * sw[j] + f(2) * (a * b * sl[j] - a * sxl[j] - b * sx[j])
                            if a > f(0) and e < error[j]:
                                error[j] = e
                                scale[j] = a
                                offset[j] = b
                # 2. scales and minima after their own quantisation
                high_s = high_m = f(0)
                for j in range(lanes):
                    high_s = scale[j] if scale[j] > high_s else high_s
                    high_m = -offset[j] if -offset[j] > high_m else high_m
                d_bits = half_bits(high_s / f(scale_codes))
                m_bits = half_bits(high_m / f(scale_codes))
                least = HUGE
                best_d, best_dm = d_bits, m_bits
                for j in range(lanes):
                    best_s[j] = best_m[j] = f(0)
                for _ in range(rounds):
                    if d_bits >= INFINITY or m_bits >= INFINITY:
                        break
                    d, dm = half_value(d_bits), half_value(m_bits)
                    inverse_d = f(1) / d if d > f(0) else f(0)
                    inverse_dm = f(1) / dm if dm > f(0) else f(0)
                    for j in range(lanes):
                        error[j] = HUGE
                        code_s[j] = code_m[j] = f(0)
                        keep_l[j] = keep_ll[j] = keep_xl[j] = f(0)
                    for move in range(4):
                        for j in range(lanes):
                            # move 0: scale code 0, a constant block; then the rounded code and its neighbours
                            c = np.rint(scale[j] * inverse_d) + f(move - 2)
                            c = f(0) if c < f(0) or move == 0 else c
                            c = f(scale_codes) if c > f(scale_codes) else c
                            try_s[j] = c
                            s[j] = d * c
                            inverse[j] = f(1) / s[j] if s[j] > f(0) else f(0)
                            sl[j] = f(0)
                        for i in range(size):
                            for j in range(lanes):
                                q = np.rint(inverse[j] * (x[i, j] - offset[j]))
                                q = f(0) if q < f(0) else q
                                q = f(top) if q > f(top) else q
                                sl[j] += w[i, j] * q
                        for j in range(lanes):
                            c = np.rint((s[j] * sl[j] - sx[j]) / sw[j] * inverse_dm)
                            c = f(0) if c < f(0) else c
                            c = f(scale_codes) if c > f(scale_codes) else c
                            try_m[j] = c
                            m[j] = dm * c
                            sl[j] = sll[j] = sxl[j] = f(0)
                        for i in range(size):
                            for j in range(lanes):
                                q = np.rint(inverse[j] * (x[i, j] + m[j]))
                                q = f(0) if q < f(0) else q
                                q = f(top) if q > f(top) else q
                                wq = w[i, j] * q
                                sl[j] += wq
                                sll[j] += wq * q
                                sxl[j] += wq * x[i, j]
                        for j in range(lanes):
                            a, b = s[j], -m[j]
                            e = sxx[j] + a * a * sll[j] + b * b * sw[j] + f(2) * (a * b * sl[j] - a * sxl[j] - b * sx[j])
                            if e < error[j]:
                                error[j] = e
                                code_s[j], code_m[j] = try_s[j], try_m[j]
                                keep_l[j], keep_ll[j], keep_xl[j] = sl[j], sll[j], sxl[j]
                    total = f(0)
                    for j in range(lanes):
                        total += error[j]
                    if total < least:
                        least = total
                        best_d, best_dm = d_bits, m_bits
                        for j in range(lanes):
                            best_s[j], best_m[j] = code_s[j], code_m[j]
                    # refit: x ~ d·(s·q) − dmin·m over the whole super-block
                    aa = bb = ab = ax = bx = f(0)
                    for j in range(lanes):
                        aa += code_s[j] * code_s[j] * keep_ll[j]
                        ab += code_s[j] * code_m[j] * keep_l[j]
                        bb += code_m[j] * code_m[j] * sw[j]
                        ax += code_s[j] * keep_xl[j]
                        bx += code_m[j] * sx[j]
                        scale[j] = d * code_s[j]
                        offset[j] = -dm * code_m[j]
                    determinant = aa * bb - ab * ab
                    if determinant > f(0):
                        new_d = (ax * bb - bx * ab) / determinant
                        new_m = (ax * ab - bx * aa) / determinant
                    else:
                        new_d = ax / aa if aa > f(0) else d
                        new_m = dm
                    if new_d > f(0) and new_m >= f(0):
                        d_bits, m_bits = half_bits(new_d), half_bits(new_m)
                    else:
                        break
                if best_d >= INFINITY or best_dm >= INFINITY:
                    problems[row] = OVERFLOW
                    break
                # final codes, by rounding to the chosen scales
                d, dm = half_value(best_d), half_value(best_dm)
                for j in range(lanes):
                    step_size = d * best_s[j]
                    inverse_step = f(1) / step_size if step_size > f(0) else f(0)
                    minimum = dm * best_m[j]
                    for i in range(size):
                        q = np.rint(inverse_step * (x[i, j] + minimum))
                        q = f(0) if q < f(0) else q
                        q = f(top) if q > f(top) else q
                        codes[j * size + i] = np.uint8(q)
                out = block * block_bytes
                if bits == 2:
                    for j in range(16):
                        packed[row, out + j] = np.uint8(best_s[j]) | (np.uint8(best_m[j]) << 4)
                    for half in range(2):
                        for i in range(32):
                            p = 128 * half + i
                            packed[row, out + 16 + 32 * half + i] = (
                                codes[p] | (codes[p + 32] << 2) | (codes[p + 64] << 4) | (codes[p + 96] << 6)
                            )
                    head = out + 80
                else:
                    head = out
                    for j in range(4):
                        s0, s4, m0, m4 = (
                            np.uint8(best_s[j]),
                            np.uint8(best_s[j + 4]),
                            np.uint8(best_m[j]),
                            np.uint8(best_m[j + 4]),
                        )
                        packed[row, out + 4 + j] = s0 | ((s4 >> 4) << 6)
                        packed[row, out + 8 + j] = m0 | ((m4 >> 4) << 6)
                        packed[row, out + 12 + j] = (s4 & 15) | ((m4 & 15) << 4)
                    low_bits = out + 16 + (32 if bits == 5 else 0)
                    for group in range(4):
                        for i in range(32):
                            p = 64 * group + i
                            packed[row, low_bits + 32 * group + i] = (codes[p] & 15) | ((codes[p + 32] & 15) << 4)
                    if bits == 5:
                        for i in range(32):
                            high = 0
                            for j in range(8):
                                high |= (codes[32 * j + i] >> 4) << j
                            packed[row, out + 16 + i] = high
                packed[row, head], packed[row, head + 1] = best_d & 255, best_d >> 8
                packed[row, head + 2], packed[row, head + 3] = best_dm & 255, best_dm >> 8

    return kernel  # type: ignore[no-any-return]


def symmetric(bits: int, scale_codes: int, block_bytes: int) -> Callable[..., None]:
    """Kernel as of `affine` for 16 sub-blocks of 16: codes −2^(bits−1) … 2^(bits−1)−1, scales −scale_codes … scale_codes−1."""
    size = sub_blocks = 16
    top = 2 ** (bits - 1)

    @nb.njit(parallel=True, **JIT)
    def kernel(weights, importance, packed, problems, steps, rounds, lanes):  # type: ignore[no-untyped-def]
        f = np.float32
        for row in nb.prange(weights.shape[0]):
            x = np.empty((size, sub_blocks), f)
            w = np.empty((size, sub_blocks), f)
            peak, sxx, sll, sxl = (
                np.empty(sub_blocks, f),
                np.empty(sub_blocks, f),
                np.empty(sub_blocks, f),
                np.empty(sub_blocks, f),
            )
            inverse, scale, error = np.empty(sub_blocks, f), np.empty(sub_blocks, f), np.empty(sub_blocks, f)
            s, try_s, code_s, best_s = (
                np.empty(sub_blocks, f),
                np.empty(sub_blocks, f),
                np.empty(sub_blocks, f),
                np.empty(sub_blocks, f),
            )
            keep_ll, keep_xl = np.empty(sub_blocks, f), np.empty(sub_blocks, f)
            codes = np.empty(256, np.uint8)
            for block in range(weights.shape[1] // 256):
                start = block * 256
                finite = True
                for j in range(lanes):
                    peak[j] = sxx[j] = f(0)
                    for i in range(size):
                        value = weights[row, start + j * size + i]
                        x[i, j] = value
                        w[i, j] = importance[start + j * size + i]
                        if not (-LIMIT < value < LIMIT):
                            finite = False
                if not finite:
                    problems[row] = NOT_FINITE
                    break
                for i in range(size):
                    for j in range(lanes):
                        peak[j] = x[i, j] if abs(x[i, j]) > abs(peak[j]) else peak[j]
                        sxx[j] += w[i, j] * x[i, j] * x[i, j]
                for j in range(lanes):
                    scale[j] = f(0)
                    error[j] = sxx[j]
                # 1. the largest weight at -top, or at +top - 1, and steps around it
                for step in range(steps):
                    half_steps = (steps + 1) // 2
                    which = step if step < half_steps else step - half_steps
                    spread = f(1.8) * f(which) / f(max(1, half_steps - 1)) - f(0.9)
                    reach = -(f(top) + spread) if step < half_steps else f(top) - f(1) + spread
                    for j in range(lanes):
                        inverse[j] = reach / peak[j] if peak[j] != f(0) else f(0)
                        sll[j] = sxl[j] = f(0)
                    for i in range(size):
                        for j in range(lanes):
                            q = np.rint(inverse[j] * x[i, j])
                            q = f(-top) if q < f(-top) else q
                            q = f(top - 1) if q > f(top - 1) else q
                            wq = w[i, j] * q
                            sll[j] += wq * q
                            sxl[j] += wq * x[i, j]
                    for j in range(lanes):
                        if sll[j] > f(0):
                            a = sxl[j] / sll[j]
                            e = sxx[j] - a * sxl[j]
                            if e < error[j]:
                                error[j] = e
                                scale[j] = a
                # 2. scales after their own quantisation
                high = f(0)
                for j in range(lanes):
                    high = scale[j] if abs(scale[j]) > abs(high) else high
                d_bits = half_bits(high / f(-scale_codes))
                best_d = d_bits
                least = HUGE
                for j in range(lanes):
                    best_s[j] = f(0)
                for _ in range(rounds):
                    if d_bits & 0x7FFF >= INFINITY:
                        break
                    d = half_value(d_bits)
                    inverse_d = f(1) / d if d != f(0) else f(0)
                    for j in range(lanes):
                        error[j] = sxx[j]
                        code_s[j] = keep_ll[j] = keep_xl[j] = f(0)
                    for move in range(3):
                        for j in range(lanes):
                            c = np.rint(scale[j] * inverse_d) + f(move - 1)
                            c = f(-scale_codes) if c < f(-scale_codes) else c
                            c = f(scale_codes - 1) if c > f(scale_codes - 1) else c
                            try_s[j] = c
                            s[j] = d * c
                            inverse[j] = f(1) / s[j] if s[j] != f(0) else f(0)
                            sll[j] = sxl[j] = f(0)
                        for i in range(size):
                            for j in range(lanes):
                                q = np.rint(inverse[j] * x[i, j])
                                q = f(-top) if q < f(-top) else q
                                q = f(top - 1) if q > f(top - 1) else q
                                wq = w[i, j] * q
                                sll[j] += wq * q
                                sxl[j] += wq * x[i, j]
                        for j in range(lanes):
                            e = sxx[j] + s[j] * s[j] * sll[j] - f(2) * s[j] * sxl[j]
                            if e < error[j]:
                                error[j] = e
                                code_s[j], keep_ll[j], keep_xl[j] = try_s[j], sll[j], sxl[j]
                    total = f(0)
                    for j in range(lanes):
                        total += error[j]
                    if total < least:
                        least = total
                        best_d = d_bits
                        for j in range(lanes):
                            best_s[j] = code_s[j]
                    aa = ax = f(0)
                    for j in range(lanes):
                        aa += code_s[j] * code_s[j] * keep_ll[j]
                        ax += code_s[j] * keep_xl[j]
                        scale[j] = d * code_s[j]
                    if aa > f(0):
                        d_bits = half_bits(ax / aa)
                    else:
                        break
                if best_d & 0x7FFF >= INFINITY:
                    problems[row] = OVERFLOW
                    break
                d = half_value(best_d)
                for j in range(lanes):
                    step_size = d * best_s[j]
                    inverse_step = f(1) / step_size if step_size != f(0) else f(0)
                    for i in range(size):
                        q = np.rint(inverse_step * x[i, j])
                        q = f(-top) if q < f(-top) else q
                        q = f(top - 1) if q > f(top - 1) else q
                        codes[j * size + i] = np.uint8(int(q) + top)
                out = block * block_bytes
                if bits == 6:
                    for half in range(2):
                        for i in range(32):
                            p = 128 * half + i
                            a1, a2, a3, a4 = codes[p], codes[p + 32], codes[p + 64], codes[p + 96]
                            packed[row, out + 64 * half + i] = (a1 & 15) | ((a3 & 15) << 4)
                            packed[row, out + 64 * half + 32 + i] = (a2 & 15) | ((a4 & 15) << 4)
                            packed[row, out + 128 + 32 * half + i] = (
                                (a1 >> 4) | ((a2 >> 4) << 2) | ((a3 >> 4) << 4) | ((a4 >> 4) << 6)
                            )
                    for j in range(16):
                        packed[row, out + 192 + j] = np.uint8(int(best_s[j]) & 255)
                else:
                    for i in range(32):
                        mask = 0
                        for j in range(8):
                            mask |= (codes[32 * j + i] >> 2) << j
                        packed[row, out + i] = mask
                    for half in range(2):
                        for i in range(32):
                            p = 128 * half + i
                            packed[row, out + 32 + 32 * half + i] = (
                                (codes[p] & 3)
                                | ((codes[p + 32] & 3) << 2)
                                | ((codes[p + 64] & 3) << 4)
                                | ((codes[p + 96] & 3) << 6)
                            )
                    for j in range(4):
                        high_bits = 0
                        for k in range(4):
                            high_bits |= ((int(best_s[4 * k + j]) + 32) >> 4) << (2 * k)
                        packed[row, out + 104 + j] = high_bits
                    for j in range(8):
                        packed[row, out + 96 + j] = ((int(best_s[j]) + 32) & 15) | (((int(best_s[j + 8]) + 32) & 15) << 4)
                packed[row, out + block_bytes - 2], packed[row, out + block_bytes - 1] = best_d & 255, best_d >> 8

    return kernel  # type: ignore[no-any-return]
