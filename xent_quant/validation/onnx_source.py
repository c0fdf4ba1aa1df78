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
from xent_quant.tensors import ATTENTION_ROLES, Role

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]

ITEM = {1: 4, 2: 1, 10: 2, 16: 2}
"""Bytes of onnx.TensorProto's FLOAT, UINT8, FLOAT16, BFLOAT16."""


@dataclass(frozen=True)
class _Stored:
    """A weight's initialisers, and `bits` and `block_size` of the node that reads them (0 where it is float)."""

    values: Any  # onnx.TensorProto: codes, or floats
    scales: Any | None
    zeros: Any | None
    bits: int
    block_size: int


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

        self.folder = folder
        config = read_json(folder / "config.json")
        config = {**config, "model_type": config.get("source_model_type", config.get("model_type"))}
        self.architecture = Architecture.from_config(config, str(folder / "config.json"))
        self._specs = self.architecture.tensors()
        try:
            model = onnx.load(folder / "model.onnx", load_external_data=False)
        except Exception as error:  # protobuf's DecodeError is not importable by a stable name
            raise ValidationError(f"{folder / 'model.onnx'}: not readable ({error}); export it again") from error
        self._tensors: dict[str, Any] = {tensor.name: tensor for tensor in model.graph.initializer}
        self._attributes: dict[str, dict[str, Any]] = {}
        for node in model.graph.node:
            found = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
            for name in node.input:
                if name in self._tensors:
                    self._attributes[name] = found

    def type(self, name: str) -> str:
        """How a checkpoint tensor is stored, as INT4, INT8, F32, F16 or BF16."""
        return _type(self._place(name).stored)

    def stored(self) -> list[tuple[str, int, int]]:
        """(type, weights with padding, bytes) of every weight in the file."""
        outside = [name for name, tensor in self._tensors.items() if tensor.external_data and name not in ("cos", "sin")]
        found = []
        for name in {re.sub(r"\.(codes|scales|zero_points)$", "", name) for name in outside}:
            weight = self._stored(name)
            parts = [part for part in (weight.values, weight.scales, weight.zeros) if part is not None]
            count = prod(weight.values.dims) * 8 // weight.bits if weight.bits else prod(weight.values.dims)
            found.append((_type(weight), count, sum(prod(part.dims) * ITEM[part.data_type] for part in parts)))
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
        if name in self._tensors:
            return _Stored(self._tensors[name], None, None, 0, 0)
        if f"{name}.codes" not in self._tensors:
            raise ValidationError(f"{self.folder / 'model.onnx'}: has no weight {name}; it is not an export of xent-quant")
        attributes = self._attributes[f"{name}.codes"]
        return _Stored(
            self._tensors[f"{name}.codes"],
            self._tensors[f"{name}.scales"],
            self._tensors.get(f"{name}.zero_points"),
            attributes.get("expert_weight_bits") or attributes["bits"],
            attributes["block_size"],
        )

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
            first = spec.expert * stored.values.dims[1] + (role is Role.UP)
            return _Place(stored, first, 1 if role is Role.DOWN else 2, spec.shape)
        return _Place(stored, stored.values.dims[0] // 2 if role is Role.UP else 0, 1, spec.shape)

    def _rows(self, place: _Place, start: int, stop: int) -> F32:
        """[stop − start, columns with padding]."""
        stored = place.stored
        expert_dims = 2 if len(stored.values.dims) == 3 and "experts" in stored.values.name else 1

        def raw(tensor: Any) -> U8:
            item = ITEM[tensor.data_type]
            row = prod(tensor.dims[expert_dims:]) * item if len(place.shape) > 1 else prod(tensor.dims) * item
            entries = {entry.key: entry.value for entry in tensor.external_data}
            count = (place.stride * (stop - start - 1) + 1) * row
            offset = int(entries["offset"]) + (place.first + place.stride * start) * row
            found = np.fromfile(self.folder / entries["location"], np.uint8, count=count, offset=offset)
            if found.size != count:
                raise ValidationError(f"{self.folder / entries['location']}: ends before {tensor.name} does; export it again")
            return found.reshape(-1, row)[:: place.stride]

        def floats(tensor: Any) -> F32:
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
    return f"INT{stored.bits}" if stored.bits else {1: "F32", 10: "F16", 16: "BF16"}[stored.values.data_type]


def _unpacked(rows: U8, bits: int) -> U8:
    """Bytes to codes; of two 4-bit codes in a byte the first is the low one."""
    return rows if bits == 8 else np.stack([rows & 15, rows >> 4], -1).reshape(len(rows), -1)
