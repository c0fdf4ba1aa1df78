"""What an ONNX export will write: every weight's operator layout and place in model.onnx.data, decided from headers."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Literal

from exporters.interface import CONTEXT, Expected, Slot, kv_cache_bytes, usual_context
from xent_quant import formats
from xent_quant.checkpoint.architecture import Architecture, Swiglu
from xent_quant.errors import ConfigError, UnsupportedError
from xent_quant.formats.base import QuantFormat
from xent_quant.formats.int_group import IntGroup, ScaleType, int_group
from xent_quant.options import OnnxOptions
from xent_quant.tensors import TensorSpec

BITS = (4, 8, 16)
FLOATS: dict[str, ScaleType] = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
BLOCK_SIZES = (32, 64, 128)
ALIGNMENT = 65536
"""Of every tensor in the data file, as the ONNX specification asks so that it can be mapped on every system."""

HEAD_STEP = 16
"""GroupQueryAttention rotates heads of a multiple of this many dimensions."""

RUNTIME_BYTES = 500_000_000
"""What a GPU's driver context and ONNX Runtime's arenas take, about."""


@dataclass(frozen=True, kw_only=True)
class Settings(OnnxOptions):
    """The choices of an export. `bits` are those of the experts, `active_bits` of the tensors that every token uses
    (attention, shared experts, embedding, head); 16 means as `onnx_dtype`, in which the graph computes.
    """

    bits: int = 4

    def __post_init__(self) -> None:
        """Raises ConfigError naming the option."""
        super().__post_init__()
        if self.bits not in BITS:
            raise ConfigError(f"--bits {self.bits}: ONNX Runtime's experts have 4, 8 or 16 bits")

    @property
    def name(self) -> str:
        """Short, for headings: INT4, INT8, FP16 …"""
        return f"INT{self.bits}" if self.bits < 16 else self.onnx_dtype.upper()

    def kind(self, bits: int) -> QuantFormat:
        """The format of weights of so many bits."""
        if bits == 16:
            return formats.get(FLOATS[self.onnx_dtype])
        return int_group(bits, self.block_size, self.symmetric, FLOATS[self.onnx_dtype])

    @property
    def experts(self) -> QuantFormat:
        return self.kind(self.bits)

    @property
    def active(self) -> QuantFormat:
        return self.kind(self.active_bits or (16 if self.bits == 16 else 8))


@dataclass(frozen=True)
class Part:
    """One initialiser: rows of `row_bytes` bytes from `offset` of the data file on."""

    name: str
    type: Literal["U8", "F32", "F16", "BF16"]
    shape: tuple[int, ...]
    row_bytes: int
    offset: int = 0

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * {"U8": 1, "F32": 4}.get(self.type, 2)


@dataclass(frozen=True)
class Piece:
    """Where a checkpoint tensor goes: its row r is the weight's row first + stride·r, counted through all experts. Rows of a
    weight that no piece fills are padding: zero bytes, so scales of 0 and weights of 0."""

    source: TensorSpec
    first: int = 0
    stride: int = 1


@dataclass(frozen=True)
class Weight:
    """One weight of the graph: [out, in], [experts, out, in] or [n], padding included.

    `parts` are codes, scales and, if asymmetric, zero points of an IntGroup, or the values of a float kind. A weight
    without `pieces` shares the bytes of another.
    """

    name: str
    shape: tuple[int, ...]
    kind: QuantFormat
    parts: tuple[Part, ...]
    pieces: tuple[Piece, ...]

    @property
    def type(self) -> str:
        return self.kind.name

    @property
    def columns(self) -> int:
        return self.shape[-1]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


@dataclass(frozen=True)
class ONNXSlot(Slot):
    """A piece of a weight."""

    weight: Weight
    piece: Piece


@dataclass(frozen=True)
class ONNXPlan:
    """All weights by name in file order, the rotary tables ([positions, head_dim / 2]) after them. `expert_width` is the
    width written, `data_bytes` the size of the data file, `name` what headings call it: INT4, or the budget that it was planned
    for, of which `expected` is there then."""

    architecture: Architecture
    settings: Settings
    expert_width: int
    shared_width: int
    weights: dict[str, Weight]
    tables: tuple[Part, Part]
    data_bytes: int
    notes: tuple[str, ...]
    name: str
    expected: Expected | None = None
    context: int = CONTEXT

    def slots(self) -> dict[str, list[ONNXSlot]]:
        """By the checkpoint's name of the tensor."""
        found: dict[str, list[ONNXSlot]] = {}
        for weight in self.weights.values():
            for piece in weight.pieces:
                source = piece.source
                rows = source.shape[0] if len(source.shape) > 1 else 1
                slot = ONNXSlot(source, source.role, weight.kind, rows, weight.columns, weight, piece)
                found.setdefault(source.name, []).append(slot)
        return found

    def vram_bytes(self, context: int) -> int:
        """What the model takes on a GPU with `context` tokens, about: weights, KV cache, and RUNTIME_BYTES."""
        item = 4 if self.settings.onnx_dtype == "fp32" else 2
        return self.data_bytes + kv_cache_bytes(self.architecture, context, item) + RUNTIME_BYTES


