"""Checkpoints that are quantised already and can be read all the same: FP8, and compressed-tensors with integer or FP8 weights.

Layouts: transformers' integrations/finegrained_fp8.py; compressed-tensors' compressors (pack_quantized, naive_quantized).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from xent_quant.checkpoint.headers import Location
from xent_quant.checkpoint.rope import shown
from xent_quant.checkpoint.sources import Packed, Scaled, Source, integers
from xent_quant.errors import CheckpointError, UnsupportedError
from xent_quant.tensors import TensorSpec

FORMATS = ("pack-quantized", "int-quantized", "naive-quantized", "float-quantized", "dense", "mixed-precision")
PACKED_BITS = (2, 4, 8)
"""Sizes that divide a word; how others are packed changed from one compressed-tensors to the next."""
SCALES = ("F32", "F16", "BF16", "F8_E8M0")
CODES = ("F8_E4M3", "I8")


@dataclass(frozen=True)
class Scheme:
    """What config.json says of how weights are stored; of blocks, bits and groups all that are named anywhere, since each
    tensor's own shapes decide between them."""

    method: str
    blocks: tuple[tuple[int, int], ...]
    bits: tuple[int, ...] = ()
    groups: tuple[int, ...] = ()

    @classmethod
    def of(cls, config: Mapping[str, Any], source: str) -> "Scheme | None":
        """None where there is no quantization_config. Raises UnsupportedError for one that cannot be read."""
        given: Any = config.get("quantization_config") or config.get("compression_config")
        if not given:
            return None
        method: Any = given.get("quant_method") if isinstance(given, dict) else given
        if not isinstance(given, dict) or method not in ("fp8", "compressed-tensors"):
            named = method if isinstance(method, str) else shown(method)
            raise UnsupportedError(
                f"{source}: is quantised already ({named[:60]}), in a way that is not read; "
                "give the checkpoint that it was made from"
            )

        def refuse(what: str) -> UnsupportedError:
            return UnsupportedError(
                f"{source}: quantization_config: {what} is not read; give the checkpoint that it was made from"
            )

        if method == "fp8":
            block = given.get("weight_block_size")
            if block is not None and not _is_block(block):
                raise refuse(f"weight_block_size {shown(block)}")
            if given.get("fmt") not in (None, "e4m3"):
                raise refuse(f"fmt {shown(given['fmt'])}")
            return cls(method, (tuple(block),) if block else ())
        if given.get("quantization_status") not in (None, "compressed", "frozen"):  # older ones of the latter are packed, too
            raise refuse(f"quantization_status {shown(given['quantization_status'])}")
        if given.get("transform_config"):
            raise refuse("transform_config (rotated weights)")
        sparsity = given.get("sparsity_config") or {}
        if not isinstance(sparsity, dict) or sparsity.get("format") not in (None, "dense"):
            raise refuse("sparsity_config")
        if given.get("format") not in (None, *FORMATS):
            raise refuse(f"format {shown(given['format'])}")
        by_name: Any = given.get("config_groups")
        groups = list(by_name.values()) if isinstance(by_name, dict) else []
        blocks: list[tuple[int, int]] = []
        bits: list[int] = []
        sizes: list[int] = []
        for group in groups:
            weights = group.get("weights") if isinstance(group, dict) else None
            if isinstance(group, dict) and group.get("format") not in (None, *FORMATS):
                raise refuse(f"format {shown(group['format'])}")
            if not isinstance(weights, dict):
                continue  # activations alone
            count: Any = weights.get("num_bits")
            kind = weights.get("type")
            if (kind == "int" and count not in PACKED_BITS) or (kind == "float" and count != 8) or kind not in ("int", "float"):
                raise refuse(f"weights of type {shown(kind)} and {shown(count)} bits")
            bits.append(count)
            if isinstance(weights.get("group_size"), int) and weights["group_size"] > 0:
                sizes.append(weights["group_size"])
            if _is_block(weights.get("block_structure")):
                blocks.append((weights["block_structure"][0], weights["block_structure"][1]))
        return cls(method, tuple(dict.fromkeys(blocks)), tuple(dict.fromkeys(bits)), tuple(dict.fromkeys(sizes)))

    @property
    def note(self) -> str:
        return (
            f"The checkpoint's weights are quantised already ({self.method}): they are dequantised on reading, and what that "
            "quantisation lost stays lost. The checkpoint that it was made from is a better source."
        )


def _is_block(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(size) is int and size > 0 for size in value)


