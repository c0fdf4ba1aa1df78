"""How a weight lies in a pre-quantised checkpoint: the tensors that bitsandbytes' layers save for it, made by bitsandbytes.

| kind | tensors, after the weight's name | bytes a weight |
|---|---|---|
| NF4, FP4 | `` U8 [n/2, 1]; .absmax U8 [n/64]; .nested_absmax F32 [n/64/256]; .quant_map F32 [16]; .nested_quant_map F32 [256]; .quant_state.bitsandbytes__TYPE U8, JSON | 0.516 |
| INT8 | `` I8 [rows, columns]; and beside it SCB F32 [rows]; weight_format U8 [] | 1 |
| BF16, F32 | `` | 2, 4 |

Source: bitsandbytes 0.50, `QuantState.as_dict`, `Linear8bitLt._save_to_state_dict`, and transformers' quantizer_bnb_*.py.
"""  # noqa: E501

import json
import logging
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd, prod
from types import ModuleType
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from xent_quant import formats
from xent_quant.errors import ConfigError
from xent_quant.formats._codes import integers
from xent_quant.formats.base import F32, U8, Effort
from xent_quant.formats.prescaled import InMemory, Prescaled, Scaled
from xent_quant.parallel import one_thread

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 64
"""Weights that share a scale in NF4 and FP4; the CPU kernels and the fast CUDA one want rows of whole blocks."""
TOP = 127
"""The largest code of INT8, and of the smallest the magnitude."""
NESTED_BLOCK = 256
"""Scales that share a scale, with double quantisation."""
QUANT_STATE_BYTES = 256
"""Bound on the JSON of a quant state; its length varies with the digits of a number in it."""
ITEM_SIZE = {"F32": 4, "BF16": 2, "U8": 1, "I8": 1}


@dataclass(frozen=True)
class Part:
    """One tensor of a safetensors file. That of `bounded` parts has at most this length."""

    name: str
    dtype: Literal["F32", "BF16", "U8", "I8"]
    shape: tuple[int, ...]
    bounded: bool = False

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * ITEM_SIZE[self.dtype]


class Whole(Prescaled):
    """An encoding (see `xent_quant.formats.base.Encoding`) of a weight as bitsandbytes' layers save it, whole: its row of bytes
    holds the stored parts one after the other."""

    name: str
    by_rows = False

    @abstractmethod
    def parts(self, name: str, shape: tuple[int, ...]) -> tuple[Part, ...]:
        """What is stored for the weight `name`; the first part is the weight itself."""

    @abstractmethod
    def encode(self, name: str, weights: F32) -> list[U8]:
        """The parts' bytes for `weights` [rows, columns]; only the last may be shorter than planned. Raises QuantizationError."""

    def quantize(self, weights: F32, importance: F32 | None = None, *, effort: Effort = "normal", name: str = "tensor") -> U8:
        """See `Encoding.quantize`. Levels are fixed and scales are maxima: importance and effort have no say."""
        return _joined(self.encode(name, weights))

    def split(self, packed: U8, parts: Sequence[Part]) -> list[U8]:
        """The parts' bytes out of [1, bytes]."""
        ends = np.cumsum([part.nbytes for part in parts])[:-1]
        return np.split(packed[0], ends)


