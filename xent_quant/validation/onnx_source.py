"""An exported ONNX folder as weights under the checkpoint's names: what its initialisers mean to ONNX Runtime's operators.

Written apart from the exporter, against the operators' documentation, so that a slip in one shows against the other. Holds
the rows that it is asked for.
"""

import re
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xent_quant.checkpoint.architecture import Architecture
from xent_quant.checkpoint.headers import read_json
from xent_quant.errors import ValidationError
from xent_quant.tensors import ATTENTION_ROLES, Role, TensorSpec

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]

DATA_FILE = "model.onnx.data"
ITEM = {1: 4, 2: 1, 10: 2, 16: 2}
"""Bytes of onnx.TensorProto's FLOAT, UINT8, FLOAT16, BFLOAT16."""
CODES = 2
LARGEST_GRAPH = 1 << 28
"""Bytes of model.onnx without its weights; that of A4.2B has some hundred thousand."""
FLOATS = {1: "F32", 10: "F16", 16: "BF16"}


@dataclass(frozen=True)
class _Tensor:
    """An initialiser in the data file: shape, onnx's number of its type, and where its bytes begin."""

    name: str
    dims: tuple[int, ...]
    data_type: int
    offset: int

    @property
    def nbytes(self) -> int:
        return prod(self.dims) * ITEM[self.data_type]