def source(spec: TensorSpec, stored: Mapping[str, Location], scheme: Scheme) -> Source | None:
    """How a weight that is stored as codes is read; None where it is not. Raises CheckpointError for parts that are missing or of
    shapes that do not belong together, UnsupportedError for what is not read."""
    base = spec.name.removesuffix(".weight")
    packed, plain = stored.get(f"{base}.weight_packed"), stored.get(spec.name)
    if packed is None and (plain is None or plain.info.dtype not in CODES):
        return None
    codes = packed or plain
    assert codes is not None
    if len(spec.shape) != 2:
        raise UnsupportedError(f"{codes.file}: {codes.info.name}: a quantised {spec.role} is not read")
    names = [f"{base}.weight_scale_inv", f"{base}.weight_scale"]
    scales = next((stored[name] for name in names if name in stored), None)
    if scales is None:
        raise CheckpointError(f"{codes.file}: {codes.info.name}: {codes.info.dtype} without {names[1]}; download it again")
    if scales.info.dtype not in SCALES:
        raise UnsupportedError(f"{scales.file}: {scales.info.name}: scales of type {scales.info.dtype} are not read")
    zeros = stored.get(f"{base}.weight_zero_point")
    return _packed(spec, codes, scales, zeros, stored, scheme) if packed else _scaled(spec, codes, scales, zeros, scheme)


def _scaled(spec: TensorSpec, codes: Location, scales: Location, zeros: Location | None, scheme: Scheme) -> Scaled:
    rows, columns = _check(codes, codes.info.shape, spec.shape)
    shape = scales.info.shape
    shape = shape if len(shape) == 2 else (*shape, 1) if len(shape) == 1 else (1, 1)
    if prod(shape) == 1:
        block = (rows, columns)
    elif shape == (rows, 1):
        block = (1, columns)
    else:
        candidates = [*scheme.blocks, *((1, size) for size in scheme.groups)]
        fitting = [(a, b) for a, b in candidates if shape == (-(-rows // a), -(-columns // b))]
        if not fitting:
            named = ", ".join(f"{a} × {b}" for a, b in candidates) or "none"
            raise CheckpointError(
                f"{scales.file}: {scales.info.name}: shape {list(scales.info.shape)} does not fit a weight of {list(spec.shape)} "
                f"in the blocks that config.json names ({named}); download both again"
            )
        block = fitting[0]
    if zeros is not None and (zeros.info.dtype not in ("I8", "U8") or prod(zeros.info.shape) != prod(shape)):
        raise CheckpointError(
            f"{zeros.file}: {zeros.info.name}: {zeros.info.dtype} {list(zeros.info.shape)} is no zero point here"
        )
    return Scaled(codes, scales, zeros, block, scheme.method == "compressed-tensors")


def _packed(
    spec: TensorSpec,
    codes: Location,
    scales: Location,
    zeros: Location | None,
    stored: Mapping[str, Location],
    scheme: Scheme,
) -> Packed:
    rows, columns = spec.shape
    base = spec.name.removesuffix(".weight")
    original = stored.get(f"{base}.weight_shape")
    if original is not None:
        if original.info.dtype not in ("I64", "I32") or prod(original.info.shape) != 2:
            raise CheckpointError(f"{original.file}: {original.info.name}: is not two integers; download it again")
        _check(codes, tuple(integers(original).tolist()), spec.shape)
    bits = [each for each in scheme.bits if codes.info.shape == (rows, -(-columns * each // 32))]
    if codes.info.dtype != "I32" or len(bits) != 1:
        raise CheckpointError(
            f"{codes.file}: {codes.info.name}: {codes.info.dtype} {list(codes.info.shape)} does not hold {list(spec.shape)} "
            f"weights of {' or '.join(map(str, scheme.bits)) or 'unknown'} bits; download it again"
        )
    shape = scales.info.shape if len(scales.info.shape) == 2 else (*scales.info.shape, 1)
    sizes = [size for size in (columns, *scheme.groups) if shape == (rows, -(-columns // size))]
    if prod(shape) == 1:
        sizes = [columns]
    if not sizes:
        raise CheckpointError(
            f"{scales.file}: {scales.info.name}: shape {list(scales.info.shape)} does not fit a weight of {list(spec.shape)} in "
            f"groups of {', '.join(map(str, scheme.groups)) or 'whole rows'}; download both again"
        )
    if zeros is not None:
        wanted = (-(-rows * bits[0] // 32), shape[1])
        if zeros.info.dtype != "I32" or zeros.info.shape != wanted:
            raise CheckpointError(
                f"{zeros.file}: {zeros.info.name}: {zeros.info.dtype} {list(zeros.info.shape)}, I32 {list(wanted)} was expected"
            )
    order = stored.get(f"{base}.weight_g_idx")
    if order is not None and not _is_order(order, columns, shape[1]):
        raise CheckpointError(f"{order.file}: {order.info.name}: does not name a group for each of {columns} columns")
    return Packed(codes, scales, zeros, order, bits[0], sizes[0], columns)


def _is_order(order: Location, columns: int, groups: int) -> bool:
    """Whether it names one of `groups` for every column; −1 throughout stands for their own order."""
    if order.info.dtype not in ("I32", "I64") or order.info.shape != (columns,):
        return False
    found = integers(order)
    return bool((found == -1).all() or ((found >= 0) & (found < groups)).all())


def _check(codes: Location, found: tuple[int, ...], wanted: tuple[int, ...]) -> tuple[int, int]:
    if found != wanted:
        raise CheckpointError(f"{codes.file}: {codes.info.name}: shape {list(found)}, config.json asks for {list(wanted)}")
    return wanted[0], wanted[1]
