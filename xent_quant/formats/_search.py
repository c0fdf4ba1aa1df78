"""The search for scales and codes, one algorithm for all types with one integer code per weight.

A block holds `groups` groups of weights that share an integer scale s (and minimum m); the block's float16 scales d (and
dmin) stand above them. Types without integer scales are blocks of one group with s = m = 1. Two models:
`affine`, w = d·s·q − dmin·m with q in 0…top (Q2_K, Q4_K, Q5_K, Q4_1, Q5_1), and `symmetric`, w = d·s·level
(Q3_K, Q6_K, Q4_0, Q5_0, Q8_0, IQ4_NL, IQ4_XS).

1. Per group, a ladder of candidate step sizes: codes by rounding, then scale (and minimum) by weighted least squares; the
   squared error follows in closed form from sums over the group, so that a candidate costs one pass. The best one stays.
2. Per block, `rounds` times: d (and dmin) are rounded to float16; every group tries the integer scale nearest to its own
   and both neighbours, each with the minimum (rounded to its integer too) and the codes that suit it; then d and dmin are
   fitted to all codes of the block by least squares. The round of least error stays, so nothing is chosen before the
   quantisation of what it depends on.

Sixteen rows go through in SIMD lanes (see `_lanes`), so that a lane is the plain scalar algorithm in float32, each sum in
the order of the weights: the slow reference gives the same bytes. Of equal errors the first candidate stays; rounding ties
go to even, in a table of levels to the lower level.
"""

import numpy as np

from xent_quant.compilation import jit
from xent_quant.formats._lanes import (
    WIDTH,
    absolute,
    binade,
    half,
    larger,
    load,
    rint,
    smaller,
    spread,
    store,
    store_bytes,
    store_quads,
    where_less,
)

HUGE = np.float32(3e38)
TINY = np.float32(1e-30)
"""Ranges and scales below it are zero to every type: float16 ends at 6e-8."""
LARGEST = np.float32(65504)
ZERO, ONE, TWO = np.float32(0), np.float32(1), np.float32(2)


@jit
def fill(weights, first, start, size, x):  # type: ignore[no-untyped-def]
    """Transpose weights [first : first + 16, start : start + size] into x [size · 16]; rows past the last are zeros."""
    for lane in range(WIDTH):
        if first + lane < weights.shape[0]:
            for i in range(size):
                x[i * WIDTH + lane] = weights[first + lane, start + i]
        else:
            for i in range(size):
                x[i * WIDTH + lane] = ZERO


@jit
def empty(tile, first, start, size, out):  # type: ignore[no-untyped-def]
    """The inverse, for any dtype: tile [size · 16] to out [first : first + 16, start : start + size]."""
    for lane in range(min(WIDTH, out.shape[0] - first)):
        for i in range(size):
            out[first + lane, start + i] = tile[i * WIDTH + lane]


@jit
def sums(x, w, start, size, base, inverse, lowest, highest):  # type: ignore[no-untyped-def]
    """Σwq, Σwq² and Σwqx of the codes q = rint(inverse · (x − base)), kept within lowest…highest."""
    sl = sll = sxl = spread(ZERO)
    for i in range(start, start + size):
        value = load(x, i)
        q = larger(smaller(rint(inverse * (value - base)), highest), lowest)
        wq = q * w[i]
        sl = sl + wq
        sll = sll + wq * q
        sxl = sxl + wq * value
    return sl, sll, sxl


@jit
def code(value, base, inverse, lowest, highest):  # type: ignore[no-untyped-def]
    """A code of `sums`, counted from the lowest."""
    return larger(smaller(rint(inverse * (value - base)), highest), lowest) - lowest


