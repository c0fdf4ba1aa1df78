"""What a transformers folder will hold, from headers alone: the kind of every weight, and shards of safetensors.

Router and norms stay F32 where the model's code is ours, else BF16, in which transformers' own computes. Embedding and head stay
BF16: bitsandbytes has no layer for the one, and the other costs more quality in few bits than all experts together. So do modules
that a plan for a budget leaves whole.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

from exporters.bitsandbytes.kinds import BLOCK, FourBit, Int8, Part, Whole
from exporters.interface import CONTEXT, Expected, Slot, kv_cache_bytes, usual_context
from xent_quant import formats
from xent_quant.checkpoint.architecture import Architecture
from xent_quant.errors import ConfigError, UnsupportedError
from xent_quant.formats.base import Encoding
from xent_quant.tensors import KEPT_ROLES, Role, TensorSpec

SHARD_BYTES = 5 * 10**9
RUNTIME_BYTES = 600 * 2**20
"""CUDA's and torch's own memory, about."""
THRESHOLD = 6.0
"""LLM.int8()'s: activations above it are multiplied in 16 bits; bitsandbytes finds them when the model runs."""


@dataclass(frozen=True)
class PlannedTensor(Slot):
    """A weight and what is stored for it. `shape` includes padding."""

    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        return self.tensor.name

    @property
    def type(self) -> str:
        return self.encoding.name

    @property
    def parts(self) -> tuple[Part, ...]:
        if isinstance(self.encoding, Whole):
            return self.encoding.parts(self.name, self.shape)
        return (Part(self.name, self.encoding.name, self.shape),)  # type: ignore[arg-type]

    @property
    def nbytes(self) -> int:
        """Scales included; for 4 bits up to 100 bytes too many, see QUANT_STATE_BYTES."""
        return sum(part.nbytes for part in self.parts)


@dataclass(frozen=True)
class BnbPlan:
    """`width` is the expert's in the file: config.json's, or that padded with zeros. `whole` modules are BF16, though
    they could be quantised. `name` is the budget that this was planned for, of which `expected` is there then."""

    architecture: Architecture
    bits: Literal[4, 8, 16]
    bnb_type: Literal["nf4", "fp4"]
    width: int
    tensors: tuple[PlannedTensor, ...]
    notes: tuple[str, ...]
    whole: tuple[str, ...] = ()
    name: str = ""
    expected: Expected | None = None
    context: int = CONTEXT

    def slots(self) -> dict[str, list[PlannedTensor]]:
        """By the checkpoint's name of the tensor."""
        return {tensor.name: [tensor] for tensor in self.tensors}

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def type(self) -> str:
        """NF4, FP4, INT8 or BF16."""
        return {4: self.bnb_type.upper(), 8: "INT8", 16: "BF16"}[self.bits]

    def beside_weights(self, context: int) -> int:
        """The KV cache in bfloat16, the largest quantised weight while it is dequantised, RUNTIME_BYTES: an estimate."""
        small = [tensor for tensor in self.tensors if self.bits < 16 and tensor.encoding.name == self.type]
        largest = 2 * max((prod(tensor.shape) for tensor in small), default=0)
        return kv_cache_bytes(self.architecture, context) + largest + RUNTIME_BYTES

    def vram_bytes(self, context: int) -> int:
        """Weights and what is beside them."""
        return self.nbytes + self.beside_weights(context)

    def quantization_config(self) -> dict[str, Any] | None:
        """For config.json, as transformers writes it."""
        if self.bits == 16:
            return None
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": self.bits == 4,
            "load_in_8bit": self.bits == 8,
            "llm_int8_threshold": THRESHOLD,
            "llm_int8_skip_modules": ["lm_head", *self.whole],
            "llm_int8_has_fp16_weight": False,
            "llm_int8_enable_fp32_cpu_offload": False,
            "bnb_4bit_quant_type": self.bnb_type,
            "bnb_4bit_use_double_quant": self.bits == 4,
            "bnb_4bit_compute_dtype": "bfloat16",
            "bnb_4bit_quant_storage": "uint8",
        }


