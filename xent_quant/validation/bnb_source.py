"""A pre-quantised bitsandbytes checkpoint as weights under the original's names: what its tensors mean to bitsandbytes.

Written from bitsandbytes' layout (functional.py, QuantState; nn/modules.py, Linear8bitLt), apart from the exporter. Holds the
rows that it is asked for; of 4-bit weights the scales too.
"""

import json
from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from xent_quant.checkpoint.architecture import Architecture
from xent_quant.checkpoint.files import locate
from xent_quant.checkpoint.headers import read_json
from xent_quant.errors import ValidationError

F32 = NDArray[np.float32]
DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "U8": "u1", "I8": "i1"}
STATE = "quant_state.bitsandbytes__"


class BnbSource:
    """A WeightSource over such a folder. `architecture` is the reference's; the folder's own may have wider, padded experts.

    Raises ValidationError naming the tensor that is missing or has another shape than the reference asks for.
    """

    def __init__(self, folder: Path, reference: Architecture) -> None:
        self.folder, self.architecture = folder, reference
        own = Architecture.from_config(read_json(folder / "config.json"), str(folder / "config.json"))
        if own.intermediate_size < reference.intermediate_size or replace(
            own, intermediate_size=reference.intermediate_size, tie_word_embeddings=reference.tie_word_embeddings
        ) != replace(reference, max_position_embeddings=own.max_position_embeddings):
            raise ValidationError(f"{folder / 'config.json'}: describes another model than the reference's config.json")
        self._locations = locate(folder)
        self._padded, self._shapes = ({name: spec.shape for name, spec in each.tensors().items()} for each in (own, reference))
        self._kinds = {name: self._kind(name) for name in self._shapes}

    def _kind(self, name: str) -> str:
        if name not in self._locations:
            raise ValidationError(f"{self.folder}: {name} is missing; export it again")
        for kind in ("nf4", "fp4"):
            if f"{name}.{STATE}{kind}" in self._locations:
                return kind.upper()
        info = self._locations[name].info
        if info.shape != self._padded[name]:
            raise ValidationError(f"{self.folder}: {name} has shape {list(info.shape)}, not {list(self._padded[name])}")
        return "INT8" if info.dtype == "I8" else info.dtype

    def type(self, name: str) -> str:
        """NF4, FP4, INT8, F32, F16 or BF16."""
        return self._kinds[name]

    def _raw(self, name: str, start: int = 0, count: int | None = None) -> NDArray[np.generic]:
        """Elements start… of a stored tensor, flat."""
        if name not in self._locations:
            raise ValidationError(f"{self.folder}: {name} is missing; export it again")
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
            return self._four_bit(name, kind, first, count).reshape(-1, columns)
        values = self._raw(name, first, count).reshape(-1, columns)
        if kind == "BF16":
            return (values.astype(np.uint32) << 16).view(np.float32)
        if kind == "INT8":
            scales = self._raw(f"{name.removesuffix('weight')}SCB", start, stop - start).astype(np.float32)
            return values.astype(np.float32) * (scales[:, None] / np.float32(127))
        return values.astype(np.float32)

    def _four_bit(self, name: str, kind: str, first: int, count: int) -> F32:
        """`count` weights from `first` on: code table · scale of the block, rounded to the dtype that layers compute in."""
        state = json.loads(self._raw(f"{name}.{STATE}{kind.lower()}").tobytes())
        block, begin = state["blocksize"], first // 2 * 2
        packed = self._raw(name, begin // 2, -(-(first + count) // 2) - begin // 2).astype(np.uint8)
        codes = np.stack([packed >> 4, packed & 15], -1).ravel()[first - begin : first - begin + count]  # high half first
        scales = self._raw(f"{name}.absmax")
        if "nested_blocksize" in state:
            nested = self._raw(f"{name}.nested_absmax").astype(np.float32)
            table = self._raw(f"{name}.nested_quant_map").astype(np.float32)
            of = np.arange(len(scales)) // state["nested_blocksize"]
            scales = table[scales.astype(np.int64)] * nested[of] + np.float32(state["nested_offset"])
        table = self._raw(f"{name}.quant_map").astype(np.float32)
        values: F32 = table[codes] * scales.astype(np.float32)[np.arange(first, first + count) // block]
        if state["dtype"] == "bfloat16":
            wide = values.view(np.uint32)
            values = ((wide + 0x7FFF + ((wide >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)
        elif state["dtype"] == "float16":
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