@jit
def encode(x, start, size, base, inverse, lowest, highest, quads):  # type: ignore[no-untyped-def]
    """The codes of `sums`, counted from the lowest, four a word."""
    for i in range(start // 4, (start + size) // 4):
        store_quads(
            quads,
            i,
            code(load(x, 4 * i), base, inverse, lowest, highest),
            code(load(x, 4 * i + 1), base, inverse, lowest, highest),
            code(load(x, 4 * i + 2), base, inverse, lowest, highest),
            code(load(x, 4 * i + 3), base, inverse, lowest, highest),
        )


@jit
def moments(x, w, start, size):  # type: ignore[no-untyped-def]
    """Σw (a float), Σwx and Σwx² of a group, its least and greatest weight, and its first of largest magnitude."""
    sw = ZERO
    sx = sxx = spread(ZERO)
    low = high = peak = load(x, start)
    for i in range(start, start + size):
        value = load(x, i)
        low = smaller(value, low)
        high = larger(value, high)
        peak = where_less(absolute(peak), absolute(value), value, peak)
        wx = value * w[i]
        sw += w[i]
        sx = sx + wx
        sxx = sxx + wx * value
    return sw, sx, sxx, low, high, peak


@jit
def affine(weights, importance, ladder, rounds, block_size, groups, top, scale_top, codes, inner, outer):  # type: ignore[no-untyped-def]
    """Fill codes [rows, columns / 4] u32 (four bytes), inner [rows, blocks · 2 · groups] u8 (s then m of a block) and outer
    [rows, blocks · 2] f32 (d, dmin: float16 values, or beyond LARGEST where the scales are too large).

    `ladder` [candidates, 2] holds steps over a group's range, and by what share of it the lowest step lies below the least
    weight. With one group a block, dmin may have either sign.
    """
    size = block_size // groups
    nested = groups > 1
    x = np.empty(block_size * WIDTH, np.float32)
    quads = np.empty(block_size // 4 * WIDTH, np.uint32)
    inner_bytes = np.empty(2 * groups * WIDTH, np.uint8)
    outer_floats = np.empty(2 * WIDTH, np.float32)
    sw = np.empty(groups, np.float32)
    shape = groups * WIDTH
    sx, sxx, scale, offset = (
        np.empty(shape, np.float32),
        np.empty(shape, np.float32),
        np.empty(shape, np.float32),
        np.empty(shape, np.float32),
    )
    s, m, best_s, best_m = (
        np.empty(shape, np.float32),
        np.empty(shape, np.float32),
        np.empty(shape, np.float32),
        np.empty(shape, np.float32),
    )
    zero = spread(ZERO)
    lowest = top - top  # a 0 that the compiler does not see: `larger` is then one instruction, and sums stay in registers
    for first in range(0, weights.shape[0], WIDTH):
        for block in range(weights.shape[1] // block_size):
            fill(weights, first, block * block_size, block_size, x)
            w = importance[block * block_size : (block + 1) * block_size]
            d = dmin = zero
            for g in range(groups):
                sw_g, sx_g, sxx_g, low, high, _ = moments(x, w, g * size, size)
                if nested:
                    low = smaller(low, ZERO)
                span = high - low
                # A constant group first: all codes zero.
                a, b = zero, sx_g / sw_g
                if nested:
                    b = smaller(b, ZERO)
                least = sxx_g + b * b * sw_g - TWO * b * sx_g
                for k in range(len(ladder)):
                    inverse = where_less(TINY, span, ladder[k, 0] / span, ZERO)
                    base = low - span * ladder[k, 1]
                    sl, sll, sxl = sums(x, w, g * size, size, base, inverse, lowest, top)
                    determinant = sw_g * sll - sl * sl
                    try_a = (sw_g * sxl - sx_g * sl) / determinant
                    try_b = (sll * sx_g - sl * sxl) / determinant
                    if nested:
                        try_a = where_less(ZERO, try_b, sxl / sll, try_a)
                        try_b = smaller(try_b, ZERO)
                    error = sxx_g + try_a * try_a * sll + try_b * try_b * sw_g
                    error = error + TWO * (try_a * try_b * sl - try_a * sxl - try_b * sx_g)
                    error = where_less(ZERO, determinant, where_less(ZERO, try_a, error, HUGE), HUGE)
                    a, b = where_less(error, least, try_a, a), where_less(error, least, try_b, b)
                    least = smaller(error, least)
                sw[g] = sw_g
                store(sx, g, sx_g)
                store(sxx, g, sxx_g)
                store(scale, g, a)
                store(offset, g, b)
                d = larger(a, d)
                dmin = larger(zero - b, dmin) if nested else zero - b
            d, dmin = half(d / scale_top), half(dmin / scale_top)
            least, best_d, best_dmin = spread(HUGE), d, dmin
            for g in range(groups):
                store(best_s, g, zero)
                store(best_m, g, zero)
            for _ in range(rounds):
                inverse_d = where_less(ZERO, d, ONE / d, ZERO)
                inverse_dmin = where_less(ZERO, dmin, ONE / dmin, ZERO)
                total = aa = ab = bb = ax = bx = zero
                for g in range(groups):
                    sw_g, sx_g, sxx_g = sw[g], load(sx, g), load(sxx, g)
                    own, b_g = rint(load(scale, g) * inverse_d), load(offset, g)
                    # Integer scale 0: all codes zero, the error needs no pass.
                    s_g = zero
                    m_g = larger(smaller(rint(zero - sx_g / sw_g * inverse_dmin), scale_top), ZERO)
                    b = zero - dmin * m_g
                    error_g = sxx_g + b * b * sw_g - TWO * b * sx_g
                    sl_g = sll_g = sxl_g = zero
                    if not nested:
                        error_g = spread(HUGE)
                    for move in range(3 if nested else 1):
                        try_s = larger(smaller(own + np.float32((move + 1) % 3 - 1), scale_top), ONE)
                        a = d * try_s
                        inverse = where_less(ZERO, a, ONE / a, ZERO)
                        try_m = spread(ONE)
                        if nested:
                            sl, sll, sxl = sums(x, w, g * size, size, b_g, inverse, lowest, top)
                            try_m = larger(smaller(rint((a * sl - sx_g) / sw_g * inverse_dmin), scale_top), ZERO)
                        b = zero - dmin * try_m
                        sl, sll, sxl = sums(x, w, g * size, size, b, inverse, lowest, top)
                        error = sxx_g + a * a * sll + b * b * sw_g + TWO * (a * b * sl - a * sxl - b * sx_g)
                        s_g, m_g = where_less(error, error_g, try_s, s_g), where_less(error, error_g, try_m, m_g)
                        sl_g, sll_g = where_less(error, error_g, sl, sl_g), where_less(error, error_g, sll, sll_g)
                        sxl_g = where_less(error, error_g, sxl, sxl_g)
                        error_g = smaller(error, error_g)
                    store(s, g, s_g)
                    store(m, g, m_g)
                    store(scale, g, d * s_g)
                    store(offset, g, zero - dmin * m_g)
                    total = total + error_g
                    aa, ab, bb = aa + s_g * s_g * sll_g, ab + s_g * m_g * sl_g, bb + m_g * m_g * sw_g
                    ax, bx = ax + s_g * sxl_g, bx + m_g * sx_g
                for g in range(groups):
                    store(best_s, g, where_less(total, least, load(s, g), load(best_s, g)))
                    store(best_m, g, where_less(total, least, load(m, g), load(best_m, g)))
                best_d, best_dmin = where_less(total, least, d, best_d), where_less(total, least, dmin, best_dmin)
                least = smaller(total, least)
                # x ~ d·(s·q) − dmin·m over the whole block; where that has no solution, d alone.
                determinant = aa * bb - ab * ab
                new_d = half(where_less(ZERO, determinant, (ax * bb - bx * ab) / determinant, ax / aa))
                new_dmin = half(where_less(ZERO, determinant, (ax * ab - bx * aa) / determinant, dmin))
                good = where_less(ZERO, new_d, where_less(LARGEST, larger(new_d, absolute(new_dmin)), ZERO, ONE), ZERO)
                if nested:
                    good = where_less(new_dmin, ZERO, ZERO, good)
                d, dmin = where_less(ZERO, good, new_d, d), where_less(ZERO, good, new_dmin, dmin)
            for g in range(groups):
                s_g, m_g = load(best_s, g), load(best_m, g)
                a, b = best_d * s_g, best_dmin * m_g
                inverse = where_less(ZERO, a, ONE / a, ZERO)
                encode(x, g * size, size, zero - b, inverse, lowest, top, quads)
                store_bytes(inner_bytes, g, s_g)
                store_bytes(inner_bytes, groups + g, m_g)
            store(outer_floats, 0, best_d)
            store(outer_floats, 1, best_dmin)
            empty(quads, first, block * block_size // 4, block_size // 4, codes)
            empty(inner_bytes, first, block * 2 * groups, 2 * groups, inner)
            empty(outer_floats, first, block * 2, 2, outer)


@jit
def table_sums(x, w, start, size, inverse, lowest, rises):  # type: ignore[no-untyped-def]
    """As `sums` without the first: q is the level nearest to inverse · x. `rises` [levels − 1, 2] float32 holds, above
    each level but the last, the midpoint to the next and the step up to it."""
    sll = sxl = spread(ZERO)
    for i in range(start, start + size):
        value = load(x, i)
        wanted = inverse * value
        q = spread(lowest)
        for k in range(len(rises)):
            q = where_less(rises[k, 0], wanted, q + rises[k, 1], q)
        wq = q * w[i]
        sll = sll + wq * q
        sxl = sxl + wq * value
    return sll, sxl


@jit
def table_code(value, inverse, rises):  # type: ignore[no-untyped-def]
    """The index of a level of `table_sums`."""
    q = spread(ZERO)
    for k in range(len(rises)):
        q = where_less(rises[k, 0], inverse * value, q + ONE, q)
    return q


@jit
def encode_table(x, start, size, inverse, rises, quads):  # type: ignore[no-untyped-def]
    """The indices of `table_sums`'s levels, four a word."""
    for i in range(start // 4, (start + size) // 4):
        store_quads(
            quads,
            i,
            table_code(load(x, 4 * i), inverse, rises),
            table_code(load(x, 4 * i + 1), inverse, rises),
            table_code(load(x, 4 * i + 2), inverse, rises),
            table_code(load(x, 4 * i + 3), inverse, rises),
        )


@jit
def level_sums(x, w, start, size, inverse, lowest, highest, rises):  # type: ignore[no-untyped-def]
    """Σwq² and Σwqx for levels that are the integers lowest…highest where `rises` is empty, else those of the table."""
    if len(rises):
        return table_sums(x, w, start, size, inverse, lowest, rises)
    _, sll, sxl = sums(x, w, start, size, ZERO, inverse, lowest, highest)
    return sll, sxl


@jit
def symmetric(weights, importance, ladder, rounds, block_size, groups, lowest, highest, rises, scale_low, codes, inner, outer):  # type: ignore[no-untyped-def]
    """Fill codes [rows, columns / 4] u32 (four bytes), inner [rows, blocks · groups] u8 (s, two's complement) and outer
    [rows, blocks] f32 (d).

    As `affine`, without offsets. Integer scales go from `scale_low` to −scale_low − 1, or are 1 with one group a block.
    `ladder` holds the candidates: the level, in or near lowest…highest, at which a group's largest weight is put.
    """
    size = block_size // groups
    nested = groups > 1
    x = np.empty(block_size * WIDTH, np.float32)
    quads = np.empty(block_size // 4 * WIDTH, np.uint32)
    inner_bytes = np.empty(groups * WIDTH, np.uint8)
    outer_floats = np.empty(WIDTH, np.float32)
    shape = groups * WIDTH
    sxx, scale = np.empty(shape, np.float32), np.empty(shape, np.float32)
    s, best_s = np.empty(shape, np.float32), np.empty(shape, np.float32)
    zero = spread(ZERO)
    for first in range(0, weights.shape[0], WIDTH):
        for block in range(weights.shape[1] // block_size):
            fill(weights, first, block * block_size, block_size, x)
            w = importance[block * block_size : (block + 1) * block_size]
            d = zero
            for g in range(groups):
                _, _, sxx_g, _, _, peak = moments(x, w, g * size, size)
                a, gain = zero, zero  # error = Σwx² − gain
                for k in range(len(ladder)):
                    inverse = where_less(TINY, absolute(peak), ladder[k] / peak, ZERO)
                    sll, sxl = level_sums(x, w, g * size, size, inverse, lowest, highest, rises)
                    try_a = where_less(ZERO, sll, sxl / sll, ZERO)
                    a, gain = where_less(gain, try_a * sxl, try_a, a), larger(try_a * sxl, gain)
                store(sxx, g, sxx_g)
                store(scale, g, a)
                d = where_less(absolute(d), absolute(a), a, d)
            d = half(d / scale_low) if nested else half(d)
            least, best_d = spread(HUGE), d
            for g in range(groups):
                store(best_s, g, zero)
            for _ in range(rounds):
                inverse_d = where_less(ZERO, absolute(d), ONE / d, ZERO)
                total = aa = ax = zero
                for g in range(groups):
                    sxx_g = load(sxx, g)
                    own = rint(load(scale, g) * inverse_d)
                    s_g, error_g = zero, sxx_g
                    sll_g = sxl_g = zero
                    if not nested:
                        error_g = spread(HUGE)
                    for move in range(3 if nested else 1):
                        try_s = spread(ONE)
                        if nested:
                            try_s = larger(smaller(own + np.float32((move + 1) % 3 - 1), -scale_low - ONE), scale_low)
                        a = d * try_s
                        inverse = where_less(ZERO, absolute(a), ONE / a, ZERO)
                        sll, sxl = level_sums(x, w, g * size, size, inverse, lowest, highest, rises)
                        error = sxx_g + a * a * sll - TWO * a * sxl
                        s_g = where_less(error, error_g, try_s, s_g)
                        sll_g, sxl_g = where_less(error, error_g, sll, sll_g), where_less(error, error_g, sxl, sxl_g)
                        error_g = smaller(error, error_g)
                    store(s, g, s_g)
                    store(scale, g, d * s_g)
                    total = total + error_g
                    aa, ax = aa + s_g * s_g * sll_g, ax + s_g * sxl_g
                for g in range(groups):
                    store(best_s, g, where_less(total, least, load(s, g), load(best_s, g)))
                best_d = where_less(total, least, d, best_d)
                least = smaller(total, least)
                new_d = half(ax / aa)
                good = where_less(ZERO, aa, where_less(LARGEST, absolute(new_d), ZERO, ONE), ZERO)
                d = where_less(ZERO, good, new_d, d)
            for g in range(groups):
                s_g = load(best_s, g)
                a = best_d * s_g
                inverse = where_less(ZERO, absolute(a), ONE / a, ZERO)
                if len(rises):
                    encode_table(x, g * size, size, inverse, rises, quads)
                else:
                    encode(x, g * size, size, zero, inverse, lowest, highest, quads)
                store_bytes(inner_bytes, g, s_g)
            store(outer_floats, 0, best_d)
            empty(quads, first, block * block_size // 4, block_size // 4, codes)
            empty(inner_bytes, first, block * groups, groups, inner)
            empty(outer_floats, first, block, 1, outer)


@jit
def powers(weights, importance, candidates, lowest, rises, codes, outer):  # type: ignore[no-untyped-def]
    """As `symmetric` for blocks of 32 whose d is a power of two: `candidates` times the one at or below the largest
    magnitude over the largest level. d of a block of zeros, or of magnitudes below TINY, is 0."""
    x = np.empty(32 * WIDTH, np.float32)
    quads = np.empty(8 * WIDTH, np.uint32)
    outer_floats = np.empty(WIDTH, np.float32)
    for first in range(0, weights.shape[0], WIDTH):
        for block in range(weights.shape[1] // 32):
            fill(weights, first, block * 32, 32, x)
            w = importance[block * 32 : (block + 1) * 32]
            _, _, sxx, _, _, peak = moments(x, w, 0, 32)
            step = where_less(TINY, absolute(peak), binade(peak / -lowest), ZERO)
            d, least = spread(ZERO), spread(HUGE)
            for k in range(len(candidates)):
                a = step * candidates[k]
                inverse = where_less(ZERO, a, ONE / a, ZERO)
                sll, sxl = table_sums(x, w, 0, 32, inverse, lowest, rises)
                error = sxx + a * a * sll - TWO * a * sxl
                d, least = where_less(error, least, a, d), smaller(error, least)
            encode_table(x, 0, 32, where_less(ZERO, d, ONE / d, ZERO), rises, quads)
            store(outer_floats, 0, d)
            empty(quads, first, block * 8, 8, codes)
            empty(outer_floats, first, block, 1, outer)


@jit
def half_e4m3(value):  # type: ignore[no-untyped-def]
    """The half of an E4M3 nearest to a value >= 0, ties to even, at most 224."""
    step = larger(binade(value) * np.float32(1 / 8), np.float32(2**-10))
    return smaller(rint(value / step) * step, np.float32(224))


@jit
def small_floats(weights, importance, ladder, rounds, lowest, rises, codes, outer):  # type: ignore[no-untyped-def]
    """As `symmetric` without integer scales for blocks of 16 whose d is one of `half_e4m3`: of `ladder`'s the one of least error,
    then, `rounds` times, that nearest to the least-squares scale of its codes. `outer` is [rows, blocks]."""
    x = np.empty(16 * WIDTH, np.float32)
    quads = np.empty(4 * WIDTH, np.uint32)
    outer_floats = np.empty(WIDTH, np.float32)
    for first in range(0, weights.shape[0], WIDTH):
        for block in range(weights.shape[1] // 16):
            fill(weights, first, block * 16, 16, x)
            w = importance[block * 16 : (block + 1) * 16]
            _, _, sxx, _, _, peak = moments(x, w, 0, 16)
            d = best_sll = best_sxl = spread(ZERO)
            least = sxx
            for k in range(len(ladder) + rounds):
                if k < len(ladder):
                    a = half_e4m3(absolute(peak) / ladder[k])
                else:
                    a = half_e4m3(where_less(ZERO, best_sll, best_sxl / best_sll, ZERO))
                inverse = where_less(ZERO, a, ONE / a, ZERO)
                sll, sxl = table_sums(x, w, 0, 16, inverse, lowest, rises)
                error = sxx + a * a * sll - TWO * a * sxl
                best_sll, best_sxl = where_less(error, least, sll, best_sll), where_less(error, least, sxl, best_sxl)
                d, least = where_less(error, least, a, d), smaller(error, least)
            encode_table(x, 0, 16, where_less(ZERO, d, ONE / d, ZERO), rises, quads)
            store(outer_floats, 0, d)
            empty(quads, first, block * 4, 4, codes)
            empty(outer_floats, first, block, 1, outer)
