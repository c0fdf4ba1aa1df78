"""The searches of `formats._search` and `formats.int_group` on tensors, for any device.

The same arithmetic in the same order: every operation is one of torch's, rounded by itself, and sums go over a group's weights
one by one, so that where a device's float32 is IEEE's the scales are, bit for bit, those of the numba kernels. What they do
sixteen rows at a time is done here for all groups of all rows at once, and for all candidates: lanes are the trailing axes.

Weights lie column after column: [stack, columns, rows], `stack` weights of one shape that have importances of their own. In a
search that is x [group_size, stack, groups, rows] beside w [group_size, stack, groups, 1]; `groups` counts those of a whole row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xent_quant.device.found import (
    Chosen,
    Stacked,
    blocks,
    flat,
    folded,
    gains,
    half,
    inverted,
    inverted_signed,
    joined,
    over,
    spread,
    stretched,
)
from xent_quant.formats._codes import AffineFormat, CodedFormat, Found, SearchedFormat, SymmetricFormat, rises
from xent_quant.formats._search import HUGE, LARGEST, TINY
from xent_quant.formats.base import F32, U8, Effort
from xent_quant.formats.int_group import EFFORTS, IntGroup
from xent_quant.formats.mxfp4 import MXFP4Format
from xent_quant.formats.nvfp4 import NVFP4Format
from xent_quant.formats.prescaled import InMemory

MAX_LANES = 1 << 23
"""Floats of one intermediate result, at most (32 MiB), unless a single block of all rows has more."""

HELD = 12
"""Such results at a time, about."""


@dataclass(frozen=True)
class Scales(Stacked):
    """What a search chose. `inner` [stack, blocks, n, rows] and `outer` [stack, blocks, m, rows] float32 are those of
    `formats._codes.Found`, integers as floats; weight = scale · level + offset with both [stack, groups, rows]."""

    inner: Tensor
    outer: Tensor
    scale: Tensor
    offset: Tensor

    def parts(self) -> tuple[Tensor, ...]:
        """See `Stacked`."""
        return self.inner, self.outer, self.scale, self.offset

    def of(self, parts: Sequence[Tensor]) -> "Scales":
        """See `Stacked`."""
        return Scales(*parts)


@dataclass(frozen=True)
class Coded(Chosen[CodedFormat]):
    """`codes` [stack, columns, rows] uint8, indices into the type's levels, and their scales."""

    kind: CodedFormat
    codes: Tensor
    scales: Scales

    def parts(self) -> tuple[Tensor, ...]:
        """See `Stacked`."""
        return self.codes, *self.scales.parts()

    def of(self, parts: Sequence[Tensor]) -> "Coded":
        """See `Stacked`."""
        return Coded(self.kind, parts[0], Scales(*parts[1:]))

    def values(self) -> Tensor:
        """See `Chosen`."""
        return values(self.kind, self.codes, self.scales)

    def stored(self) -> tuple[Tensor, ...]:
        """See `Chosen`."""
        return self.codes, self.scales.inner, self.scales.outer

    @classmethod
    def read(cls, kind: InMemory, packed: Sequence[U8], device: torch.device) -> "Coded":
        """What packed rows [rows, row_bytes] hold, one for each weight of a stack."""
        found = [(torch.from_numpy(each.T) for each in (kind.codes(rows), kind.grid(rows).scale)) for rows in packed]
        codes, scale = (torch.stack(each).to(device) for each in zip(*found, strict=True))
        return cls(kind, codes, Scales(scale[:, :, None][:, :, :0], scale[:, :, None], scale, torch.zeros_like(scale)))

    @staticmethod
    def pack(kind: CodedFormat, stored: Sequence[NDArray[Any]], out: U8) -> None:
        """See `Chosen`."""
        codes, inner, outer = stored
        if isinstance(kind, InMemory):
            out[:] = kind.pack(outer.reshape(len(out), -1), codes)
            return
        assert isinstance(kind, SearchedFormat)
        blocks = out.reshape(-1, kind.block_bytes)
        integers = inner.reshape(len(blocks), -1).astype(np.int16).astype(np.uint8)  # negative ones in two's complement
        kind.store_scales(blocks, Found(codes, integers, outer.reshape(len(blocks), -1)))
        kind.store_codes(out, codes)


