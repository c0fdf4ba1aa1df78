"""Types that share codes among weights (`formats._codebook`, `formats._eights`) on tensors, for any device.

The same arithmetic in the same order as the kernels', as in `device.search`: the bytes are theirs where a device's float32 is
IEEE's. Lanes are [stack, groups or vectors, rows], of all columns under way; what is looked for among all points is looked for in
a few rows at a time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xent_quant.device.found import Chosen, folded, gains, half, inverted, inverted_signed, joined, over, spread, stretched
from xent_quant.device.search import MAX_LANES, MOVES
from xent_quant.formats import _codebook, _eights
from xent_quant.formats._codebook import CodebookFormat
from xent_quant.formats._eights import HALVES, EightsFormat, ShiftedFormat
from xent_quant.formats._search import HUGE, LARGEST, TINY
from xent_quant.formats._vectors import VectorFormat
from xent_quant.formats.base import U8, Effort

TOP, TOP_SHIFTED = 15, 7


@dataclass(frozen=True)
class Points(Chosen[VectorFormat]):
    """`numbers` [stack, vectors of a point, rows] int32; `flags` bool, negative signs [stack, columns, rows] or whether delta is
    subtracted [stack, runs, rows]; `s` [stack, groups, rows] and `d` [stack, blocks, rows] float32."""

    kind: VectorFormat
    numbers: Tensor
    flags: Tensor
    s: Tensor
    d: Tensor

    def parts(self) -> tuple[Tensor, ...]:
        """See `Stacked`."""
        return self.numbers, self.flags, self.s, self.d

    def of(self, parts: Sequence[Tensor]) -> "Points":
        """See `Stacked`."""
        return Points(self.kind, *parts)

    def scale(self) -> Tensor:
        """Of every group."""
        d = self.d * float(self.kind.unit) if isinstance(self.kind, CodebookFormat) else self.d
        return spread(d, self.s.shape[1] // d.shape[1]) * (2 * self.s + 1)

    def values(self) -> Tensor:
        """See `Chosen`."""
        return _values(self.kind, self.numbers, self.flags, spread(self.scale(), self.kind.group_size))

    def stored(self) -> tuple[Tensor, ...]:
        """See `Chosen`."""
        return self.parts()

    @staticmethod
    def pack(kind: VectorFormat, stored: Sequence[NDArray[Any]], out: U8) -> None:
        """See `Chosen`."""
        blocks = out.reshape(-1, kind.block_bytes)
        numbers, flags, s, d = (each.reshape(len(blocks), -1) for each in stored)
        numbers, s = numbers.astype(np.uint16), s.astype(np.uint8)
        if isinstance(kind, ShiftedFormat):
            kind.store(blocks, _eights.ShiftedPoints(numbers, flags.astype(np.uint8), s, d))
        else:
            kind.store(blocks, _codebook.Points(numbers, np.packbits(flags > 0, axis=1, bitorder="little"), s, d))


@lru_cache(maxsize=32)
def _points(kind: VectorFormat, device: torch.device) -> Tensor:
    """A type's points [n, dim], there once: each copy is waited for."""
    return torch.from_numpy(kind.points).to(device)


def _values(kind: VectorFormat, numbers: Tensor, flags: Tensor, scale: Tensor) -> Tensor:
    """What numbers and flags of some vectors stand for, [stack, columns, rows]; `scale` of every column, or of all."""
    levels = _points(kind, numbers.device)[numbers.int()].movedim(-1, 2).flatten(1, 2)
    if isinstance(kind, ShiftedFormat):
        delta = float(kind.delta)
        levels += spread(torch.where(flags, -delta, delta), 8 * kind.run)[:, : levels.shape[1]]
        return levels.mul_(scale)
    levels *= scale
    return torch.where(flags, -levels, levels)


def searches(kind: object) -> bool:
    """Whether a type's points are searched for here."""
    return isinstance(kind, CodebookFormat | ShiftedFormat)


