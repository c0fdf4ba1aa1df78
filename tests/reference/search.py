"""The documented search for scales and codes, one weight at a time in numpy float32 scalars: slow, and written from the
words in `xent_quant/formats/_search.py`'s docstrings. A block is a list of weights, with a list of their importance.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

f = np.float32
ZERO, ONE, TWO = f(0), f(1), f(2)
HUGE, TINY, LARGEST = f(3e38), f(1e-30), f(65504)


@dataclass
class Block:
    """What a search chose: level numbers, integer scales and minima per group, and the outer scales as stored."""

    codes: list[int]
    d: np.float32
    s: list[int] | list[float] = field(default_factory=list)
    dmin: np.float32 = ZERO
    m: list[int] = field(default_factory=list)


def half(value: np.float32) -> np.float32:
    """As float16 stores it; a zero is +0."""
    return f(np.float16(value)) + ZERO


def clamp(value: np.float32, low: np.float32, high: np.float32) -> np.float32:
    return min(max(value, low), high)


def nearest(wanted: np.float32, levels: Sequence[np.float32]) -> int:
    """Number of the level nearest to `wanted`: integers in a row by rounding ties to even, others with ties to the lower."""
    if levels[-1] - levels[0] == len(levels) - 1:
        return int(clamp(np.rint(wanted), levels[0], levels[-1]) - levels[0])
    return sum(1 for low, high in pairwise(levels) if wanted > (low + high) / TWO)


def totals(x: Sequence[np.float32], w: Sequence[np.float32], q: Sequence[np.float32]) -> tuple[np.float32, ...]:
    """Σwq, Σwq², Σwqx, each in the order of the weights."""
    sl = sll = sxl = ZERO
    for value, weight, level in zip(x, w, q, strict=True):
        wq = level * weight
        sl, sll, sxl = sl + wq, sll + wq * level, sxl + wq * value
    return sl, sll, sxl


def statistics(x: Sequence[np.float32], w: Sequence[np.float32]) -> tuple[np.float32, np.float32, np.float32]:
    """Σw, Σwx, Σwx²."""
    sw = sx = sxx = ZERO
    for value, weight in zip(x, w, strict=True):
        wx = value * weight
        sw, sx, sxx = sw + weight, sx + wx, sxx + wx * value
    return sw, sx, sxx


def reciprocal(a: np.float32) -> np.float32:
    return ONE / a if a > 0 else ZERO


def affine_codes(x: Sequence[np.float32], base: np.float32, inverse: np.float32, top: int) -> list[np.float32]:
    return [clamp(np.rint(inverse * (value - base)), ZERO, f(top)) for value in x]


def affine_error(
    sxx: np.float32,
    sw: np.float32,
    sx: np.float32,
    a: np.float32,
    b: np.float32,
    sl: np.float32,
    sll: np.float32,
    sxl: np.float32,
) -> np.float32:
    return sxx + a * a * sll + b * b * sw + TWO * (a * b * sl - a * sxl - b * sx)


def affine(
    x: Sequence[np.float32],
    w: Sequence[np.float32],
    groups: int,
    top: int,
    scale_top: int,
    candidates: Sequence[tuple[np.float32, np.float32]],
    rounds: int,
) -> Block:
    """w = d·s·q − dmin·m."""
    size = len(x) // groups
    parts = [slice(g * size, (g + 1) * size) for g in range(groups)]
    nested = groups > 1
    moments = [statistics(x[part], w[part]) for part in parts]
    scales, offsets = [], []
    for part, (sw, sx, sxx) in zip(parts, moments, strict=True):
        low, high = min(x[part]), max(x[part])
        low = min(low, ZERO) if nested else low
        span = high - low
        a, b = ZERO, sx / sw
        b = min(b, ZERO) if nested else b
        least = sxx + b * b * sw - TWO * b * sx
        for reach, below in candidates:
            inverse = reach / span if span > TINY else ZERO
            sl, sll, sxl = totals(x[part], w[part], affine_codes(x[part], low - span * below, inverse, top))
            determinant = sw * sll - sl * sl
            if not determinant > 0:
                continue
            try_a = (sw * sxl - sx * sl) / determinant
            try_b = (sll * sx - sl * sxl) / determinant
            if nested and try_b > 0:
                try_a, try_b = sxl / sll, ZERO
            error = affine_error(sxx, sw, sx, try_a, try_b, sl, sll, sxl)
            if try_a > 0 and error < least:
                a, b, least = try_a, try_b, error
        scales.append(a)
        offsets.append(b)
    d = half(max(ZERO, *scales) / f(scale_top) if nested else scales[0])
    dmin = half(max(ZERO, *(ZERO - b for b in offsets)) / f(scale_top) if nested else ZERO - offsets[0])
    best = (HUGE, d, dmin, [ZERO] * groups, [ZERO] * groups)
    for _ in range(rounds):
        inverse_d, inverse_dmin = reciprocal(d), reciprocal(dmin)
        chosen_s, chosen_m = [], []
        total = aa = ab = bb = ax = bx = ZERO
        for g, part in enumerate(parts):
            sw, sx, sxx = moments[g]
            options = []
            if nested:
                m = clamp(np.rint(-sx / sw * inverse_dmin), ZERO, f(scale_top))
                b = -(dmin * m)
                options.append((sxx + b * b * sw - TWO * b * sx, ZERO, m, ZERO, ZERO, ZERO))
            own = np.rint(scales[g] * inverse_d)
            for move in (0, 1, -1) if nested else (0,):
                s = clamp(own + f(move), ONE, f(scale_top))
                a, m = d * s, ONE
                inverse = reciprocal(a)
                if nested:
                    sl, _, _ = totals(x[part], w[part], affine_codes(x[part], offsets[g], inverse, top))
                    m = clamp(np.rint((a * sl - sx) / sw * inverse_dmin), ZERO, f(scale_top))
                b = -(dmin * m)
                sl, sll, sxl = totals(x[part], w[part], affine_codes(x[part], b, inverse, top))
                options.append((affine_error(sxx, sw, sx, a, b, sl, sll, sxl), s, m, sl, sll, sxl))
            error, s, m, sl, sll, sxl = min(options, key=lambda option: option[0])  # the first of equals
            chosen_s.append(s)
            chosen_m.append(m)
            total += error
            aa, ab, bb = aa + s * s * sll, ab + s * m * sl, bb + m * m * sw
            ax, bx = ax + s * sxl, bx + m * sx
        if total < best[0]:
            best = (total, d, dmin, chosen_s, chosen_m)
        scales, offsets = [d * s for s in chosen_s], [-(dmin * m) for m in chosen_m]
        determinant = aa * bb - ab * ab
        if determinant > 0:
            new_d = half((ax * bb - bx * ab) / determinant)
            new_dmin = half((ax * ab - bx * aa) / determinant)
        else:
            new_d, new_dmin = half(ax / aa), dmin
        if new_d > 0 and max(new_d, abs(new_dmin)) <= LARGEST and not (nested and new_dmin < 0):
            d, dmin = new_d, new_dmin
    _, d, dmin, chosen_s, chosen_m = best
    codes = []
    for part, s, m in zip(parts, chosen_s, chosen_m, strict=True):
        codes += [int(q) for q in affine_codes(x[part], -(dmin * m), reciprocal(d * s), top)]
    return Block(codes, d, [int(s) for s in chosen_s], dmin, [int(m) for m in chosen_m])


def symmetric(
    x: Sequence[np.float32],
    w: Sequence[np.float32],
    groups: int,
    levels: Sequence[np.float32],
    scale_low: int,
    candidates: Sequence[np.float32],
    rounds: int,
) -> Block:
    """w = d·s·level."""
    size = len(x) // groups
    parts = [slice(g * size, (g + 1) * size) for g in range(groups)]
    nested = groups > 1

    def either(a: np.float32) -> np.float32:
        return ONE / a if a != 0 else ZERO

    def fitted(part: slice, inverse: np.float32) -> tuple[np.float32, np.float32]:
        q = [levels[nearest(inverse * value, levels)] for value in x[part]]
        return totals(x[part], w[part], q)[1:]

    energies, scales = [], []
    for part in parts:
        energies.append(statistics(x[part], w[part])[2])
        peak = x[part][0]
        for value in x[part]:
            peak = value if abs(value) > abs(peak) else peak
        a = gain = ZERO
        for reach in candidates:
            sll, sxl = fitted(part, reach / peak if abs(peak) > TINY else ZERO)
            try_a = sxl / sll if sll > 0 else ZERO
            if try_a * sxl > gain:
                a, gain = try_a, try_a * sxl
        scales.append(a)
    largest = ZERO
    for a in scales:
        largest = a if abs(a) > abs(largest) else largest
    d = half(largest / f(scale_low) if nested else largest)
    best = (HUGE, d, [ZERO] * groups)
    for _ in range(rounds):
        chosen = []
        total = aa = ax = ZERO
        for g, part in enumerate(parts):
            options = [(energies[g], ZERO, ZERO, ZERO)] if nested else []
            own = np.rint(scales[g] * either(d))
            for move in (0, 1, -1) if nested else (0,):
                s = clamp(own + f(move), f(scale_low), f(-scale_low - 1)) if nested else ONE
                a = d * s
                sll, sxl = fitted(part, either(a))
                options.append((energies[g] + a * a * sll - TWO * a * sxl, s, sll, sxl))
            error, s, sll, sxl = min(options, key=lambda option: option[0])
            chosen.append(s)
            total += error
            aa, ax = aa + s * s * sll, ax + s * sxl
        if total < best[0]:
            best = (total, d, chosen)
        scales = [d * s for s in chosen]
        if aa > 0 and abs(half(ax / aa)) <= LARGEST:
            d = half(ax / aa)
    _, d, chosen = best
    codes = []
    for part, s in zip(parts, chosen, strict=True):
        codes += [nearest(either(d * s) * value, levels) for value in x[part]]
    return Block(codes, d, [int(s) for s in chosen])


def powers(
    x: Sequence[np.float32], w: Sequence[np.float32], levels: Sequence[np.float32], candidates: Sequence[np.float32]
) -> Block:
    """w = d·level, d a power of two."""
    sxx = statistics(x, w)[2]
    peak = max(abs(value) for value in x)
    step = f(2.0 ** (np.frexp(peak / levels[-1])[1] - 1)) if peak > TINY else ZERO
    best = (HUGE, ZERO)
    for factor in candidates:
        a = step * factor
        q = [levels[nearest(reciprocal(a) * value, levels)] for value in x]
        _, sll, sxl = totals(x, w, q)
        error = sxx + a * a * sll - TWO * a * sxl
        best = (error, a) if error < best[0] else best
    return Block([nearest(reciprocal(best[1]) * value, levels) for value in x], best[1])


def half_e4m3(value: np.float32) -> np.float32:
    """The half of an E4M3 nearest to a value: eighths of a power of two, below 2^−7 multiples of 2^−10; at most 224."""
    step = f(max(2.0 ** (np.frexp(value)[1] - 4), 2.0**-10))
    return min(np.rint(value / step) * step, f(224))


def small_floats(
    x: Sequence[np.float32], w: Sequence[np.float32], levels: Sequence[np.float32], candidates: Sequence[np.float32], rounds: int
) -> Block:
    """w = d·level, d the half of an E4M3 for each sixteen weights; `s` of the block holds the scales."""
    codes, scales = [], []
    for start in range(0, len(x), 16):
        part, weights = x[start : start + 16], w[start : start + 16]
        sxx = statistics(part, weights)[2]
        peak = max(abs(value) for value in part)
        d, least, fit = ZERO, sxx, ZERO
        for reach in [*candidates, *[None] * rounds]:
            a = half_e4m3(fit if reach is None else peak / reach)
            _, sll, sxl = totals(part, weights, [levels[nearest(reciprocal(a) * value, levels)] for value in part])
            error = sxx + a * a * sll - TWO * a * sxl
            if error < least:
                d, least, fit = a, error, sxl / sll if sll > 0 else ZERO
        codes += [nearest(reciprocal(d) * value, levels) for value in part]
        scales.append(float(d))
    return Block(codes, ZERO, scales)


Sum = Callable[[range, np.float32, np.float32], np.float32]


@dataclass
class Pointed:
    """What a codebook search chose: point numbers, signs per weight (True: negative), s per group, d."""

    numbers: list[int]
    negative: list[bool]
    s: list[int]
    d: np.float32
    minus: list[bool] = field(default_factory=list)
    """Per run of vectors: whether delta is subtracted."""


def signs_and_magnitudes(
    x: Sequence[np.float32], w: Sequence[np.float32], even_signs: bool
) -> tuple[list[bool], list[np.float32]]:
    """Which weights are negative, and their magnitudes; with `even_signs` in every eight an even number is, the least w·x² being
    held for the other sign."""
    negative = [bool(value < 0) for value in x]
    y = [abs(value) for value in x]
    if even_signs:
        for start in range(0, len(x), 8):
            if sum(negative[start : start + 8]) % 2:
                least = min(range(start, start + 8), key=lambda i: w[i] * y[i] * y[i])
                negative[least], y[least] = not negative[least], -y[least]
    return negative, y


def codebook(
    x: Sequence[np.float32],
    w: Sequence[np.float32],
    size: int,
    unit: float,
    points: np.ndarray,
    even_signs: bool,
    candidates: Sequence[np.float32],
    rounds: int,
) -> Pointed:
    """w = ±d·(2s+1)·unit·g in groups of `size`; points [n, dim] float32 (scored together, each in the order of its four
    or eight magnitudes)."""
    dim, unit = points.shape[1], f(unit)
    negative, y = signs_and_magnitudes(x, w, even_signs)

    def closest(start: int, inverse: np.float32) -> tuple[int, np.float32, np.float32]:
        cost = np.zeros(len(points), f)
        for j in range(dim):
            cost = cost + w[start + j] * points[:, j] * points[:, j]
        score = cost
        for j in range(dim):
            score = score - (y[start + j] * inverse * (TWO * w[start + j])) * points[:, j]
        number = int(score.argmin())
        return number, cost[number], cost[number] - score[number]

    def fitted(part: range, scale: np.float32) -> tuple[np.float32, np.float32]:
        sll = sxl = ZERO
        for start in part[::dim]:
            _, energy, dot = closest(start, reciprocal(scale))
            sll, sxl = sll + energy, sxl + dot * f(0.5) * scale
        return sll, sxl

    parts = [range(start, start + size) for start in range(0, len(x), size)]
    energies, scales = [], []
    for part in parts:
        peak = sxx = ZERO
        for i in part:
            peak, sxx = max(peak, y[i]), sxx + y[i] * w[i] * y[i]
        a = gain = ZERO
        for reach in candidates:
            sll, sxl = fitted(part, peak / reach if peak > TINY else ZERO)
            if sxl / sll * sxl > gain:
                a, gain = sxl / sll, sxl / sll * sxl
        energies.append(sxx)
        scales.append(a)
    d = half(max(scales) / (unit * f(31)))
    best = (HUGE, d, [ZERO] * len(parts))
    for _ in range(rounds):
        chosen = []
        total = aa = ax = ZERO
        for g, part in enumerate(parts):
            own = np.rint((scales[g] * (ONE / (d * unit) if d > 0 else ZERO) - ONE) * f(0.5))
            options = []
            for move in (0, 1, -1):
                s = clamp(own + f(move), ZERO, f(15))
                a = d * unit * (TWO * s + ONE)
                sll, sxl = fitted(part, a)
                options.append((energies[g] + a * a * sll - TWO * a * sxl, s, sll, sxl))
            error, s, sll, sxl = min(options, key=lambda option: option[0])
            odd = TWO * s + ONE
            chosen.append(s)
            total, aa, ax = total + error, aa + odd * odd * sll, ax + odd * sxl
        if total < best[0]:
            best = (total, d, chosen)
        scales = [d * unit * (TWO * s + ONE) for s in chosen]
        new_d = half(ax / (aa * unit))
        d = new_d if ZERO < new_d <= LARGEST else d
    _, d, chosen = best
    numbers = []
    for part, s in zip(parts, chosen, strict=True):
        numbers += [closest(start, reciprocal(d * unit * (TWO * s + ONE)))[0] for start in part[::dim]]
    return Pointed(numbers, negative, [int(s) for s in chosen], d)


def eights(
    x: Sequence[np.float32],
    w: Sequence[np.float32],
    size: int,
    unit: float,
    top: int,
    points: np.ndarray,
    delta: float,
    run: int,
    ladder: Sequence[np.float32],
    multiples: Sequence[np.float32],
    rounds: int,
) -> Pointed:
    """w = d·(2s+1)·unit·(g ± delta) in groups of `size`, a sign of delta for each `run` of vectors; points [n, 8] float32 (their
    sums are made together)."""
    unit, delta, top = f(unit), f(delta), f(top)
    families = [np.flatnonzero((points[:, 4:] == last).all(axis=1)) for last in np.unique(points[:, :3:-1], axis=0)[:, ::-1]]

    def half_sum(values: np.ndarray) -> np.ndarray:
        """(0 + 1) + (2 + 3) of values [n, 4]."""
        return (values[:, 0] + values[:, 1]) + (values[:, 2] + values[:, 3])

    def closest(vector: int, scale: np.float32, shift: np.float32) -> tuple[int, np.float32, np.float32]:
        """Point, its sum and its Σwl²."""
        part = slice(8 * vector, 8 * vector + 8)
        weight, level = np.array(w[part], f), points + shift
        terms = weight * level * (level - np.array(x[part], f) * (reciprocal(scale) * TWO))
        energies = weight * level * level
        first, last = half_sum(terms[:, :4]), half_sum(terms[:, 4:])
        best, number = HUGE, 0
        for family in families:
            least = int(family[first[family].argmin()])
            if last[least] + first[least] < best:
                best, number = last[least] + first[least], least
        energy = half_sum(energies[[number], :4])[0] + half_sum(energies[[number], 4:])[0]
        return number, best, energy

    def rounded(vectors: range, scale: np.float32, shift: np.float32) -> np.float32:
        """The least sum with a level for every weight."""
        total, levels = ZERO, np.unique(points) + shift
        for i in range(8 * vectors[0], 8 * vectors[-1] + 8):
            total += min(level * (level - x[i] * (reciprocal(scale) * TWO)) for level in levels) * w[i]
        return total

    def pointed(vectors: range, scale: np.float32, shift: np.float32) -> np.float32:
        """The least sum with points."""
        total = ZERO
        for vector in vectors:
            total += closest(vector, scale, shift)[1]
        return total

    def best_of(
        scales: Sequence[np.float32], parts: list[range], start: tuple[np.float32, list[np.float32]], sum_of: Sum
    ) -> tuple[np.float32, list[np.float32]]:
        """The scale of least error, with the shifts of its runs."""
        best, least = start, ZERO
        for scale in scales:
            trial, total = [], ZERO
            for part in parts:
                plus = sum_of(part, scale, delta)
                minus = sum_of(part, scale, -delta) if delta > 0 else HUGE
                trial.append(-delta if minus < plus else delta)
                total += min(plus, minus)
            if scale * scale * total < least:
                best, least = (scale, trial), scale * scale * total
        return best

    groups = [range(start // 8, (start + size) // 8) for start in range(0, len(x), size)]
    runs = [[range(r, r + run) for r in group[::run]] for group in groups]
    shifts: list[list[np.float32]] = []
    scales, total_energy = [], ZERO
    for group, parts in zip(groups, runs, strict=True):
        inside = range(group[0] * 8, group[-1] * 8 + 8)
        peak = max(abs(x[i]) for i in inside)
        sxx = ZERO
        for i in inside:
            sxx += x[i] * w[i] * x[i]
        total_energy += sxx
        found = (ZERO, [delta] * len(parts))
        found = best_of([peak / reach if peak > TINY else ZERO for reach in ladder], parts, found, rounded)
        a, kept = best_of([found[0] * multiple for multiple in multiples], parts, found, pointed)
        scales.append(a)
        shifts.append(kept)
    d = half(max(scales) / (unit * (TWO * top + ONE)))
    best: tuple[np.float32, np.float32, list[np.float32], list[int]] = (HUGE, d, [], [])
    for _ in range(rounds):
        chosen, numbers = [], []
        aa = ax = ZERO
        for parts, kept, own_scale in zip(runs, shifts, scales, strict=True):
            own = np.rint((own_scale * (ONE / (d * unit) if d > 0 else ZERO) - ONE) * f(0.5))
            options = []
            for move in (0, 1, -1):
                s = clamp(own + f(move), ZERO, top)
                a = d * unit * (TWO * s + ONE)
                total = ZERO
                for part, shift in zip(parts, kept, strict=True):
                    total += (pointed if len(multiples) else rounded)(part, a, shift)
                options.append((a * a * total, s))
            s = min(options, key=lambda option: option[0])[1]
            odd = TWO * s + ONE
            a = d * unit * odd
            sll = sxl = ZERO
            for part, shift in zip(parts, kept, strict=True):
                for vector in part:
                    number, score, energy = closest(vector, a, shift)
                    numbers.append(number)
                    sll, sxl = sll + energy, sxl + (energy - score) * f(0.5) * a
            chosen.append(s)
            aa, ax = aa + odd * odd * sll, ax + odd * sxl
        scales = [d * unit * (TWO * s + ONE) for s in chosen]
        new_d = half(ax / (aa * unit))
        d = new_d if ZERO < new_d <= LARGEST else d
        a = d * unit
        total = total_energy + a * a * aa - TWO * a * ax
        if total < best[0]:
            best = (total, d, chosen, numbers)
    _, d, chosen, numbers = best
    minus = [bool(shift < 0) for kept in shifts for shift in kept]
    return Pointed(numbers, [], [int(s) for s in chosen], d, minus)