def node(weight: str) -> str:
    """The operator that reads a weight, by name: what has one number of bits. Routed experts' weights have one operator."""
    return weight.rsplit(".", 1)[0] if ".experts." in weight else weight


def of_experts(model: Architecture, weight: str) -> bool:
    """Whether a weight, or the operator that reads it, has the bits that --bits says: experts', and a dense model's MLPs'."""
    return ".experts" in weight or (not model.num_experts and ".mlp." in weight)


def plan(model: Architecture, settings: Settings, bits: Mapping[str, int] | None = None) -> ONNXPlan:
    """Lay everything out; by `node`, some may have other `bits` than the settings say.

    Raises ConfigError or UnsupportedError for what the operators cannot express."""
    if model.head_dim % HEAD_STEP:
        raise UnsupportedError(f"head_dim {model.head_dim}: ONNX Runtime rotates heads of a multiple of {HEAD_STEP} dimensions")
    block = max(settings.experts.block_size, settings.active.block_size)
    for what, columns in (("hidden_size", model.hidden_size), ("num_attention_heads × head_dim", model.attention_size)):
        if columns % block:
            fitting = [str(size) for size in BLOCK_SIZES if columns % size == 0]
            remedy = f"use --block-size {' or '.join(fitting)}" if fitting else "no block size of the operators does"
            raise ConfigError(f"--block-size {block}: does not divide {what} {columns}; {remedy}")
    notes = []
    width, shared = _up(model.intermediate_size, block), _up(model.shared_size, block)
    if width != model.intermediate_size:
        notes.append(f"Expert width {model.intermediate_size} padded with zeros to {width}: the same function.")
    if settings.onnx_dtype == "bf16":
        notes.append("bfloat16: for GPUs only, ONNX Runtime's CPU kernels do not compute in it.")
    if settings.onnx_dtype == "fp32" and settings.bits < 16:
        notes.append("float32: for the CPU; on CUDA the experts would run on the CPU, use --onnx-dtype fp16 there.")
    if model.rope_scaling and model.rope_scaling.kind == "dynamic":
        # The tables end where dynamic scaling begins to change anything.
        notes.append(
            f"Dynamic rope scaling begins beyond {model.max_position_embeddings} tokens, where this graph's context ends."
        )
    placed: dict[str, Weight] = {}
    offset = 0

    def place(part: Part) -> Part:
        nonlocal offset
        here = replace(part, offset=offset)
        offset = _up(offset + part.nbytes, ALIGNMENT)
        return here

    for weight in _weights(model, settings, bits or {}, width, shared):
        placed[weight.name] = replace(weight, parts=tuple(place(part) for part in weight.parts))
    if model.tie_word_embeddings:
        bytes_of = placed["embedding"].parts
        head = _matrix("head", placed["embedding"].kind, model.vocab_size, model.hidden_size, ())
        parts = tuple(replace(part, offset=other.offset) for part, other in zip(head.parts, bytes_of, strict=True))
        placed["head"] = replace(head, parts=parts)
    kind = FLOATS[settings.onnx_dtype]
    item = formats.get(kind).block_bytes
    half = model.head_dim // 2
    cos, sin = (place(Part(name, kind, (model.max_position_embeddings, half), half * item)) for name in ("cos", "sin"))
    context = usual_context(model)
    return ONNXPlan(model, settings, width, shared, placed, (cos, sin), offset, tuple(notes), settings.name, context=context)