class FourBit(Whole):
    """NF4 or FP4 of the weight in bfloat16, in blocks of 64 with double-quantised scales."""

    def __init__(self, quant_type: Literal["nf4", "fp4"]) -> None:
        self.quant_type = quant_type
        self.name = quant_type.upper()

    def parts(self, name: str, shape: tuple[int, ...]) -> tuple[Part, ...]:
        blocks = -(-prod(shape) // BLOCK)
        return (
            Part(name, "U8", (-(-prod(shape) // 2), 1)),
            Part(f"{name}.absmax", "U8", (blocks,)),
            Part(f"{name}.quant_map", "F32", (16,)),
            Part(f"{name}.nested_absmax", "F32", (-(-blocks // NESTED_BLOCK),)),
            Part(f"{name}.nested_quant_map", "F32", (256,)),
            Part(f"{name}.quant_state.bitsandbytes__{self.quant_type}", "U8", (QUANT_STATE_BYTES,), bounded=True),
        )

    def encode(self, name: str, weights: F32) -> list[U8]:
        functional = bitsandbytes_functional()
        packed, state = functional.quantize_4bit(_half(name, weights, "BF16"), blocksize=BLOCK, quant_type=self.quant_type)
        # What `compress_statistics=True` does, on one thread: the last bit of the mean depends on their number.
        with one_thread():
            state.offset = state.absmax.mean()
            state.absmax, state.state2 = functional.quantize_blockwise(state.absmax - state.offset, blocksize=NESTED_BLOCK)
        state.nested = True
        tensors = {"": packed} | {f".{key}": value for key, value in state.as_dict(packed=True).items()}
        return [_bytes(tensors[part.name.removeprefix(name)]) for part in self.parts(name, weights.shape)]

    def scaled(self, weights: F32, *, name: str) -> Scaled | None:
        """See `Prescaled.scaled`."""
        if weights.shape[1] % BLOCK:
            return None
        codes, *others = self.encode(name, weights)
        order, levels = _ascending(others[1].view("<f4"))
        kind = InMemory(BLOCK, levels)

        def finish(packed: U8) -> U8:
            numbers = np.empty(len(levels), np.uint8)  # of equal levels the first
            numbers[order[::-1]] = np.arange(len(order), dtype=np.uint8)[::-1]
            pairs = numbers[kind.codes(packed)].reshape(-1, 2)
            return _joined([pairs[:, 0] << np.uint8(4) | pairs[:, 1], *others])

        scales = _scales(*others).reshape(len(weights), -1)
        return Scaled(kind, kind.pack(scales, order[_nibbles(codes)].reshape(weights.shape)), finish)

    def read(self, packed: U8, shape: tuple[int, int]) -> F32:
        """See `Encoding.read`."""
        codes, *others = self.split(packed, self.parts("", shape))
        size = prod(shape)
        values = others[1].view("<f4")[_nibbles(codes)[:size]] * np.repeat(_scales(*others), BLOCK)[:size]
        kept = formats.get("BF16")
        return kept.dequantize(kept.quantize(values.reshape(shape)))


def _nibbles(packed: U8) -> U8:
    """Codes of pairs, the first in the high nibble."""
    return np.stack([packed.reshape(-1) >> np.uint8(4), packed.reshape(-1) & np.uint8(15)], axis=1).reshape(-1)


def _ascending(levels: F32) -> tuple[U8, F32]:
    """The place of each of bitsandbytes' levels among the distinct ones in order, and those."""
    distinct, order = np.unique(levels, return_inverse=True)
    return order.astype(np.uint8), distinct.astype(np.float32)


def _scales(absmax: U8, _: U8, nested: U8, levels: U8, state: U8) -> F32:
    """Every block's scale, [blocks], from the parts of FourBit behind its codes, as bitsandbytes' dequantize_blockwise has it."""
    offset = np.float32(json.loads(state.tobytes())["nested_offset"])
    outer = np.repeat(nested.view("<f4"), NESTED_BLOCK)[: absmax.size]
    scales: F32 = levels.view("<f4")[absmax.reshape(-1)] * outer + offset
    return scales


class Int8(Whole):
    """LLM.int8(): the weight in float16, one scale a row. Outliers are the activations', found when the model runs."""

    name = "INT8"

    def parts(self, name: str, shape: tuple[int, ...]) -> tuple[Part, ...]:
        layer = name.removesuffix("weight")
        return (
            Part(name, "I8", shape),
            Part(f"{layer}SCB", "F32", shape[:1]),
            Part(f"{layer}weight_format", "U8", ()),
        )

    def encode(self, name: str, weights: F32) -> list[U8]:
        codes, scales, _ = bitsandbytes_functional().int8_vectorwise_quant(_half(name, weights, "F16"))
        return [_bytes(codes), _bytes(scales), np.zeros(1, np.uint8)]  # weight_format 0: row-major

    def scaled(self, weights: F32, *, name: str) -> Scaled:
        """See `Prescaled.scaled`."""
        codes, scales, layout = self.encode(name, weights)
        kind = InMemory(gcd(weights.shape[1], BLOCK), integers(-TOP, TOP))

        def finish(packed: U8) -> U8:
            return _joined([kind.codes(packed) - np.uint8(TOP), scales, layout])  # −TOP… in two's complement

        wide: F32 = np.repeat(_row_scales(scales)[:, None], weights.shape[1] // kind.block_size, axis=1)
        return Scaled(kind, kind.pack(wide, (codes + np.uint8(TOP)).reshape(weights.shape)), finish)

    def read(self, packed: U8, shape: tuple[int, int]) -> F32:
        """See `Encoding.read`."""
        codes, scales, _ = self.split(packed, self.parts("weight", shape))
        values: F32 = codes.view(np.int8).reshape(shape).astype(np.float32) * _row_scales(scales)[:, None]
        return values


def _row_scales(largest: U8) -> F32:
    """Every row's scale, [rows], from SCB, its weight of largest magnitude."""
    scales: F32 = largest.view(np.float32) / np.float32(TOP)
    return scales


def bitsandbytes_functional() -> ModuleType:
    """The module bitsandbytes.functional. Raises ConfigError where it is not installed."""
    advice = logging.getLogger("bitsandbytes.backends.cpu.ops")  # on a kernel that only running a model needs
    level = advice.level
    advice.setLevel(logging.ERROR)
    try:
        import bitsandbytes.functional
    except ImportError as error:
        raise ConfigError(f"--format bnb: bitsandbytes is missing ({error}); pip install 'xent-quant[bnb]'") from error
    finally:
        advice.setLevel(level)
    functional: ModuleType = bitsandbytes.functional
    return functional


def _half(name: str, weights: F32, dtype: Literal["BF16", "F16"]) -> "Tensor":
    """[rows, columns] for torch, rounded to the nearest. Raises QuantizationError where a weight exceeds the type."""
    import torch

    packed = formats.get(dtype).quantize(weights, name=name)
    return torch.from_numpy(packed).view(torch.bfloat16 if dtype == "BF16" else torch.float16)


def _joined(parts: Sequence[U8]) -> U8:
    return np.concatenate([part.reshape(-1) for part in parts])[None]


def _bytes(tensor: "Tensor") -> NDArray[np.uint8]:
    import torch

    raw: NDArray[np.uint8] = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    return raw
