"""TQ1_0: 1.6875 bits per weight; 256 weights, w = d·q with q in −1, 0, 1, five to a byte.

| offset | bytes | field |
|---|---|---|
| 0 | 32 | weights 32n+i, n = 0…4, in byte i |
| 32 | 16 | weights 160+16n+i, n = 0…4, in byte 32+i |
| 48 | 4 | weights 240+4n+i, n = 0…3, in byte 48+i |
| 52 | 2 | d, float16 |

The digits q+1 of a byte's weights, the first the most significant, make a number of base 3 with five digits, v; the byte is
256·v/243 rounded up, so that byte·3ⁿ mod 256, times 3, has digit n in its high byte. The fifth digit of the last four bytes is 0.

For weights that were trained ternary, which are kept exactly. Gaussian ones are off by 0.43 of their norm.

Source of truth: `block_tq1_0` in ggml-common.h.
"""

import numpy as np

from xent_quant.formats._codes import Efforts, Found, SymmetricFormat, half_bytes, halves, integers
from xent_quant.formats.base import F32, U8

EFFORTS = Efforts(
    fast=(np.geomspace(1, 16, 7, dtype=np.float32), 1),
    normal=(np.geomspace(1, 16, 13, dtype=np.float32), 1),
    high=(np.geomspace(1, 32, 61, dtype=np.float32), 4),
)
"""Candidates: levels at which a block's largest weight is put; 1 keeps ternary weights."""
PARTS = ((0, 32, 0, 5), (32, 48, 160, 5), (48, 52, 240, 4))
"""Of the table above: first byte, byte after the last, first weight, weights to a byte."""
POWERS: U8 = np.array([1, 3, 9, 27, 81], np.uint8)[:, None]


class TQ10(SymmetricFormat):
    name = "TQ1_0"
    ggml_type = 34
    block_size = 256
    block_bytes = 54
    group_size = 256
    levels = integers(-1, 1)
    outer_halves = (52,)
    efforts = EFFORTS

    def scales(self, blocks: U8) -> tuple[F32, None]:
        return halves(blocks[:, 52:54]), None

    def store_scales(self, blocks: U8, found: Found) -> None:
        blocks[:, 52:54] = half_bytes(found.outer)

    def codes(self, packed: U8) -> U8:
        blocks = packed.reshape(-1, self.block_bytes)
        found = np.empty((len(blocks), 256), np.uint8)
        for start, stop, first, count in PARTS:
            shifted = blocks[:, None, start:stop] * POWERS[:count]  # modulo 256
            digits = (shifted.astype(np.uint16) * np.uint16(3)) >> np.uint16(8)  # [n, count, bytes]
            found[:, first : first + count * (stop - start)] = digits.reshape(len(blocks), -1)
        return found.reshape(len(packed), -1)

    def store_codes(self, packed: U8, codes: U8) -> None:
        blocks = packed.reshape(-1, self.block_bytes)
        codes = codes.reshape(-1, 256)
        for start, stop, first, count in PARTS:
            digits = codes[:, first : first + count * (stop - start)].reshape(len(codes), count, -1)
            value = digits[:, 0].astype(np.uint16)
            for n in range(1, 5):
                value *= np.uint16(3)
                if n < count:
                    value += digits[:, n]
            blocks[:, start:stop] = (value * np.uint16(256) + np.uint16(242)) // np.uint16(243)