def search(kind: VectorFormat, weights: Tensor, weighting: Tensor, effort: Effort) -> Points:
    """Points for weights [stack, columns, rows] with weighting [stack, columns], as of `formats.base.weighting`, both float32.
    Scales leave weights as large as they are (`formats._gain`). Holds some ten times MAX_LANES floats besides."""
    step = max(1, MAX_LANES // (weights[:, : kind.block_size].numel() * 4)) * kind.block_size
    found = []
    for start in range(0, weights.shape[1], step):
        x, w = weights[:, start : start + step], weighting[:, start : start + step]
        made = _searched(kind, x, w, effort)
        gain = gains(x, w, made.values(), kind.block_size, kind.group_size)
        found.append(replace(made, d=stretched(made.d, gain)))
    return joined(found)


def _searched(kind: VectorFormat, x: Tensor, w: Tensor, effort: Effort) -> Points:
    if isinstance(kind, ShiftedFormat):
        numbers, minus, s, d = _eight(kind, x, w, effort)
        return Points(kind, numbers, minus, s, d)
    assert isinstance(kind, CodebookFormat)
    negative, magnitudes = x < 0, x.abs()
    if kind.even_signs:
        _make_even(negative, magnitudes, w)
    if isinstance(kind, EightsFormat):
        numbers, _, s, d = _eight(kind, magnitudes, w, effort)
    else:
        numbers, s, d = _four(kind, magnitudes, w, effort)
    return Points(kind, numbers, negative, s, d)


def _make_even(negative: Tensor, magnitudes: Tensor, w: Tensor) -> None:
    """See `formats._codebook._make_even`; changes the first two, [stack, columns, rows]."""
    signs, values = (torch.unflatten(each, 1, (-1, 8)) for each in (negative, magnitudes))
    odd = (signs.sum(2) & 1) > 0
    least = (torch.unflatten(w, 1, (-1, 8))[..., None] * values * values).argmin(2)
    turned = torch.zeros_like(signs).scatter_(2, least[:, :, None], odd[:, :, None])
    signs ^= turned
    values.copy_(torch.where(turned, -values, values))


def _few_rows(work: "Callable[[slice], tuple[Tensor, ...]]", rows: int, floats: int) -> tuple[Tensor, ...]:
    """What `work` makes of slices of rows, their last axis, with so many floats to a row."""
    step = max(1, MAX_LANES // floats)
    found = [work(slice(start, start + step)) for start in range(0, rows, step)]
    return found[0] if len(found) == 1 else tuple(torch.cat(each, -1) for each in zip(*found, strict=True))


def _costs(w: Tensor, points: Tensor) -> Tensor:
    """Σwg² of points [n, dim] for w [dim, …]: [n, …]."""
    apart = (-1, *(1,) * (w.dim() - 1))
    total = torch.zeros((), device=w.device)
    for weight, level in zip(w, points.T, strict=True):
        total = total + weight * level.view(apart) * level.view(apart)
    return total


def _closest(x: Tensor, w: Tensor, points: Tensor, costs: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers of the points [n, dim] of least Σw(g² − 2xg), and that; x [dim, …, rows], w [dim, …, 1], costs [n, …, 1]."""
    apart = (-1, *(1,) * (w.dim() - 1))
    levels, twice = [level.view(apart) for level in points.T], 2 * w

    def work(part: slice) -> tuple[Tensor, ...]:
        a = x[..., part] * twice
        score = costs - a[0] * levels[0]
        for each, level in zip(a[1:], levels[1:], strict=True):
            score -= each * level
        least, number = score.min(0)
        return number, least

    number, least = _few_rows(work, x.shape[-1], len(points) * x[0, ..., 0].numel())
    return number, least


def _at(table: Tensor, index: Tensor) -> Tensor:
    """table [n, …, 1] at index […, rows]."""
    found: Tensor = table.expand(-1, *index.shape).gather(0, index[None])[0]
    return found


def _apart(columns: Tensor, size: int) -> Tensor:
    """[stack, columns, …] to [size, stack, columns / size, …]."""
    return torch.unflatten(columns, 1, (-1, size)).movedim(2, 0)


def _four(kind: CodebookFormat, x: Tensor, w: Tensor, effort: Effort) -> tuple[Tensor, Tensor, Tensor]:
    """See `formats._codebook.codebook`: numbers, s and d."""
    ladder, rounds = getattr(kind.efforts, effort)
    size, unit, groups = kind.group_size, float(kind.unit), kind.block_size // kind.group_size
    points = _points(kind, x.device)
    dim = points.shape[1]
    vectors, w = _apart(x, dim), w[..., None]
    by_vector = _apart(w, dim)
    costs = _costs(by_vector, points)

    def closest(scale: Tensor) -> tuple[Tensor, Tensor]:
        return _closest(vectors * spread(inverted(scale), size // dim), by_vector, points, costs)

    def sums(scale: Tensor) -> tuple[Tensor, Tensor]:
        number, least = closest(scale)
        energy = _at(costs, number)
        twice = (energy - least) * 0.5 * spread(scale, size // dim)
        return folded(energy, size // dim), folded(twice, size // dim)

    peak, sxx = _apart(x, size).amax(0).clamp(min=0), torch.zeros((), device=x.device)
    for value, weight in zip(_apart(x, size), _apart(w, size), strict=True):
        sxx = sxx + value * weight * value
    scale, gain = torch.zeros_like(peak), torch.zeros_like(peak)
    for rung in ladder.tolist():
        sll, sxl = sums(torch.where(peak > float(TINY), over(peak, rung), 0.0))
        tried = sxl / sll
        better = gain < tried * sxl
        scale, gain = torch.where(better, tried, scale), torch.where(better, tried * sxl, gain)
    d, best_d, least, best_s = _start(scale, unit, TOP, groups)
    for _ in range(rounds):
        wide = spread(d, groups) * unit
        found = [torch.zeros_like(sxx), torch.full_like(sxx, float(HUGE)), *(torch.zeros_like(sxx),) * 2]
        for tried in _moved(scale, wide, TOP):
            a = wide * (2 * tried + 1)
            sll, sxl = sums(a)
            error = sxx + a * a * sll - 2 * a * sxl
            found = _better(error < found[1], (tried, error, sll, sxl), found)
        s, error, sll, sxl = found
        odd = 2 * s + 1
        scale = wide * odd
        total, aa, ax = (folded(each, groups) for each in (error, odd * odd * sll, odd * sxl))
        better = total < least
        best_s = torch.where(spread(better, groups), s, best_s)
        best_d, least = torch.where(better, d, best_d), torch.where(better, total, least)
        d = _fitted(ax, aa, unit, d)
    numbers, _ = closest(spread(best_d, groups) * unit * (2 * best_s + 1))
    return numbers.int(), best_s, best_d


def _start(scale: Tensor, unit: float, top: int, groups: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """d of the largest scale, the best so far, its error, and s."""
    largest = torch.unflatten(scale, 1, (-1, groups)).amax(2).clamp(min=0)
    d = half(over(largest, float(np.float32(unit) * np.float32(2 * top + 1))))
    return d, d, torch.full_like(d, float(HUGE)), torch.zeros_like(scale)


def _moved(scale: Tensor, wide: Tensor, top: int) -> list[Tensor]:
    """The s nearest to every group's own scale, and both neighbours, for d · unit."""
    own = ((scale * inverted(wide) - 1) * 0.5).round()
    return [(own + move).clamp(max=top).clamp(min=0) for move in MOVES]


def _fitted(ax: Tensor, aa: Tensor, unit: float, d: Tensor) -> Tensor:
    new = half(ax / (aa * unit))
    return torch.where((new > 0) & ~(new > float(LARGEST)), new, d)


def _better(better: Tensor, new: Sequence[Tensor], old: Sequence[Tensor]) -> list[Tensor]:
    return [torch.where(better, a, b) for a, b in zip(new, old, strict=True)]


@dataclass(frozen=True)
class _Families:
    """See `formats._eights.Families`: `begin` [82], `firsts` [points]. `members` [81, most] are the firsts of each family, 81
    where it has no more, and `filled` are those that have any. `layers[m]` are the firsts of each one's m-th member, of the
    largest families first; `natural` says where each is there."""

    begin: Tensor
    firsts: Tensor
    members: Tensor
    filled: Tensor
    natural: Tensor
    layers: tuple[Tensor, ...]

    @classmethod
    @lru_cache(maxsize=32)
    def of(cls, kind: "EightsFormat | ShiftedFormat", device: torch.device) -> "_Families":
        begin, firsts = kind.families.begin.astype(np.int64), kind.families.firsts
        sizes = np.diff(begin)
        members = np.full((HALVES, sizes.max()), HALVES)
        for family, size in enumerate(sizes):
            members[family, :size] = firsts[begin[family] : begin[family] + size]
        filled, order = np.flatnonzero(sizes), np.argsort(-sizes, kind="stable")
        layers = [members[order[sizes[order] > number], number] for number in range(sizes.max())]
        place = np.argsort(order)[filled]
        one = [torch.from_numpy(each).to(device) for each in (begin, firsts, members, filled, place)]
        return cls(one[0], one[1], one[2], one[3], one[4], tuple(torch.from_numpy(each).to(device) for each in layers))


def _half_sums(x: Tensor, w: Tensor, twice: Tensor, levels: Tensor) -> Tensor:
    """See `_eights.half_sums`, of x and w [8, …] and levels [3, …]: of both halves, [2, 81, …]."""
    singles = (w[:, None] * levels) * (levels - (x * twice)[:, None])  # [8, 3, …]
    pairs = (singles[0::2, None] + singles[1::2, :, None]).flatten(1, 2)  # [4, 9, …]
    return (pairs[0::2, None] + pairs[1::2, :, None]).flatten(1, 2)


class _Eights:
    """The sums of one part of a search: `x` [stack, columns, rows], `w` [stack, columns]."""

    def __init__(self, kind: "EightsFormat | ShiftedFormat", x: Tensor, w: Tensor) -> None:
        shifted = isinstance(kind, ShiftedFormat)
        self.delta = float(kind.delta) if isinstance(kind, ShiftedFormat) else 0.0
        self.run = kind.run if isinstance(kind, ShiftedFormat) else kind.group_size // 8
        self.size = kind.group_size
        self.families = _Families.of(kind, x.device)
        self._levels = [float(level) for level in kind.families.levels]
        w = w[..., None]
        self._vectors, self._by_vector = _apart(x, 8), _apart(w, 8)
        self._runs, self._by_run = _apart(x, 8 * self.run), _apart(w, 8 * self.run)
        self._signs = (self.delta, -self.delta) if shifted else (0.0,)

    def shifts(self) -> Tensor:
        """Plus delta for every run."""
        return torch.full_like(self._runs[0], self.delta)

    def _per_group(self, of_runs: Tensor) -> Tensor:
        return folded(of_runs, self.size // 8 // self.run)

    def _chosen(self, of_shift: "Callable[[Tensor], Tensor]", shifts: Tensor | None) -> tuple[Tensor, Tensor]:
        """(sums of groups, shifts), with the better sign of delta for every run where none is given."""
        if shifts is not None:
            return self._per_group(of_shift(shifts)), shifts
        plus = self.shifts()
        least = of_shift(plus)
        if self.delta:
            minus = of_shift(-plus)
            better = minus < least
            least, plus = torch.where(better, minus, least), torch.where(better, -plus, plus)
        return self._per_group(least), plus

    def rough(self, scale: Tensor, shifts: Tensor | None) -> tuple[Tensor, Tensor]:
        """See `_eights.rough_least`."""
        twice = spread(inverted(scale) * 2, self.size // 8 // self.run)

        def rounded(shift: Tensor) -> Tensor:
            low, middle, high = (shift + level for level in self._levels)
            total, t = torch.zeros_like(shift), self._runs * twice
            nearest = torch.minimum(torch.minimum(low * (low - t), middle * (middle - t)), high * (high - t))
            for each in nearest.mul_(self._by_run):
                total += each
            return total

        return self._chosen(rounded, shifts)

    def least(self, scale: Tensor, shifts: Tensor | None) -> tuple[Tensor, Tensor]:
        """See `_eights.group_least`."""
        return self._chosen(lambda shift: folded(self._find(scale, shift, points=False)[0], self.run), shifts)

    def sums(self, scale: Tensor, shifts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Numbers of points, and what `_eights.group_sums` returns."""
        least, numbers, energy = self._find(scale, shifts, points=True)
        per = self.size // 8
        return numbers.int(), folded(energy, per), folded((energy - least) * 0.5 * spread(scale, per), per)

    def _find(self, scale: Tensor, shifts: Tensor, *, points: bool) -> tuple[Tensor, ...]:
        """The least sum of every vector; and if asked for its point, and that one's energy."""
        known, twice, shifts = self.families, spread(inverted(scale), self.size // 8) * 2, spread(shifts, self.run)
        energies = [self._energies(sign) for sign in self._signs] if points else []

        def work(part: slice) -> tuple[Tensor, ...]:
            shift = shifts[..., part]
            levels = torch.stack([shift + level for level in self._levels])
            first, last = _half_sums(self._vectors[..., part], self._by_vector, twice[..., part], levels)
            best = first.index_select(0, known.layers[0])
            for layer in known.layers[1:]:
                here = best[: len(layer)]
                torch.minimum(here, first.index_select(0, layer), out=here)
            scores = last.index_select(0, known.filled) + best.index_select(0, known.natural)
            least, family = scores.min(0)
            if not points:
                return (least,)
            family = known.filled[family]
            first = torch.cat([first, torch.full_like(first[:1], float(HUGE))])
            number = known.begin[family] + first.gather(0, known.members[family].movedim(-1, 0)).argmin(0)
            energy = [_at(low, known.firsts[number]) + _at(high, family) for low, high in energies]
            return least, number, energy[0] if len(energy) == 1 else torch.where(shift < 0, energy[1], energy[0])

        return _few_rows(work, shifts.shape[-1], HALVES * shifts[..., 0].numel())

    def _energies(self, shift: float) -> tuple[Tensor, Tensor]:
        """See `_eights.energies_of`: of both halves, [81, stack, vectors, 1]."""
        shifts = [float(np.float32(level) + np.float32(shift)) for level in self._levels]
        singles = [torch.stack([weight * level * level for level in shifts]) for weight in self._by_vector]

        def joint(a: Tensor, b: Tensor, c: Tensor, e: Tensor) -> Tensor:
            pairs = [(one[None] + other[:, None]).flatten(0, 1) for one, other in ((a, b), (c, e))]
            return (pairs[0][None] + pairs[1][:, None]).flatten(0, 1)

        return joint(*singles[:4]), joint(*singles[4:])


def _eight(kind: "EightsFormat | ShiftedFormat", x: Tensor, w: Tensor, effort: Effort) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `formats._eights.eights`: numbers, whether delta is subtracted, s and d."""
    fine, rounds = getattr(kind.efforts, effort)
    sums, groups = _Eights(kind, x, w), kind.block_size // kind.group_size
    unit, top = (1.0, TOP_SHIFTED) if isinstance(kind, ShiftedFormat) else (float(kind.unit), TOP)
    runs = kind.group_size // 8 // sums.run
    grouped, sxx = _apart(x, kind.group_size), torch.zeros((), device=x.device)
    for value, weight in zip(grouped, _apart(w[..., None], kind.group_size), strict=True):
        sxx = sxx + value * weight * value
    peak = grouped.abs().amax(0)
    scale, least, shifts = torch.zeros_like(peak), torch.zeros_like(peak), sums.shifts()

    def attempt(tried: Tensor, measure: "Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]") -> None:
        nonlocal scale, least, shifts
        total, signs = measure(tried, None)
        error = tried * tried * total
        better = error < least
        shifts = torch.where(spread(better, runs), signs, shifts)
        scale, least = torch.where(better, tried, scale), torch.where(better, error, least)

    for rung in kind.ladder.tolist():
        attempt(torch.where(peak > float(TINY), over(peak, rung), 0.0), sums.rough)
    rough, least = scale, torch.zeros_like(least)
    for multiple in fine.tolist():
        attempt(rough * multiple, sums.least)
    d, best_d, least, best_s = _start(scale, unit, top, groups)
    numbers = torch.zeros_like(x[:, ::8], dtype=torch.int32)
    energy = folded(sxx, groups)
    for _ in range(rounds):
        wide = spread(d, groups) * unit
        found = [torch.zeros_like(sxx), torch.full_like(sxx, float(HUGE))]
        for tried in _moved(scale, wide, top):
            a = wide * (2 * tried + 1)
            total, _ = (sums.least if len(fine) else sums.rough)(a, shifts)
            error = a * a * total
            found = _better(error < found[1], (tried, error), found)
        odd = 2 * found[0] + 1
        scale = wide * odd
        new, sll, sxl = sums.sums(scale, shifts)
        aa, ax = folded(odd * odd * sll, groups), folded(odd * sxl, groups)
        d = _fitted(ax, aa, unit, d)
        a = d * unit
        total = energy + a * a * aa - 2 * a * ax
        better = total < least
        best_s = torch.where(spread(better, groups), found[0], best_s)
        numbers = torch.where(spread(better, 32), new, numbers)
        best_d, least = torch.where(better, d, best_d), torch.where(better, total, least)
    return numbers, shifts < 0, best_s, best_d


def size(kind: VectorFormat) -> int:
    """Weights of a vector."""
    even = isinstance(kind, CodebookFormat) and kind.even_signs
    return 8 if even else kind.points.shape[1]


@dataclass(frozen=True)
class Choice:
    """For one vector of all rows: the weights [stack, size, rows] that it gives, and `numbers` and `flags` of it."""

    values: Tensor
    numbers: Tensor
    flags: Tensor


class Vectors:
    """See `formats._vectors.Vectors`: `found` is changed in place, its scales stay."""

    def __init__(self, found: Points, weighting: Tensor) -> None:
        """`weighting` [stack, columns] is of what vectors are chosen by."""
        self.found = found
        kind = found.kind
        self._points = _points(kind, found.d.device)
        self._scale = found.scale()
        self.size = size(kind)
        self._weighting = weighting
        self._by_point = _apart(weighting[..., None], self._points.shape[1])
        self._costs = _costs(self._by_point, self._points)

    def choose(self, vector: int, targets: Tensor) -> Choice:
        """The points nearest to targets [stack, size, rows]; nothing is changed."""
        kind = self.found.kind
        group = vector * self.size // kind.group_size
        scale = self._scale[:, group : group + 1]
        levels = targets * inverted_signed(scale)
        if isinstance(kind, ShiftedFormat):
            return self._shifted(kind, vector, levels, scale)
        assert isinstance(kind, CodebookFormat)
        negative, magnitudes = targets < 0, targets.abs() * inverted_signed(scale)
        if kind.even_signs:
            _make_even(negative, magnitudes, self._weighting[:, self._own(vector, self.size)])
        numbers, _ = self._nearest(vector, magnitudes)
        return Choice(_values(kind, numbers, negative, scale), numbers, negative)

    def _shifted(self, kind: ShiftedFormat, vector: int, levels: Tensor, scale: Tensor) -> Choice:
        delta = float(kind.delta)
        if kind.run == 1:
            weights = self._weighting[:, self._own(vector, self.size), None]
            tries = [(self._nearest(vector, levels - shift), levels - shift) for shift in (delta, -delta)]
            losses = [loss + (x.square() * weights).sum(1, keepdim=True) for (_, loss), x in tries]
            minus = losses[1] < losses[0]
            numbers = torch.where(minus, tries[1][0][0], tries[0][0][0])
        else:
            run = vector // kind.run
            minus = self.found.flags[:, run : run + 1]
            numbers, _ = self._nearest(vector, levels - torch.where(minus, -delta, delta))
        return Choice(_values(kind, numbers, minus, scale), numbers, minus)

    def _nearest(self, vector: int, values: Tensor) -> tuple[Tensor, Tensor]:
        """See `formats._vectors.chosen`: [stack, points of a vector, rows] both."""
        dim, points = self._points.shape[1], self._own(vector, self.size // self._points.shape[1])
        return _closest(_apart(values, dim), self._by_point[:, :, points], self._points, self._costs[:, :, points])

    def keep(self, vector: int, choice: Choice, rows: Tensor | None = None) -> None:
        """Take over a choice, in the rows of a mask [stack, rows] if there is one."""
        kind = self.found.kind
        run = vector // kind.run if isinstance(kind, ShiftedFormat) else None
        flags = self._own(vector, self.size) if run is None else slice(run, run + 1)
        points = self._own(vector, self.size // self._points.shape[1])
        for own, new in ((self.found.numbers[:, points], choice.numbers.int()), (self.found.flags[:, flags], choice.flags)):
            own.copy_(new if rows is None else torch.where(rows[:, None], new, own))

    @staticmethod
    def _own(vector: int, size: int) -> slice:
        return slice(vector * size, (vector + 1) * size)
