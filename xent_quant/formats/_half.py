"""float16 as ggml stores it: bits from a float32 and back, round to nearest, ties to even, for use inside kernels."""

import math

import numba as nb
import numpy as np

INFINITY = 0x7C00


@nb.njit(cache=True, inline="always")
def half_bits(value):  # type: ignore[no-untyped-def]
    """The 16 bits of `value` rounded to float16; the magnitude is INFINITY or more where it overflows."""
    magnitude = abs(np.float64(value))
    sign = 0x8000 if value < 0 else 0
    if magnitude >= 65520.0:
        return sign | INFINITY
    if magnitude < 2.0**-14:
        return sign | int(np.rint(magnitude * 2.0**24))
    mantissa, exponent = math.frexp(magnitude)  # mantissa in [0.5, 1)
    return sign | (((exponent + 14) << 10) + int(np.rint(mantissa * 2048.0)) - 1024)  # a carry moves into the exponent


@nb.njit(cache=True, inline="always")
def half_value(bits):  # type: ignore[no-untyped-def]
    """The float32 that finite float16 bits stand for."""
    exponent, fraction = (bits >> 10) & 31, bits & 1023
    value = fraction * 2.0**-24 if exponent == 0 else math.ldexp(1.0 + fraction / 1024.0, exponent - 15)
    return np.float32(-value if bits & 0x8000 else value)
