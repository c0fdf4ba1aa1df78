"""A pre-quantised bitsandbytes checkpoint as weights under the original's names: what its tensors mean to bitsandbytes.

Written from bitsandbytes' layout (functional.py, QuantState; nn/modules.py, Linear8bitLt), apart from the exporter. Holds the
rows that it is asked for; of 4-bit weights the scales too.
"""

from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from xent_quant.checkpoint.architecture import Architecture
from xent_quant.checkpoint.files import locate
from xent_quant.checkpoint.headers import Location, parse_json, read_json
from xent_quant.checkpoint.rope import is_number, shown
from xent_quant.errors import ValidationError

F32 = NDArray[np.float32]
DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "U8": "u1", "I8": "i1"}
FLOATS = ("F32", "F16", "BF16")
STATE = "quant_state.bitsandbytes__"
LARGEST_STATE = 4096
"""Bytes of a quant state's JSON; ours have some 200."""
LARGEST_BLOCK = 1 << 20


@dataclass(frozen=True)
class _State:
    """What is said of a 4-bit weight: how many weights share a scale, how many scales share one (0: they are floats) and what is
    added to those, and the type that layers compute in."""

    block: int
    nested: int
    offset: float
    dtype: str


class BnbSource:
    """A WeightSource over such a folder. `architecture` is the reference's; the folder's own may have wider, padded experts.

    Raises ValidationError naming the tensor that is missing or has another shape than the reference asks for.
    """

    def __init__(self, folder: Path, reference: Architecture) -> None:
        self.path, self.architecture = folder, reference
        own = Architecture.from_config(read_json(folder / "config.json"), str(folder / "config.json"))
        if own.intermediate_size < reference.intermediate_size or replace(
            own, intermediate_size=reference.intermediate_size, tie_word_embeddings=reference.tie_word_embeddings
        ) != replace(reference, max_position_embeddings=own.max_position_embeddings):
            raise ValidationError(f"{folder / 'config.json'}: describes another model than the reference's config.json")
        self._locations = locate(folder)
        self._padded: dict[str, tuple[int, ...]] = {}
        self._kinds: dict[str, str] = {}
        self._states: dict[str, _State] = {}
        for spec in own.each_tensor():  # one by one: a config may ask for more than a memory holds
            self._padded[spec.name] = spec.shape
            self._kinds[spec.name] = self._kind(spec.name, spec.shape)
        self._shapes = {spec.name: spec.shape for spec in reference.each_tensor()}
        for name in self._shapes:
            if name not in self._kinds:
                raise self._missing(name)

    def _missing(self, name: str) -> ValidationError:
        return ValidationError(f"{self.path}: {name} is missing; export it again")

    def _kind(self, name: str, shape: tuple[int, ...]) -> str:
        """How a weight is stored; all that is stored for it is there, and of the right types and sizes."""
        for kind in ("nf4", "fp4"):
            if f"{name}.{STATE}{kind}" in self._locations:
                self._states[name] = self._state(name, kind, shape)
                return kind.upper()
        info = self._checked(name, (*FLOATS, "I8"), shape).info
        if info.dtype != "I8":
            return info.dtype
        if len(shape) != 2:
            raise ValidationError(f"{self.path}: {name}: INT8 where a matrix is no such layer's; export it again")
        self._checked(f"{name.removesuffix('weight')}SCB", ("F32",), shape[:1])
        return "INT8"

    def _checked(self, name: str, dtypes: tuple[str, ...], shape: tuple[int, ...] | None, count: int | None = None) -> Location:
        """A stored tensor of one of these types, and of this shape, or of so many elements."""
        if name not in self._locations:
            raise self._missing(name)
        where = self._locations[name]
        info = where.info
        if where.offset is None:
            raise ValidationError(f"{where.file}: is read as .safetensors alone; export it again")
        if info.dtype not in dtypes or (info.shape != shape if shape is not None else info.n_weights != count):
            wanted = list(shape) if shape is not None else f"{count} elements"
            raise ValidationError(
                f"{where.file}: {name} is {info.dtype} {list(info.shape)}, {' or '.join(dtypes)} {wanted} was expected; "
                "export it again"
            )
        return where

    def _state(self, name: str, kind: str, shape: tuple[int, ...]) -> _State:
        """What a 4-bit weight's state says, and its parts are."""
        count = prod(shape)
        where = self._locations[f"{name}.{STATE}{kind}"]

        def refuse(what: str) -> ValidationError:
            return ValidationError(f"{where.file}: {where.info.name}: {what}; export it again")

        if where.info.dtype != "U8" or not 0 < where.info.n_weights <= LARGEST_STATE or where.offset is None:
            raise refuse("is no quant state")
        try:
            said = parse_json(self._raw(where.info.name).tobytes(), unique=True)
        except ValueError as error:
            raise refuse(f"is not JSON ({error})") from error
        if not isinstance(said, dict):
            raise refuse("is no quant state")
        block, nested, offset = (said.get(key, 0) for key in ("blocksize", "nested_blocksize", "nested_offset"))
        dtype = said.get("dtype")
        if not all(type(size) is int and 0 <= size <= LARGEST_BLOCK for size in (block, nested)) or not block:
            raise refuse(f"has blocks of {shown(block)} weights and {shown(nested)} scales")
        if not is_number(offset) or dtype not in ("float32", "bfloat16", "float16"):
            raise refuse(f"has offset {shown(offset)} and type {shown(dtype)}")
        if said.get("shape") != list(shape):
            raise refuse(f"is of a weight of shape {shown(said.get('shape'))}, {list(shape)} was expected")
        blocks = -(-count // block)
        self._checked(name, ("U8",), None, -(-count // 2))
        self._checked(f"{name}.absmax", ("U8",) if nested else ("F32",), None, blocks)
        self._checked(f"{name}.quant_map", ("F32",), None, 16)
        if nested:
            self._checked(f"{name}.nested_absmax", ("F32",), None, -(-blocks // nested))
            self._checked(f"{name}.nested_quant_map", ("F32",), None, 256)
        return _State(block, nested, float(offset), dtype)

    def type(self, name: str) -> str:
        """NF4, FP4, INT8, F32, F16 or BF16."""
        return self._kinds[name]

    def _raw(self, name: str, start: int = 0, count: int | None = None) -> NDArray[np.generic]:
        """Elements start… of a stored tensor that was checked, flat."""
        where = self._locations[name]
        dtype = np.dtype(DTYPES[where.info.dtype])
        count = prod(where.info.shape) - start if count is None else count
        found: NDArray[np.generic] = np.fromfile(where.file, dtype, count, offset=(where.offset or 0) + start * dtype.itemsize)
        if found.size != count:
            raise ValidationError(f"{where.file}: {name}: the file ends before the tensor does; export it again")
        return found

    def _rows(self, name: str, start: int, stop: int) -> F32:
        """Rows with their padding; a vector is one row."""
        shape, kind = self._padded[name], self._kinds[name]
        columns = shape[-1]
        first, count = start * columns, (stop - start) * columns
        if kind in ("NF4", "FP4"):
            return self._four_bit(name, first, count).reshape(-1, columns)
        values = self._raw(name, first, count).reshape(-1, columns)
        if kind == "BF16":
            return (values.astype(np.uint32) << 16).view(np.float32)
        if kind == "INT8":
            scales = self._raw(f"{name.removesuffix('weight')}SCB", start, stop - start).astype(np.float32)
            return values.astype(np.float32) * (scales[:, None] / np.float32(127))
        return values.astype(np.float32)

    def _four_bit(self, name: str, first: int, count: int) -> F32:
        """`count` weights from `first` on: code table · scale of the block, rounded to the dtype that layers compute in."""
        state, begin = self._states[name], first // 2 * 2
        packed = self._raw(name, begin // 2, -(-(first + count) // 2) - begin // 2).astype(np.uint8)
        codes = np.stack([packed >> 4, packed & 15], -1).ravel()[first - begin : first - begin + count]  # high half first
        scales = self._raw(f"{name}.absmax")
        if state.nested:
            nested = self._raw(f"{name}.nested_absmax").astype(np.float32)
            table = self._raw(f"{name}.nested_quant_map").astype(np.float32)
            of = np.arange(len(scales)) // state.nested
            scales = table[scales.astype(np.int64)] * nested[of] + np.float32(state.offset)
        table = self._raw(f"{name}.quant_map").astype(np.float32)
        values: F32 = table[codes] * scales.astype(np.float32)[np.arange(first, first + count) // state.block]
        if state.dtype == "bfloat16":
            wide = values.view(np.uint32)
            values = ((wide + 0x7FFF + ((wide >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)
        elif state.dtype == "float16":
            values = values.astype(np.float16).astype(np.float32)
        return values

    def read(self, name: str, start: int = 0, stop: int | None = None) -> F32:
        """Rows start:stop of a checkpoint tensor (elements of a vector), padding dropped."""
        shape = self._shapes[name]
        stop = shape[0] if stop is None else stop
        if len(shape) == 1:
            return self._rows(name, 0, 1)[0, start:stop]
        return np.ascontiguousarray(self._rows(name, start, stop)[:, : shape[1]])

    def padding(self, name: str) -> float:
        """See `TypedSource`."""
        shape, padded = self._shapes[name], self._padded[name]
        if padded == shape:
            return 0.0
        if padded[0] > shape[0]:
            return float(np.abs(self._rows(name, shape[0], padded[0])).max())
        return float(np.abs(self._rows(name, 0, shape[0])[:, shape[1] :]).max())
