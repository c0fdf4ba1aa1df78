"""ONNX Runtime's integer groups one weight at a time, written from the layout and the description of the search.

float32 throughout (numpy scalars), sums in index order. Slow on purpose; shares nothing with `xent_quant.formats`.
"""

import numpy as np

F = np.float32


def round_scale(scale: np.float32, kind: str) -> np.float32:
    """`scale` as float32, float16 or bfloat16 stores it."""
    if kind == "F16":
        scale = F(np.float16(scale)) + F(0)  # no negative zero
    elif kind == "BF16":
        bits = int(np.array(scale, F).view(np.uint32))
        low, bits = bits & 0xFFFF, bits >> 16
        bits += low > 0x8000 or (low == 0x8000 and bits & 1)
        scale = F(np.array(bits << 16, np.uint32).view(F))
    return scale


def codes_for(x: list[np.float32], inverse: np.float32, zero: np.float32, top: np.float32) -> list[np.float32]:
    return [max(min(F(np.rint(inverse * value)), top - zero), -zero) for value in x]


def sums(x: list[np.float32], w: list[np.float32], codes: list[np.float32]) -> tuple[np.float32, np.float32]:
    scc, sxc = F(0), F(0)
    for value, weight, code in zip(x, w, codes, strict=True):
        scc += code * weight * code
        sxc += code * weight * value
    return scc, sxc


def quantize_group(
    x: list[np.float32], w: list[np.float32], bits: int, symmetric: bool, kind: str, candidates: np.ndarray, rounds: int
) -> tuple[list[int], np.float32, int]:
    """(q of each weight, s, z). `candidates` [n, 2]: steps over the range, or level of the largest weight; move of z."""
    top = F(2**bits - 1)
    low, high, peak = min(*x, F(0)), max(*x, F(0)), max(x, key=abs)
    sxx = F(0)
    for value, weight in zip(x, w, strict=True):
        sxx += value * weight * value
    extent = peak if symmetric else high - low
    scale, best_zero, gain = F(0), F(2 ** (bits - 1)), F(0)
    for steps, move in candidates:
        inverse = steps / extent if abs(extent) > F(1e-30) else F(0)
        zero = F(2 ** (bits - 1)) if symmetric else max(min(F(np.rint(move - low * inverse)), top), F(0))
        scc, sxc = sums(x, w, codes_for(x, inverse, zero, top))
        own = sxc / scc if scc > 0 else F(0)
        if own * sxc > gain:
            scale, best_zero, gain = own, zero, own * sxc
    scale = best = round_scale(scale, kind)
    error = F(np.inf)
    for _ in range(rounds):
        inverse = F(1) / scale if abs(scale) > F(1e-30) else F(0)
        scc, sxc = sums(x, w, codes_for(x, inverse, best_zero, top))
        now = sxx + scale * scale * scc - F(2) * scale * sxc
        if now < error:
            error, best = now, scale
        if scc > 0:
            scale = round_scale(sxc / scc, kind)
    codes = codes_for(x, F(1) / best if abs(best) > F(1e-30) else F(0), best_zero, top)
    return [int(code + best_zero) for code in codes], best, int(best_zero)


def pack_group(codes: list[int], scale: np.float32, zero: int, bits: int, symmetric: bool, kind: str) -> bytes:
    """The bytes of one stored block."""
    packed = bytes(codes) if bits == 8 else bytes(a | b << 4 for a, b in zip(codes[0::2], codes[1::2], strict=True))
    stored = np.array(scale, "<f2" if kind == "F16" else "<f4").tobytes()
    return packed + (stored[2:] if kind == "BF16" else stored) + (b"" if symmetric else bytes([zero]))