def module(tensor: TensorSpec) -> str:
    """What transformers calls the layer of a weight; of routed experts all together, since a list of each would be long."""
    experts = ".experts"
    return tensor.name.partition(f"{experts}.")[0] + experts if tensor.expert is not None else tensor.name.removesuffix(".weight")


def plan(model: Architecture, *, bits: int = 4, bnb_type: str = "nf4", pad: str = "auto", whole: Collection[str] = ()) -> BnbPlan:
    """Choose every tensor's kind; those of `module`s that are `whole` stay BF16.

    Raises ConfigError for bits or a type that bitsandbytes does not have,
    UnsupportedError for a family that it cannot hold in them."""
    if bits not in (4, 8, 16):
        raise ConfigError(f"--bits {bits}: bitsandbytes has 4 and 8; 16 writes bfloat16")
    if bnb_type not in ("nf4", "fp4"):
        raise ConfigError(f"--bnb-type {bnb_type}: there are nf4 and fp4")
    if bits in model.family.no_bnb:
        raise UnsupportedError(f"--format bnb --bits {bits}: {model.family.title}: {model.family.no_bnb[bits]}")
    kinds: dict[int, Encoding] = {4: FourBit(bnb_type), 8: Int8(), 16: formats.get("BF16")}  # type: ignore[arg-type]
    quantised = kinds[bits]
    width = model.intermediate_size
    notes = []
    if bits == 4 and width % BLOCK and pad == "auto":
        width = -(-width // BLOCK) * BLOCK
        notes.append(
            f"Experts padded with zeros from {model.intermediate_size} to {width}, for kernels that want multiples of {BLOCK}; "
            "the function is the same."
        )
    if bits == 4 and (model.hidden_size % BLOCK or width % BLOCK):
        notes.append(
            f"Rows are not multiples of {BLOCK} weights: bitsandbytes runs this on CUDA, slowly, and not on every CPU. "
            "--method gptq leaves such rows' codes as bitsandbytes chooses them."
        )
    left = frozenset(whole)
    tensors = tuple(
        _planned(tensor, model, width, kinds[16] if left and module(tensor) in left else quantised)
        for tensor in model.tensors().values()
    )
    return BnbPlan(model, bits, bnb_type, width, tensors, tuple(notes), tuple(whole), context=usual_context(model))  # type: ignore[arg-type]


def _planned(tensor: TensorSpec, model: Architecture, width: int, quantised: Encoding) -> PlannedTensor:
    """With experts `width` wide; a shared MLP, which is as wide as num_shared_experts of them, likewise."""
    shape, encoding = tensor.shape, quantised
    if tensor.role in KEPT_ROLES:
        # transformers' own code multiplies them in their type, and layers behind them take no other than the model's.
        encoding = formats.get("F32" if model.family.modelling else "BF16")
    elif tensor.role in (Role.EMBEDDING, Role.HEAD):
        encoding = formats.get("BF16")
    elif tensor.role in (Role.GATE, Role.UP, Role.DOWN):
        wide = width * (model.num_shared_experts if tensor.shared else 1)
        shape = (shape[0], wide) if tensor.role is Role.DOWN else (wide, shape[1])
    rows = shape[0] if len(shape) > 1 else 1
    return PlannedTensor(tensor, tensor.role, encoding, rows, shape[-1], shape)


def shards(tensors: Sequence[PlannedTensor], split_size: int | None) -> list[list[PlannedTensor]]:
    """Tensors in order, cut so that no file's data exceed `split_size` bytes unless one weight alone does."""
    result: list[list[PlannedTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if result[-1] and size + tensor.nbytes > (split_size or SHARD_BYTES):
            result.append([])
            size = 0
        result[-1].append(tensor)
        size += tensor.nbytes
    return result