def _up(size: int, step: int) -> int:
    return -(-size // step) * step


def _weights(model: Architecture, settings: Settings, bits: Mapping[str, int], width: int, shared: int) -> Iterator[Weight]:
    hidden, attended, kv = model.hidden_size, model.attention_size, model.kv_size

    def matrix(name: str, rows: int, columns: int, pieces: tuple[Piece, ...], experts: int = 0, **how: bool) -> Weight:
        usual = settings.experts if of_experts(model, name) else settings.active
        kind = settings.kind(bits[node(name)]) if node(name) in bits else usual
        return _matrix(name, kind, rows, columns, pieces, experts, **how)

    def norm(name: str, source: TensorSpec) -> Weight:
        kind, (size,) = formats.get(FLOATS[settings.onnx_dtype]), source.shape
        part = Part(name, FLOATS[settings.onnx_dtype], (size,), size * kind.block_bytes)
        return Weight(name, (size,), kind, (part,), (Piece(source),))

    def swiglu(name: str, mlp: Swiglu, padded: int) -> Iterator[Weight]:
        """gate and up as one matrix, gate's rows first; down."""
        pieces = (Piece(mlp.gate), Piece(mlp.up, padded))
        yield matrix(f"{name}.gate_up", 2 * padded, hidden, pieces)
        yield matrix(f"{name}.down", hidden, padded, (Piece(mlp.down),))

    yield matrix("embedding", model.vocab_size, hidden, (Piece(model.embedding),), gathered=True)
    for index in range(model.num_layers):
        layer, name = model.layer(index), f"layers.{index}"
        yield norm(f"{name}.attention.norm", layer.attention_norm)
        qkv = (Piece(layer.q), Piece(layer.k, attended), Piece(layer.v, attended + kv))
        yield matrix(f"{name}.attention.qkv", attended + 2 * kv, hidden, qkv)
        for which, source in zip("qk", layer.qk_norms or (), strict=False):
            yield norm(f"{name}.attention.{which}.norm", source)
        yield matrix(f"{name}.attention.output", hidden, attended, (Piece(layer.output),))
        yield norm(f"{name}.mlp.norm", layer.mlp_norm)
        if layer.router:
            yield _matrix(f"{name}.router", formats.get("F32"), model.num_experts, hidden, (Piece(layer.router),))
            # QMoE wants gate's and up's rows interleaved.
            gate_up, down = [], []
            for number, expert in enumerate(layer.experts):
                first = 2 * width * number
                gate_up.append(Piece(expert.gate, first, 2))
                gate_up.append(Piece(expert.up, first + 1, 2))
                down.append(Piece(expert.down, hidden * number))
            yield matrix(f"{name}.experts.gate_up", 2 * width, hidden, tuple(gate_up), model.num_experts)
            yield matrix(f"{name}.experts.down", hidden, width, tuple(down), model.num_experts)
        if layer.mlp:
            yield from swiglu(f"{name}.{'shared' if layer.router else 'mlp'}", layer.mlp, shared if layer.router else width)
    yield norm("norm", model.final_norm)
    if not model.tie_word_embeddings:
        yield matrix("head", model.vocab_size, hidden, (Piece(model.head),))


def _matrix(
    name: str,
    kind: QuantFormat,
    rows: int,
    columns: int,
    pieces: tuple[Piece, ...],
    experts: int = 0,
    *,
    gathered: bool = False,
) -> Weight:
    """A weight of `experts` matrices (0: of one) with the initialisers that its operator wants: QMoE's and
    GatherBlockQuantized's (`gathered`) codes have no dimension of groups, MatMulNBits' have."""
    outer = (experts, rows) if experts else (rows,)
    if not isinstance(kind, IntGroup):
        part = Part(name, kind.name, (*outer, columns), columns * kind.block_bytes)  # type: ignore[arg-type]
        return Weight(name, (*outer, columns), kind, (part,), pieces)
    groups, code_bytes = columns // kind.group_size, kind.group_size * kind.bits // 8
    codes = (groups * code_bytes,) if experts or gathered else (groups, code_bytes)
    scale_bytes, zero_bytes = groups * kind.scale_bytes, -(-groups * kind.bits // 8)
    parts = [
        Part(f"{name}.codes", "U8", (*outer, *codes), groups * code_bytes),
        Part(f"{name}.scales", kind.scale_type, (*outer, groups), scale_bytes),
    ]
    if not kind.symmetric:
        parts.append(Part(f"{name}.zero_points", "U8", (*outer, zero_bytes), zero_bytes))
    return Weight(name, (*outer, columns), kind, tuple(parts), pieces)