@dataclass(frozen=True)
class _Stored:
    """A weight's initialisers, and `bits` and `block_size` of the node that reads them (0 where it is float). `rows` is what
    its dimensions make up when all but those of a row are taken together."""

    values: _Tensor  # codes, or floats
    scales: _Tensor | None
    zeros: _Tensor | None
    bits: int
    block_size: int

    @property
    def row_dims(self) -> int:
        """Which dimension a row's begin with: experts have one more."""
        return 2 if len(self.values.dims) == 3 and "experts" in self.values.name else 1

    def columns(self, tensor: _Tensor) -> int:
        """Elements of one row of `values`, `scales` or `zeros`."""
        return prod(tensor.dims[self.row_dims :])

    @property
    def rows(self) -> int:
        return prod(self.values.dims[: self.row_dims])

    @property
    def width(self) -> int:
        """Weights of a row, padding included."""
        return self.columns(self.values) * (8 // self.bits if self.bits else 1)


@dataclass(frozen=True)
class _Place:
    """Rows first, first + stride, … of a stored weight, of `shape`, are a checkpoint tensor."""

    stored: _Stored
    first: int
    stride: int
    shape: tuple[int, ...]


class OnnxSource:
    """A WeightSource over an exported folder. Raises ValidationError where it is damaged or no export of this project."""

    def __init__(self, folder: Path) -> None:
        import onnx
        from google.protobuf.message import DecodeError

        self.path = folder
        config = read_json(folder / "config.json")
        config = {**config, "model_type": config.get("source_model_type", config.get("model_type"))}
        self.architecture = Architecture.from_config(config, str(folder / "config.json"))
        self._specs: dict[str, TensorSpec] = {}
        self._file = folder / "model.onnx"
        self._data = folder / DATA_FILE
        if not self._file.is_file() or self._file.stat().st_size > LARGEST_GRAPH:
            raise ValidationError(f"{self._file}: is no file of a graph; export it again")
        model = onnx.ModelProto()
        try:
            model.ParseFromString(self._file.read_bytes())
        except (DecodeError, RuntimeError) as error:
            raise ValidationError(f"{self._file}: not readable ({error}); export it again") from error
        self._tensors: dict[str, _Tensor] = {}
        for tensor in model.graph.initializer:
            if tensor.external_data:
                if not isinstance(tensor.name, str):  # bytes that are no UTF-8
                    raise ValidationError(f"{self._file}: a weight's name is no text; export it again")
                if tensor.name in self._tensors:
                    raise self._refuse(tensor.name, "comes twice")
                self._tensors[tensor.name] = self._external(tensor)
        self._attributes: dict[str, dict[str, int]] = {}
        for node in model.graph.node:
            integers = {attribute.name: attribute.i for attribute in node.attribute if attribute.type == attribute.INT}
            for name in node.input:
                if name in self._tensors:
                    self._attributes[name] = integers
        for spec in self.architecture.each_tensor():  # a config may name millions: the first that is missing ends it
            self._specs[spec.name] = spec
            self._check(self._place(spec.name), spec.name)

    def _refuse(self, name: str, what: str) -> ValidationError:
        return ValidationError(f"{self._file}: {name[:100]!r}: {what}; export it again")

    def _external(self, tensor: Any) -> _Tensor:
        """An initialiser whose bytes lie in the data file, and nowhere else."""
        entries = {entry.key: entry.value for entry in tensor.external_data if isinstance(entry.value, str)}
        location = entries.get("location", "")
        if location != DATA_FILE:
            raise self._refuse(tensor.name, f"its data lie in {location[:100]!r}, those of our exports in {DATA_FILE}")
        if tensor.data_type not in ITEM:
            raise self._refuse(tensor.name, f"has onnx type {tensor.data_type}, none of {', '.join(map(str, ITEM))}")
        offset, length = (entries.get(key, "") for key in ("offset", "length"))
        if not all(re.fullmatch("[0-9]{1,18}", number) for number in (offset, length)):
            raise self._refuse(tensor.name, f"offset {offset[:20]!r} and length {length[:20]!r} are no places in {DATA_FILE}")
        found = _Tensor(tensor.name, tuple(tensor.dims), tensor.data_type, int(offset))
        if not found.dims or min(found.dims) < 1 or found.nbytes != int(length):
            raise self._refuse(tensor.name, f"{length} bytes do not make the shape {list(found.dims[:8])}")
        if found.offset + found.nbytes > self._data.stat().st_size:
            raise ValidationError(f"{self._data}: ends before {tensor.name[:100]!r} does; export it again")
        return found

    def _check(self, place: "_Place", name: str) -> None:
        """Raise ValidationError where a weight's initialisers do not belong together, or hold fewer rows or columns than it."""
        stored, shape = place.stored, place.shape
        rows, columns = (1, *shape) if len(shape) == 1 else shape
        if len(shape) == 1:
            right = prod(stored.values.dims) == columns
        else:
            right = place.first + place.stride * (rows - 1) < stored.rows and stored.width >= columns
        if stored.scales is not None:
            blocks = stored.width // stored.block_size
            right = right and stored.width == blocks * stored.block_size
            right = right and stored.columns(stored.scales) == blocks and prod(stored.scales.dims) == blocks * stored.rows
            if stored.zeros is not None:
                each = stored.columns(stored.zeros)
                right = right and each == -(-blocks * stored.bits // 8) and prod(stored.zeros.dims) == each * stored.rows
        for part in (stored.scales, stored.zeros):  # ONNX Runtime's process may end where an operator gets one without the other
            if part is not None and self._attributes.get(part.name) is not self._attributes.get(stored.values.name):
                raise self._refuse(part.name, f"does not go where {stored.values.name} does")
        if not right:
            raise self._refuse(stored.values.name, f"its shape {list(stored.values.dims)} does not fit {name} {list(shape)}")

    def type(self, name: str) -> str:
        """How a checkpoint tensor is stored, as INT4, INT8, F32, F16 or BF16."""
        return _type(self._place(name).stored)

    def stored(self) -> list[tuple[str, int, int]]:
        """(type, weights with padding, bytes) of every weight in the file."""
        outside = [name for name in self._tensors if name not in ("cos", "sin")]
        found = []
        for name in {re.sub(r"\.(codes|scales|zero_points)$", "", name) for name in outside}:
            weight = self._stored(name)
            parts = [part for part in (weight.values, weight.scales, weight.zeros) if part is not None]
            found.append((_type(weight), weight.rows * weight.width, sum(part.nbytes for part in parts)))
        return sorted(found)

    def padding(self, name: str) -> float:
        """See `TypedSource`: of the columns behind a down projection's own; rows of padding count with gate and up."""
        place = self._place(name)
        rows, columns = place.shape if len(place.shape) == 2 else (1, place.shape[0])
        largest = 0.0
        for start in range(0, rows, 1024):
            beyond = self._rows(place, start, min(start + 1024, rows))[:, columns:]
            largest = max(largest, float(np.abs(beyond).max(initial=0)))
        return largest

    def read(self, name: str, start: int = 0, stop: int | None = None) -> F32:
        """Rows start:stop of a checkpoint tensor, elements of a vector."""
        place = self._place(name)
        if len(place.shape) == 1:
            vector: F32 = self._rows(place, 0, 1)[0]
            return vector[start:stop]
        stop = place.shape[0] if stop is None else stop
        return np.ascontiguousarray(self._rows(place, start, stop)[:, : place.shape[1]])

    def _stored(self, name: str) -> _Stored:
        """Raises ValidationError where its parts are not all there, or not of their types."""
        values = self._tensors.get(name)
        if values is not None:
            if values.data_type not in FLOATS:
                raise self._refuse(name, f"has onnx type {values.data_type}, a float was expected")
            return _Stored(values, None, None, 0, 0)
        codes, scales, zeros = (self._tensors.get(f"{name}.{part}") for part in ("codes", "scales", "zero_points"))
        if codes is None or scales is None:
            raise ValidationError(f"{self._file}: has no weight {name[:100]}; it is not an export of xent-quant")
        attributes = self._attributes.get(codes.name, {})
        bits, block_size = attributes.get("expert_weight_bits") or attributes.get("bits"), attributes.get("block_size", 0)
        if bits not in (4, 8) or block_size < 1:
            raise self._refuse(codes.name, f"is read as codes of {bits} bits in blocks of {block_size}")
        if codes.data_type != CODES or scales.data_type not in FLOATS or (zeros is not None and zeros.data_type != CODES):
            raise self._refuse(codes.name, "its codes, scales or zero points are of types that they never are")
        return _Stored(codes, scales, zeros, bits, block_size)

    def _place(self, name: str) -> _Place:
        model, spec = self.architecture, self._specs.get(name)
        if spec is None:
            raise ValidationError(f"{name}: not a tensor of the architecture")
        layer, role = f"layers.{spec.layer}", spec.role
        if spec.layer is None:
            where = {Role.EMBEDDING: "embedding", Role.NORM: "norm", Role.HEAD: "head"}[role]
            return _Place(self._stored(where), 0, 1, spec.shape)
        if role is Role.NORM:
            part = {"attention": "attention", "mlp": "mlp", "q": "attention.q", "k": "attention.k"}[spec.normed or ""]
            return _Place(self._stored(f"{layer}.{part}.norm"), 0, 1, spec.shape)
        if role is Role.ROUTER:
            return _Place(self._stored(f"{layer}.router"), 0, 1, spec.shape)
        if role is Role.ATTENTION_OUTPUT:
            return _Place(self._stored(f"{layer}.attention.output"), 0, 1, spec.shape)
        if role in ATTENTION_ROLES:
            queries, keys = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
            first = {Role.ATTENTION_Q: 0, Role.ATTENTION_K: queries, Role.ATTENTION_V: queries + keys}[role]
            return _Place(self._stored(f"{layer}.attention.qkv"), first, 1, spec.shape)
        part = "experts" if spec.expert is not None else "shared" if spec.shared else "mlp"
        stored = self._stored(f"{layer}.{part}.{'down' if role is Role.DOWN else 'gate_up'}")
        if spec.expert is not None:
            first = spec.expert * (stored.rows // stored.values.dims[0]) + (role is Role.UP)
            return _Place(stored, first, 1 if role is Role.DOWN else 2, spec.shape)
        return _Place(stored, stored.values.dims[0] // 2 if role is Role.UP else 0, 1, spec.shape)

    def _rows(self, place: _Place, start: int, stop: int) -> F32:
        """[stop − start, columns with padding]."""
        stored = place.stored

        def raw(tensor: _Tensor) -> U8:
            row = stored.columns(tensor) * ITEM[tensor.data_type] if len(place.shape) > 1 else tensor.nbytes
            count = (place.stride * (stop - start - 1) + 1) * row
            offset = tensor.offset + (place.first + place.stride * start) * row
            found = np.fromfile(self._data, np.uint8, count=count, offset=offset)
            if found.size != count:
                raise ValidationError(f"{self._data}: ends before {tensor.name} does; export it again")
            return found.reshape(-1, row)[:: place.stride]

        def floats(tensor: _Tensor) -> F32:
            rows = np.ascontiguousarray(raw(tensor))
            if tensor.data_type == 16:  # bfloat16
                return (rows.view("<u2").astype(np.uint32) << 16).view(np.float32)
            return rows.view("<f4" if tensor.data_type == 1 else "<f2").astype(np.float32)

        if stored.scales is None:
            return floats(stored.values)
        codes, scales = _unpacked(raw(stored.values), stored.bits).astype(np.float32), floats(stored.scales)
        zeros: F32 | float = float(2 ** (stored.bits - 1))
        if stored.zeros is not None:
            zeros = _unpacked(raw(stored.zeros), stored.bits)[:, : scales.shape[1]].astype(np.float32)[:, :, None]
        groups = codes.reshape(len(codes), -1, stored.block_size)
        values: F32 = (groups - zeros) * scales[:, :, None]
        return values.reshape(len(codes), -1)


def _type(stored: _Stored) -> str:
    return f"INT{stored.bits}" if stored.bits else FLOATS[stored.values.data_type]


def _unpacked(rows: U8, bits: int) -> U8:
    """Bytes to codes; of two 4-bit codes in a byte the first is the low one."""
    return rows if bits == 8 else np.stack([rows & 15, rows >> 4], -1).reshape(len(rows), -1)
