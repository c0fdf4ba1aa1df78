"""What every weight goes through besides its quantisation, in one pass each that leaves nothing behind."""

import numpy as np
from numpy.typing import NDArray

from xent_quant.compilation import jit

F32 = NDArray[np.float32]


@jit
def _widen(halves, wide):  # type: ignore[no-untyped-def]
    for i in range(len(halves)):
        wide[i] = np.uint32(halves[i]) << np.uint32(16)


@jit
def _largest(bits):  # type: ignore[no-untyped-def]
    found = np.uint32(0)
    for i in range(len(bits)):
        magnitude = np.uint32(bits[i] & np.uint32(0x7FFFFFFF))
        found = magnitude if magnitude > found else found
    return found


@jit
def _finite(halves):  # type: ignore[no-untyped-def]
    found = True
    for i in range(len(halves)):
        found &= (halves[i] & np.uint16(0x7F80)) != np.uint16(0x7F80)
    return found


def finite(halves: NDArray[np.uint16]) -> bool:
    """Whether [n] bfloat16, as their bits, are all numbers."""
    return bool(_finite(halves))


def from_bfloat16(halves: NDArray[np.uint16]) -> F32:
    """[n], the upper halves of float32, to [n] float32."""
    wide = np.empty(len(halves), np.uint32)
    _widen(halves, wide)
    return wide.view(np.float32)


def largest(values: F32) -> np.float32:
    """The largest magnitude of a contiguous array; NaN where it holds one, 0 where it holds nothing."""
    # Without their signs float32 are in the order of their bits, NaN beyond infinity.
    return np.uint32(_largest(values.reshape(-1).view(np.uint32))).view(np.float32)