def searches(kind: object) -> bool:
    """Whether a type's scales are searched for here."""
    return isinstance(kind, AffineFormat | SymmetricFormat | IntGroup)


def search(kind: CodedFormat, weights: Tensor, weighting: Tensor, effort: Effort) -> Scales:
    """Scales for weights [stack, columns, rows] with weighting [stack, columns], as of `formats.base.weighting`, both float32.
    Holds some ten times MAX_LANES floats besides."""
    if isinstance(kind, AffineFormat):
        work: Callable[..., Scales] = _affine
    elif isinstance(kind, MXFP4Format):
        work = _powers
    elif isinstance(kind, NVFP4Format):
        work = _small_floats
    elif isinstance(kind, SymmetricFormat):
        work = _symmetric
    elif isinstance(kind, IntGroup):
        work = _with_zeros
    else:
        raise NotImplementedError(f"{kind.name} is not searched for on a device")
    candidates = getattr(EFFORTS[kind.bits, kind.symmetric] if isinstance(kind, IntGroup) else kind.efforts, effort)[0]
    stack, columns, rows = weights.shape
    lanes = max(len(MOVES), len(candidates)) * stack * rows * (kind.block_size // kind.group_size)
    step = max(1, MAX_LANES // lanes) * kind.block_size
    parts = []
    for start in range(0, columns, step):
        part = slice(start, min(start + step, columns))
        x = weights[:, part].reshape(stack, -1, kind.group_size, rows).permute(2, 0, 1, 3).contiguous()
        w = weighting[:, part].reshape(stack, -1, kind.group_size).permute(2, 0, 1)[..., None].contiguous()
        parts.append(work(kind, x, w, effort))
    return joined(parts)


def encode(kind: CodedFormat, weights: Tensor, scales: Scales) -> Tensor:
    """Codes of weights [stack, columns, rows], uint8 of the same shape: indices into the type's levels, as chosen."""
    x = torch.unflatten(weights, 1, (-1, kind.group_size))  # [stack, groups, group_size, rows]
    scale, offset = scales.scale[:, :, None], scales.offset[:, :, None]
    if isinstance(kind, AffineFormat):
        codes = ((x - offset) * inverted(scale)).round_().clamp_(0, len(kind.levels) - 1)
    elif isinstance(kind, IntGroup):
        z = flat(scales.inner)[:, :, None]
        codes = (x * torch.where(scale.abs() > float(TINY), 1 / scale, 0.0)).round_()
        codes = torch.maximum(torch.minimum(codes, 2**kind.bits - 1 - z), 0 - z) + z
    else:
        assert isinstance(kind, SymmetricFormat)
        if isinstance(kind, MXFP4Format):
            scale = flat(scales.outer)[:, :, None]
        wanted, known, levels = x * inverted_signed(scale), table(kind.searched, weights.device), kind.searched
        if known:
            codes = torch.bucketize(wanted, known[1])
        else:
            codes = wanted.round_().clamp_(float(levels[0]), float(levels[-1])) - float(levels[0])
        codes = codes + kind.unused
    return codes.to(torch.uint8).flatten(1, 2)


def unshrunk(kind: CodedFormat, weights: Tensor, weighting: Tensor, scales: Scales, codes: Tensor | None = None) -> Scales:
    """See `QuantFormat.unshrunk`: for the codes that these scales give, where they are not made yet; shapes as of `search`."""
    if not kind.outer_halves:
        return scales
    groups = kind.block_size // kind.group_size

    found = values(kind, encode(kind, weights, scales) if codes is None else codes, scales)
    gain = gains(weights, weighting, found, kind.block_size, kind.group_size)
    outer = stretched(scales.outer, gain[:, :, None])
    d = [spread(each, groups) for each in outer.unbind(2)]
    if scales.inner.shape[2]:
        integers = torch.unflatten(scales.inner, 2, (-1, groups)).unbind(2)
        d = [each * flat(own) for each, own in zip(d, integers, strict=True)]
    return Scales(scales.inner, outer, d[0], 0 - d[1] if len(d) > 1 else torch.zeros_like(d[0]))


def values(kind: CodedFormat, codes: Tensor, scales: Scales) -> Tensor:
    """What codes [stack, columns, rows] uint8 stand for, float32 of the same shape."""
    levels = torch.unflatten(torch.from_numpy(kind.levels).to(codes.device)[codes.int()], 1, (-1, kind.group_size))
    found: Tensor = (levels * scales.scale[:, :, None] + scales.offset[:, :, None]).flatten(1, 2)
    return found


def table(levels: F32, device: torch.device) -> tuple[Tensor, Tensor] | None:
    """Levels on a device and the middles between them, of which a value at most as large takes the level below; None where levels
    are consecutive integers."""
    steps = rises(levels)
    if not len(steps):
        return None
    return torch.from_numpy(levels).to(device), torch.from_numpy(steps[:, 0].copy()).to(device)


def _sums(x: Tensor, w: Tensor, base: Tensor | None, inverse: Tensor, lowest: Any, highest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """See `_search.sums`; of the lanes of `inverse`, which may have more axes in front. No `base` is 0."""
    sl, sll, sxl = (torch.zeros_like(inverse) for _ in range(3))
    tensors = isinstance(lowest, Tensor)
    for value, weight in zip(x, w, strict=True):
        q = value * inverse if base is None else (value - base) * inverse
        q = q.round_()
        q = torch.maximum(torch.minimum(q, highest), lowest) if tensors else q.clamp_(lowest, highest)
        wq = q * weight
        sl += wq
        sll += q.mul_(wq)
        sxl += wq.mul_(value)
    return sl, sll, sxl


def _table_sums(x: Tensor, w: Tensor, inverse: Tensor, levels: Tensor, middles: Tensor) -> tuple[Tensor, Tensor]:
    """See `_search.table_sums`."""
    sll, sxl = torch.zeros_like(inverse), torch.zeros_like(inverse)
    for value, weight in zip(x, w, strict=True):
        q = levels[torch.bucketize(value * inverse, middles)]
        wq = q * weight
        sll += q.mul_(wq)
        sxl += wq.mul_(value)
    return sll, sxl


def _moments(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `_search.moments`."""
    sw = torch.zeros_like(w[0])
    sx, sxx = torch.zeros_like(x[0]), torch.zeros_like(x[0])
    peak = x[0]
    for value, weight in zip(x, w, strict=True):
        peak = torch.where(peak.abs() < value.abs(), value, peak)
        wx = value * weight
        sw += weight
        sx += wx
        sxx += wx.mul_(value)
    return sw, sx, sxx, x.amin(0), x.amax(0), peak


def _first_largest(lanes: Tensor, groups: int) -> Tensor:
    """The first of a block's groups of largest magnitude."""
    parts = blocks(lanes, groups).unbind(-2)
    found = torch.zeros_like(parts[0])
    for part in parts:
        found = torch.where(found.abs() < part.abs(), part, found)
    return found


MOVES = (0.0, 1.0, -1.0)
"""From the integer scale nearest to a group's own, in the order in which they are tried."""


def _affine(kind: AffineFormat, x: Tensor, w: Tensor, effort: Effort) -> Scales:
    ladder, rounds = getattr(kind.efforts, effort)
    groups = kind.block_size // kind.group_size
    nested, top, scale_top = groups > 1, float(kind.levels[-1]), float(kind.scale_top)
    ladder = torch.from_numpy(ladder).to(x.device)[:, :, None, None, None]  # [candidates, 2, 1, 1, 1]
    sw, sx, sxx, low, high, _ = _moments(x, w)
    if nested:
        low = low.clamp(max=0)
    span = high - low
    scale, offset = torch.zeros_like(span), sx / sw
    if nested:
        offset = offset.clamp(max=0)
    least = sxx + offset * offset * sw - 2 * offset * sx
    inverse = torch.where(span > float(TINY), ladder[:, 0] / span, 0.0)
    sl, sll, sxl = _sums(x, w, low - span * ladder[:, 1], inverse, 0, top)
    determinant = sw * sll - sl * sl
    a = (sw * sxl - sx * sl) / determinant
    b = (sll * sx - sl * sxl) / determinant
    if nested:
        a = torch.where(b > 0, sxl / sll, a)
        b = torch.where(b < 0, b, 0.0)
    error = sxx + a * a * sll + b * b * sw + 2 * (a * b * sl - a * sxl - b * sx)
    error = torch.where((determinant > 0) & (a > 0), error, float(HUGE))
    for one, other, value in zip(error, a, b, strict=True):
        better = one < least
        scale, offset, least = (torch.where(better, *pair) for pair in ((other, scale), (value, offset), (one, least)))
    if nested:
        d = blocks(scale, groups).amax(-2)
        dmin = blocks(-offset, groups).amax(-2).clamp(min=0)
    else:
        d, dmin = scale, -offset
    d, dmin = half(over(d, scale_top)), half(over(dmin, scale_top))
    best_d, best_dmin, least = d, dmin, torch.full_like(d, float(HUGE))
    best_s, best_m = torch.zeros_like(scale), torch.zeros_like(scale)
    for _ in range(rounds):
        wide_d, wide_dmin, inverse_dmin = (spread(each, groups) for each in (d, dmin, inverted(dmin)))
        moves = torch.tensor(MOVES if nested else MOVES[:1], device=x.device)[:, None, None, None]
        s = ((scale * spread(inverted(d), groups)).round() + moves).clamp(max=scale_top).clamp(min=1)
        a = wide_d * s
        inverse = inverted(a)
        m = torch.ones_like(a)
        if nested:
            sl, _, _ = _sums(x, w, offset, inverse, 0, top)
            m = ((a * sl - sx) / sw * inverse_dmin).round().clamp(max=scale_top).clamp(min=0)
        b = 0 - wide_dmin * m
        sl, sll, sxl = _sums(x, w, b, inverse, 0, top)
        error = sxx + a * a * sll + b * b * sw + 2 * (a * b * sl - a * sxl - b * sx)
        # Integer scale 0: all codes zero, the error needs no pass.
        s_g = torch.zeros_like(sx)
        m_g = ((0 - sx / sw) * inverse_dmin).round().clamp(max=scale_top).clamp(min=0)
        b = 0 - wide_dmin * m_g
        error_g = sxx + b * b * sw - 2 * b * sx if nested else torch.full_like(sx, float(HUGE))
        found = [s_g, m_g, error_g, *(torch.zeros_like(sx) for _ in range(3))]
        for tried in zip(s, m, error, sl, sll, sxl, strict=True):
            better = tried[2] < found[2]
            found = [torch.where(better, new, old) for new, old in zip(tried, found, strict=True)]
        s_g, m_g, error_g, sl_g, sll_g, sxl_g = found
        scale, offset = wide_d * s_g, 0 - wide_dmin * m_g
        total, aa, ab, bb, ax, bx = (
            folded(each, groups) for each in (error_g, s_g * s_g * sll_g, s_g * m_g * sl_g, m_g * m_g * sw, s_g * sxl_g, m_g * sx)
        )
        better = total < least
        wide = spread(better, groups)
        best_s, best_m = torch.where(wide, s_g, best_s), torch.where(wide, m_g, best_m)
        best_d, best_dmin = torch.where(better, d, best_d), torch.where(better, dmin, best_dmin)
        least = torch.where(better, total, least)
        determinant = aa * bb - ab * ab
        solved = determinant > 0
        new_d = half(torch.where(solved, (ax * bb - bx * ab) / determinant, ax / aa))
        new_dmin = half(torch.where(solved, (ax * ab - bx * aa) / determinant, dmin))
        good = (new_d > 0) & ~(torch.where(new_d > new_dmin.abs(), new_d, new_dmin.abs()) > float(LARGEST))
        if nested:
            good &= ~(new_dmin < 0)
        d, dmin = torch.where(good, new_d, d), torch.where(good, new_dmin, dmin)
    scale = spread(best_d, groups) * best_s
    offset = 0 - spread(best_dmin, groups) * best_m
    inner = torch.cat([blocks(best_s, groups), blocks(best_m, groups)], -2) if nested else best_s[:, :, None][:, :, :0]
    return Scales(inner, torch.stack([best_d, best_dmin], -2), scale, offset)


def _symmetric(kind: SymmetricFormat, x: Tensor, w: Tensor, effort: Effort) -> Scales:
    ladder, rounds = getattr(kind.efforts, effort)
    groups = kind.block_size // kind.group_size
    nested, levels, low = groups > 1, kind.searched, float(kind.scale_low)
    known = table(kind.searched, x.device)

    def sums(inverse: Tensor) -> tuple[Tensor, Tensor]:
        if known:
            return _table_sums(x, w, inverse, *known)
        return _sums(x, w, None, inverse, float(levels[0]), float(levels[-1]))[1:]

    _, _, sxx, _, _, peak = _moments(x, w)
    inverse = torch.where(peak.abs() > float(TINY), torch.from_numpy(ladder).to(x.device)[:, None, None, None] / peak, 0.0)
    sll, sxl = sums(inverse)
    a = torch.where(sll > 0, sxl / sll, 0.0)
    scale, gain = torch.zeros_like(peak), torch.zeros_like(peak)
    for one, other in zip(a, sxl, strict=True):
        better = gain < one * other
        scale, gain = torch.where(better, one, scale), torch.where(better, one * other, gain)
    d = _first_largest(scale, groups)
    d = half(over(d, low)) if nested else half(d)
    best_d, least, best_s = d, torch.full_like(d, float(HUGE)), torch.zeros_like(scale)
    for _ in range(rounds):
        wide_d = spread(d, groups)
        if nested:
            moves = torch.tensor(MOVES, device=x.device)[:, None, None, None]
            s = ((scale * spread(inverted_signed(d), groups)).round() + moves).clamp(max=-low - 1).clamp(min=low)
        else:
            s = torch.ones_like(scale)[None]
        a = wide_d * s
        sll, sxl = sums(inverted_signed(a))
        error = sxx + a * a * sll - 2 * a * sxl
        found = [torch.zeros_like(sxx), sxx if nested else torch.full_like(sxx, float(HUGE)), *(torch.zeros_like(sxx),) * 2]
        for tried in zip(s, error, sll, sxl, strict=True):
            better = tried[1] < found[1]
            found = [torch.where(better, new, old) for new, old in zip(tried, found, strict=True)]
        s_g, error_g, sll_g, sxl_g = found
        scale = wide_d * s_g
        total, aa, ax = (folded(each, groups) for each in (error_g, s_g * s_g * sll_g, s_g * sxl_g))
        better = total < least
        best_s = torch.where(spread(better, groups), s_g, best_s)
        best_d, least = torch.where(better, d, best_d), torch.where(better, total, least)
        new_d = half(ax / aa)
        d = torch.where((aa > 0) & ~(new_d.abs() > float(LARGEST)), new_d, d)
    inner = blocks(best_s, groups) if kind.scale_low else blocks(best_s, groups)[:, :, :0]
    scale = spread(best_d, groups) * best_s
    return Scales(inner, best_d[:, :, None], scale, torch.zeros_like(scale))


def _with_zeros(kind: IntGroup, x: Tensor, w: Tensor, effort: Effort) -> Scales:
    candidates, rounds = getattr(EFFORTS[kind.bits, kind.symmetric], effort)
    top = float(2**kind.bits - 1)
    ladder = torch.from_numpy(candidates).to(x.device)[:, :, None, None, None]
    stored: dict[str, Callable[[Tensor], Tensor]] = {"F32": lambda scale: scale, "F16": half, "BF16": _bfloat16}
    _, _, sxx, low, high, peak = _moments(x, w)
    low, high = low.clamp(max=0), high.clamp(min=0)
    extent = peak if kind.symmetric else high - low
    inverse = torch.where(extent.abs() > float(TINY), ladder[:, 0] / extent, 0.0)
    middle = torch.full_like(inverse, (top + 1) / 2)
    z = middle if kind.symmetric else (ladder[:, 1] - low * inverse).round().clamp(max=top).clamp(min=0)
    _, scc, sxc = _sums(x, w, None, inverse, 0 - z, top - z)
    a = torch.where(scc > 0, sxc / scc, 0.0)
    scale, gain, best_z = torch.zeros_like(peak), torch.zeros_like(peak), middle[0]
    for one, other, zero in zip(a, sxc, z, strict=True):
        better = gain < one * other
        scale, best_z = torch.where(better, one, scale), torch.where(better, zero, best_z)
        gain = torch.where(better, one * other, gain)
    rounded = stored[kind.scale_type]
    scale = rounded(scale)
    least, best = torch.full_like(scale, float(HUGE)), scale
    for _ in range(rounds):
        inverse = torch.where(scale.abs() > float(TINY), 1 / scale, 0.0)
        _, scc, sxc = _sums(x, w, None, inverse, 0 - best_z, top - best_z)
        error = sxx + scale * scale * scc - 2 * scale * sxc
        better = error < least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
        scale = torch.where(scc > 0, rounded(sxc / scc), scale)
    scale = best
    offset = torch.zeros_like(scale) if kind.symmetric else 0 - scale * best_z
    return Scales(best_z[:, :, None], best[:, :, None], scale, offset)


def _bfloat16(scale: Tensor) -> Tensor:
    """Rounded to bfloat16's eight bits, T. J. Dekker's way."""
    wide = scale * float(np.float32(65537))
    return wide - (wide - scale)


def _binade(value: Tensor) -> Tensor:
    """The power of two at or below the magnitude; 0 below 2^−126."""
    return (value.view(torch.int32) & 0x7F800000).view(torch.float32)


def _powers(kind: MXFP4Format, x: Tensor, w: Tensor, effort: Effort) -> Scales:
    known = table(kind.searched, x.device)
    assert known is not None
    _, _, sxx, _, _, peak = _moments(x, w)
    step = torch.where(peak.abs() > float(TINY), _binade(over(peak, -float(kind.levels[0]))), 0.0)
    a = step * torch.from_numpy(getattr(kind.efforts, effort)[0]).to(x.device)[:, None, None, None]
    sll, sxl = _table_sums(x, w, inverted(a), *known)
    error = sxx + a * a * sll - 2 * a * sxl
    d, least = torch.zeros_like(peak), torch.full_like(peak, float(HUGE))
    for one, other in zip(a, error, strict=True):
        d, least = torch.where(other < least, one, d), torch.where(other < least, other, least)
    least_scale = float(kind.scales(np.zeros((1, kind.block_bytes), np.uint8))[0][0, 0])  # what the bytes of 0 stand for
    return Scales(d[:, :, None][:, :, :0], d[:, :, None], d.clamp(min=least_scale), torch.zeros_like(d))


def _half_e4m3(value: Tensor) -> Tensor:
    """The half of an E4M3 nearest to a value >= 0, ties to even, at most 224."""
    step = (_binade(value) * (1 / 8)).clamp(min=2**-10)
    return ((value / step).round() * step).clamp(max=224)


def _small_floats(kind: NVFP4Format, x: Tensor, w: Tensor, effort: Effort) -> Scales:
    known = table(kind.searched, x.device)
    assert known is not None
    ladder, rounds = getattr(kind.efforts, effort)
    _, _, sxx, _, _, peak = _moments(x, w)
    zero = torch.zeros_like(peak)
    found = [zero, sxx, zero, zero]

    def attempt(a: Tensor) -> None:
        """Of scales [n, stack, groups, rows] the one that is better than what was found."""
        sll, sxl = _table_sums(x, w, inverted(a), *known)
        error = sxx + a * a * sll - 2 * a * sxl
        for tried in zip(a, error, sll, sxl, strict=True):
            better = tried[1] < found[1]
            found[:] = [torch.where(better, new, old) for new, old in zip(tried, found, strict=True)]

    attempt(_half_e4m3(peak.abs() / torch.from_numpy(ladder).to(x.device)[:, None, None, None]))
    for _ in range(rounds):
        attempt(_half_e4m3(torch.where(found[2] > 0, found[3] / found[2], 0.0))[None])
    d = blocks(found[0], kind.block_size // kind.group_size)
    return Scales(d[:, :, :0], d, found[0], zero)
