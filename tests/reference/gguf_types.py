"""Layouts of GGUF's block types, one value at a time, from the structs in ggml-common.h and never from the fast code.

`PACK[name]` (codebooks: `PACK_POINTS[name]`) makes a block's bytes of what a search chose; `READ[name]` gives a block's
weights of its bytes.
"""

import struct
from collections.abc import Callable

import gguf
import numpy as np

from tests.reference.search import Block, Pointed

f = np.float32
KVALUES = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]
E2M1 = [0, 1, 2, 3, 4, 6, 8, 12]


def f16(value: float) -> bytes:
    return struct.pack("<e", float(value))


def f32(raw: bytes) -> np.float32:
    """float32 of two bytes of float16."""
    return f(struct.unpack("<e", bytes(raw))[0])


def signed(byte: int) -> int:
    return byte - 256 if byte > 127 else byte


def nibbles32(codes: list[int]) -> bytes:
    return bytes(codes[i] % 16 + 16 * (codes[i + 16] % 16) for i in range(16))


def nibble32(qs: bytes, i: int) -> int:
    return qs[i] % 16 if i < 16 else qs[i - 16] // 16


def fifths32(codes: list[int]) -> bytes:
    return struct.pack("<I", sum((codes[i] // 16) << i for i in range(32)))


def read_q4_0(b: bytes) -> list[np.float32]:
    return [f32(b[0:2]) * f(nibble32(b[2:], i) - 8) for i in range(32)]


def read_q4_1(b: bytes) -> list[np.float32]:
    return [f32(b[0:2]) * f(nibble32(b[4:], i)) + f32(b[2:4]) for i in range(32)]


def read_q5_0(b: bytes) -> list[np.float32]:
    high = struct.unpack("<I", b[2:6])[0]
    return [f32(b[0:2]) * f(nibble32(b[6:], i) + 16 * (high >> i & 1) - 16) for i in range(32)]


def read_q5_1(b: bytes) -> list[np.float32]:
    high = struct.unpack("<I", b[4:8])[0]
    return [f32(b[0:2]) * f(nibble32(b[8:], i) + 16 * (high >> i & 1)) + f32(b[2:4]) for i in range(32)]


def read_q8_0(b: bytes) -> list[np.float32]:
    return [f32(b[0:2]) * f(signed(b[2 + i])) for i in range(32)]


def read_iq4_nl(b: bytes) -> list[np.float32]:
    return [f32(b[0:2]) * f(KVALUES[nibble32(b[2:], i)]) for i in range(32)]


def read_mxfp4(b: bytes) -> list[np.float32]:
    d = f(2.0 ** (b[0] - 128))
    codes = [nibble32(b[1:], i) for i in range(32)]
    return [d * f(E2M1[c] if c < 8 else -E2M1[c - 8]) for c in codes]


def quarters(codes: list[int], shift: int = 0) -> bytes:
    """Two bits of each code: byte 32h+i holds weights 128h+i, +32, +64, +96."""
    raw = bytearray(64)
    for weight in range(256):
        half, rest = divmod(weight, 128)
        raw[32 * half + rest % 32] |= (codes[weight] >> shift & 3) << (2 * (rest // 32))
    return bytes(raw)


def quarter(raw: bytes, weight: int) -> int:
    half, rest = divmod(weight, 128)
    return raw[32 * half + rest % 32] >> (2 * (rest // 32)) & 3


def bits(codes: list[int], shift: int) -> bytes:
    """One bit of each code: bit j of byte i belongs to weight 32j+i."""
    raw = bytearray(32)
    for weight in range(256):
        raw[weight % 32] |= (codes[weight] >> shift & 1) << (weight // 32)
    return bytes(raw)


def nibbles64(codes: list[int]) -> bytes:
    """Byte 32g+i holds weight 64g+i low and 64g+32+i high."""
    raw = bytearray(128)
    for weight in range(256):
        group, rest = divmod(weight, 64)
        raw[32 * group + rest % 32] |= (codes[weight] & 15) << (4 * (rest // 32))
    return bytes(raw)


def nibble64(raw: bytes, weight: int) -> int:
    group, rest = divmod(weight, 64)
    return raw[32 * group + rest % 32] >> (4 * (rest // 32)) & 15


def k4_scales(s: list[int], m: list[int]) -> bytes:
    raw = [0] * 12
    for j in range(4):
        raw[j], raw[j + 4] = s[j], m[j]
    for j in range(4, 8):
        raw[j + 4] = s[j] % 16 + 16 * (m[j] % 16)
        raw[j - 4] += (s[j] // 16) << 6
        raw[j] += (m[j] // 16) << 6
    return bytes(raw)


def k4_scale(q: bytes, j: int) -> tuple[int, int]:
    """`get_scale_min_k4`."""
    if j < 4:
        return q[j] & 63, q[j + 4] & 63
    return q[j + 4] % 16 + (q[j - 4] >> 6) * 16, q[j + 4] // 16 + (q[j] >> 6) * 16


def pack_q2_k(x: Block) -> bytes:
    return bytes(s + 16 * m for s, m in zip(x.s, x.m, strict=True)) + quarters(x.codes) + f16(x.d) + f16(x.dmin)


def read_q2_k(b: bytes) -> list[np.float32]:
    d, dmin = f32(b[80:82]), f32(b[82:84])
    return [
        d * f(b[i // 16] % 16) * f(quarter(b[16:80], i)) - dmin * f(b[i // 16] // 16)
        for i in range(256)
    ]  # fmt: skip


def pack_q3_k(x: Block) -> bytes:
    scales = [s + 32 for s in x.s]
    low = bytes(scales[j] % 16 + 16 * (scales[j + 8] % 16) for j in range(8))
    high = bytes(sum((scales[j + 4 * k] // 16) << (2 * k) for k in range(4)) for j in range(4))
    return bits(x.codes, 2) + quarters(x.codes) + low + high + f16(x.d)


def read_q3_k(b: bytes) -> list[np.float32]:
    weights = []
    for i in range(256):
        j = i // 16
        scale = (b[96 + j] % 16 if j < 8 else b[96 + j - 8] // 16) + 16 * (b[104 + j % 4] >> (2 * (j // 4)) & 3)
        code = quarter(b[32:96], i) + 4 * (b[i % 32] >> (i // 32) & 1)
        weights.append(f32(b[108:110]) * f(scale - 32) * f(code - 4))
    return weights


def pack_q4_k(x: Block) -> bytes:
    return f16(x.d) + f16(x.dmin) + k4_scales(x.s, x.m) + nibbles64(x.codes)


def read_q4_k(b: bytes) -> list[np.float32]:
    weights = []
    for i in range(256):
        s, m = k4_scale(b[4:16], i // 32)
        weights.append(f32(b[0:2]) * f(s) * f(nibble64(b[16:], i)) - f32(b[2:4]) * f(m))
    return weights


def pack_q5_k(x: Block) -> bytes:
    return f16(x.d) + f16(x.dmin) + k4_scales(x.s, x.m) + bits(x.codes, 4) + nibbles64(x.codes)


def read_q5_k(b: bytes) -> list[np.float32]:
    weights = []
    for i in range(256):
        s, m = k4_scale(b[4:16], i // 32)
        code = nibble64(b[48:], i) + 16 * (b[16 + i % 32] >> (i // 32) & 1)
        weights.append(f32(b[0:2]) * f(s) * f(code) - f32(b[2:4]) * f(m))
    return weights


def pack_q6_k(x: Block) -> bytes:
    low = bytearray(128)
    for weight in range(256):
        half, rest = divmod(weight, 128)
        low[64 * half + rest % 64] |= (x.codes[weight] & 15) << (4 * (rest // 64))
    return bytes(low) + quarters(x.codes, 4) + bytes(s % 256 for s in x.s) + f16(x.d)


def read_q6_k(b: bytes) -> list[np.float32]:
    weights = []
    for i in range(256):
        half, rest = divmod(i, 128)
        code = (b[64 * half + rest % 64] >> (4 * (rest // 64)) & 15) + 16 * quarter(b[128:192], i)
        weights.append(f32(b[208:210]) * f(signed(b[192 + i // 16])) * f(code - 32))
    return weights


def pack_iq4_xs(x: Block) -> bytes:
    scales = [s + 32 for s in x.s]
    high = struct.pack("<H", sum((scales[j] // 16) << (2 * j) for j in range(8)))
    low = bytes(scales[2 * j] % 16 + 16 * (scales[2 * j + 1] % 16) for j in range(4))
    return f16(x.d) + high + low + b"".join(nibbles32(x.codes[32 * j : 32 * j + 32]) for j in range(8))


def read_iq4_xs(b: bytes) -> list[np.float32]:
    high = struct.unpack("<H", b[2:4])[0]
    weights = []
    for i in range(256):
        j = i // 32
        scale = (b[4 + j // 2] >> (4 * (j % 2)) & 15) + 16 * (high >> (2 * j) & 3)
        weights.append(f32(b[0:2]) * f(scale - 32) * f(KVALUES[nibble32(b[8 + 16 * j : 24 + 16 * j], i % 32)]))
    return weights


def pack_mxfp4(x: Block) -> bytes:
    e = round(np.log2(float(x.d))) + 128 if x.d > 0 else 0
    levels = [-v for v in E2M1[:0:-1]] + E2M1
    stored = [E2M1.index(abs(levels[c])) + (8 if levels[c] < 0 else 0) for c in x.codes]
    return bytes([e]) + nibbles32(stored)


def e4m3(byte: int) -> float:
    """An unsigned E4M3; ggml reads 0x7F as 0 and ignores the highest bit."""
    exponent, rest = byte >> 3 & 15, byte & 7
    return 0.0 if byte == 0x7F else (1 + rest / 8) * 2.0 ** (exponent - 7) if exponent else rest * 2.0**-9


def pack_nvfp4(x: Block) -> bytes:
    scales = bytes(next(byte for byte in range(128) if e4m3(byte) == 2 * d) for d in x.s)
    levels = [-v for v in E2M1[:0:-1]] + E2M1
    stored = [E2M1.index(abs(levels[c])) + (8 if levels[c] < 0 else 0) for c in x.codes]
    return scales + bytes(stored[16 * j + i] + 16 * stored[16 * j + 8 + i] for j in range(4) for i in range(8))


def read_nvfp4(b: bytes) -> list[np.float32]:
    weights = []
    for i in range(64):
        code = b[4 + 8 * (i // 16) + i % 8] >> (4 * (i // 8 % 2)) & 15
        weights.append(f(e4m3(b[i // 16]) / 2) * f(E2M1[code] if code < 8 else -E2M1[code - 8]))
    return weights


def read_tq2_0(b: bytes) -> list[np.float32]:
    return [f32(b[64:66]) * f(quarter(b, i) - 1) for i in range(256)]


def tq1_place(weight: int) -> tuple[int, int]:
    """The byte that holds a weight, and how many digits stand before it there."""
    if weight < 160:
        return weight % 32, weight // 32
    if weight < 240:
        return 32 + weight % 16, (weight - 160) // 16
    return 48 + weight % 4, (weight - 240) // 4


def pack_tq1_0(x: Block) -> bytes:
    digits = [[0] * 5 for _ in range(52)]
    for weight, code in enumerate(x.codes):
        byte, place = tq1_place(weight)
        digits[byte][place] = code
    values = [int("".join(map(str, five)), 3) for five in digits]
    return bytes(-(-value * 256 // 243) for value in values) + f16(x.d)


def read_tq1_0(b: bytes) -> list[np.float32]:
    weights = []
    for i in range(256):
        byte, place = tq1_place(i)
        weights.append(f32(b[52:54]) * f((b[byte] * 3**place % 256 * 3 >> 8) - 1))
    return weights


def pack_q1_0(x: Block) -> bytes:
    return f16(x.d) + bytes(sum(x.codes[8 * j + i] << i for i in range(8)) for j in range(16))


def read_q1_0(b: bytes) -> list[np.float32]:
    return [f32(b[0:2]) * f(1 if b[2 + i // 8] >> (i % 8) & 1 else -1) for i in range(128)]


def points(name: str) -> list[list[int]]:
    """ggml's grid of a codebook type, by gguf-py."""
    kind = getattr(gguf.quants, name)
    kind.init_grid()
    return [[int(value) for value in point] for point in kind.grid[0, 0]]


def sign_bytes(negative: list[bool]) -> bytes:
    return bytes(sum(negative[8 * j + i] << i for i in range(8)) for j in range(32))


def pack_iq3_s(x: Pointed) -> bytes:
    high = bytes(sum((x.numbers[8 * j + i] // 256) << i for i in range(8)) for j in range(8))
    scales = bytes(x.s[2 * j] + 16 * x.s[2 * j + 1] for j in range(4))
    return f16(x.d) + bytes(n % 256 for n in x.numbers) + high + sign_bytes(x.negative) + scales


def read_iq3_s(b: bytes) -> list[np.float32]:
    grid, weights = points("IQ3_S"), []
    for i in range(256):
        number = b[2 + i // 4] + 256 * (b[66 + i // 32] >> (i // 4 % 8) & 1)
        s = b[106 + i // 64] >> (4 * (i // 32 % 2)) & 15
        sign = -1 if b[74 + i // 8] >> (i % 8) & 1 else 1
        weights.append(f32(b[0:2]) * f(1 + 2 * s) * f(sign * grid[number][i % 4]))
    return weights


def pack_iq3_xxs(x: Pointed) -> bytes:
    words = b"".join(signed_word(x, j) for j in range(8))
    return f16(x.d) + bytes(x.numbers) + words


def read_iq3_xxs(b: bytes) -> list[np.float32]:
    grid, weights = points("IQ3_XXS"), []
    for i in range(256):
        word = struct.unpack("<I", b[66 + 4 * (i // 32) : 70 + 4 * (i // 32)])[0]
        seven = word >> (7 * (i // 8 % 4)) & 127
        magnitude = f32(b[0:2]) * f(0.5 + (word >> 28)) * f(0.5) * f(grid[b[2 + i // 4]][i % 4])
        weights.append(-magnitude if is_negative(seven, i % 8) else magnitude)
    return weights


def pack_iq2_s(x: Pointed) -> bytes:
    high = bytes(sum((x.numbers[4 * j + i] // 256) << (2 * i) for i in range(4)) for j in range(8))
    scales = bytes(x.s[2 * j] + 16 * x.s[2 * j + 1] for j in range(8))
    return f16(x.d) + bytes(n % 256 for n in x.numbers) + sign_bytes(x.negative) + high + scales


def read_iq2_s(b: bytes) -> list[np.float32]:
    grid, weights = points("IQ2_S"), []
    for i in range(256):
        number = b[2 + i // 8] + 256 * (b[66 + i // 32] >> (2 * (i // 8 % 4)) & 3)
        s = b[74 + i // 32] >> (4 * (i // 16 % 2)) & 15
        sign = -1 if b[34 + i // 8] >> (i % 8) & 1 else 1
        weights.append(f32(b[0:2]) * f(0.5 + s) * f(0.25) * f(sign * grid[number][i % 8]))
    return weights


def signed_word(x: Pointed, j: int) -> bytes:
    """s of a sub-block of 32 above the first seven of each eight of its signs."""
    signs = sum(x.negative[32 * j + 8 * k + i] << (7 * k + i) for k in range(4) for i in range(7))
    return struct.pack("<I", signs + (x.s[j] << 28))


def is_negative(seven: int, i: int) -> int:
    """The sign of weight i of eight; the eighth makes the number of negative ones even."""
    return seven >> i & 1 if i < 7 else bin(seven).count("1") % 2


def pack_iq2_xxs(x: Pointed) -> bytes:
    return f16(x.d) + b"".join(bytes(x.numbers[4 * j : 4 * j + 4]) + signed_word(x, j) for j in range(8))


def read_iq2_xxs(b: bytes) -> list[np.float32]:
    grid, weights = points("IQ2_XXS"), []
    for i in range(256):
        part = b[2 + 8 * (i // 32) : 10 + 8 * (i // 32)]
        word = struct.unpack("<I", part[4:])[0]
        magnitude = f32(b[0:2]) * f(0.5 + (word >> 28)) * f(0.25) * f(grid[part[i // 8 % 4]][i % 8])
        weights.append(-magnitude if is_negative(word >> (7 * (i // 8 % 4)) & 127, i % 8) else magnitude)
    return weights


def pack_iq2_xs(x: Pointed) -> bytes:
    words = b""
    for j, number in enumerate(x.numbers):
        words += struct.pack("<H", number + sum(x.negative[8 * j + i] << (9 + i) for i in range(7)))
    return f16(x.d) + words + bytes(x.s[2 * j] + 16 * x.s[2 * j + 1] for j in range(8))


def read_iq2_xs(b: bytes) -> list[np.float32]:
    grid, weights = points("IQ2_XS"), []
    for i in range(256):
        word = struct.unpack("<H", b[2 + 2 * (i // 8) : 4 + 2 * (i // 8)])[0]
        s = b[66 + i // 32] >> (4 * (i // 16 % 2)) & 15
        magnitude = f32(b[0:2]) * f(0.5 + s) * f(0.25) * f(grid[word & 511][i % 8])
        weights.append(-magnitude if is_negative(word >> 9, i % 8) else magnitude)
    return weights


def pack_iq1_s(x: Pointed) -> bytes:
    words = b""
    for j in range(8):
        high = sum((x.numbers[4 * j + k] // 256) << (3 * k) for k in range(4))
        words += struct.pack("<H", high + (x.s[j] << 12) + (x.minus[j] << 15))
    return f16(x.d) + bytes(n % 256 for n in x.numbers) + words


def read_iq1_s(b: bytes) -> list[np.float32]:
    grid, weights = points("IQ1_S"), []
    for i in range(256):
        word = struct.unpack("<H", b[34 + 2 * (i // 32) : 36 + 2 * (i // 32)])[0]
        number = b[2 + i // 8] + 256 * (word >> (3 * (i // 8 % 4)) & 7)
        level = grid[number][i % 8] + (-0.125 if word >> 15 else 0.125)
        weights.append(f32(b[0:2]) * f(1 + 2 * (word >> 12 & 7)) * f(level))
    return weights


def pack_iq1_m(x: Pointed) -> bytes:
    high = [x.numbers[j] // 256 + 8 * x.minus[j] for j in range(32)]
    d = struct.unpack("<H", f16(x.d))[0]
    words = b""
    for j in range(4):
        words += struct.pack("<H", sum(x.s[4 * j + k] << (3 * k) for k in range(4)) + ((d >> (4 * j) & 15) << 12))
    return bytes(n % 256 for n in x.numbers) + bytes(high[2 * j] + 16 * high[2 * j + 1] for j in range(16)) + words


def read_iq1_m(b: bytes) -> list[np.float32]:
    grid, weights = points("IQ1_M"), []
    words = struct.unpack("<4H", b[48:56])
    d = f32(struct.pack("<H", sum((words[j] >> 12) << (4 * j) for j in range(4))))
    for i in range(256):
        high = b[32 + i // 16] >> (4 * (i // 8 % 2)) & 15
        level = grid[b[i // 8] + 256 * (high & 7)][i % 8] + (-0.125 if high & 8 else 0.125)
        weights.append(d * f(1 + 2 * (words[i // 64] >> (3 * (i // 16 % 4)) & 7)) * f(level))
    return weights


PACK_POINTS: dict[str, Callable[[Pointed], bytes]] = {
    "IQ3_S": pack_iq3_s,
    "IQ3_XXS": pack_iq3_xxs,
    "IQ2_S": pack_iq2_s,
    "IQ2_XS": pack_iq2_xs,
    "IQ2_XXS": pack_iq2_xxs,
    "IQ1_S": pack_iq1_s,
    "IQ1_M": pack_iq1_m,
}
PACK: dict[str, Callable[[Block], bytes]] = {
    "Q4_0": lambda x: f16(x.d) + nibbles32(x.codes),
    "Q4_1": lambda x: f16(x.d) + f16(0 - x.dmin) + nibbles32(x.codes),
    "Q5_0": lambda x: f16(x.d) + fifths32(x.codes) + nibbles32(x.codes),
    "Q5_1": lambda x: f16(x.d) + f16(0 - x.dmin) + fifths32(x.codes) + nibbles32(x.codes),
    "Q8_0": lambda x: f16(x.d) + bytes((c - 127) % 256 for c in x.codes),
    "IQ4_NL": lambda x: f16(x.d) + nibbles32(x.codes),
    "MXFP4": pack_mxfp4,
    "NVFP4": pack_nvfp4,
    "TQ2_0": lambda x: quarters(x.codes) + f16(x.d),
    "TQ1_0": pack_tq1_0,
    "Q1_0": pack_q1_0,
    "Q2_K": pack_q2_k,
    "Q3_K": pack_q3_k,
    "Q4_K": pack_q4_k,
    "Q5_K": pack_q5_k,
    "Q6_K": pack_q6_k,
    "IQ4_XS": pack_iq4_xs,
}
READ: dict[str, Callable[[bytes], list[np.float32]]] = {
    name.removeprefix("read_").upper(): function for name, function in list(globals().items()) if name.startswith("read_")
}
