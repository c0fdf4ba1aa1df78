"""A checkpoint folder, opened from headers and read one tensor, or one slice of rows, at a time."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from xent_quant.checkpoint.architecture import Architecture
from xent_quant.checkpoint.headers import ITEM_SIZE, Location, locate, read_json
from xent_quant.errors import CheckpointError, UnsupportedError
from xent_quant.tensors import TensorInfo

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Checkpoint:
    """A validated checkpoint. Opening it reads headers only; `read` reads one tensor's rows.

    `ignored` names tensors of the files that the architecture does not use (rotary_emb.inv_freq and the like).
    """

    SLICE: ClassVar[int] = 16 * 1024 * 1024
    """Weights that `slices` reads at once, at most (one row at least)."""

    path: Path
    config: dict[str, Any]
    architecture: Architecture
    infos: dict[str, TensorInfo]
    locations: dict[str, Location]
    ignored: tuple[str, ...]

    @classmethod
    def open(cls, path: Path) -> "Checkpoint":
        """Check config.json, the index and every header. Raises CheckpointError, ConfigError or UnsupportedError."""
        config = read_json(path / "config.json")
        quantised = config.get("quantization_config")
        if quantised:
            method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
            raise UnsupportedError(f"{path}: is quantised already ({method}); give the checkpoint that it was made from")
        if (path / "model.onnx").is_file():
            raise UnsupportedError(f"{path}: is an ONNX model; give the checkpoint that it was made from")
        architecture = Architecture.from_config(config, str(path / "config.json"))
        locations = locate(path)
        infos: dict[str, TensorInfo] = {}
        for name, spec in architecture.tensors().items():
            location = locations.get(name)
            if location is None:
                raise CheckpointError(f"{path}: {name}: missing; the download is incomplete, or config.json is another model's")
            info = location.info
            if info.shape != spec.shape:
                raise CheckpointError(
                    f"{location.file}: {name}: shape {list(info.shape)}, config.json asks for {list(spec.shape)}"
                )
            if info.dtype not in ITEM_SIZE:
                raise CheckpointError(
                    f"{location.file}: {name}: dtype {info.dtype}; only F32, F16 and BF16 weights can be quantised"
                )
            infos[name] = info
        ignored = tuple(sorted(set(locations) - set(infos)))
        return cls(path, config, architecture, infos, locations, ignored)

    @property
    def nbytes(self) -> int:
        """Bytes of the weights as stored."""
        return sum(info.nbytes for info in self.infos.values())

    @property
    def n_weights(self) -> int:
        return sum(info.n_weights for info in self.infos.values())

    def read(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
        """Rows start:stop of a tensor (elements of a vector) as contiguous float32.

        Holds the stored bytes of these rows and their float32 copy. Raises CheckpointError for NaN, infinities, or a
        file that became shorter.
        """
        info, location = self.infos[name], self.locations[name]
        stop = info.shape[0] if stop is None else stop
        shape = (stop - start, *info.shape[1:])
        if location.offset is None:
            values = self._pickled(location)[start:stop].float().numpy().copy()
        else:
            row = prod(info.shape[1:]) * ITEM_SIZE[info.dtype]
            raw = np.fromfile(location.file, np.uint8, count=(stop - start) * row, offset=location.offset + start * row)
            if raw.size != (stop - start) * row:
                raise CheckpointError(f"{location.file}: {name}: the file ends before the tensor does; copy it again")
            values = widen(raw, info.dtype).reshape(shape)
        if not np.isfinite(values).all():
            row_index = int(np.argwhere(~np.isfinite(values))[0][0]) + start
            raise CheckpointError(
                f"{location.file}: {name}: NaN or infinite weight in row {row_index}; the checkpoint is damaged"
            )
        return values

    def slices(self, name: str) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """(first row, rows) of a tensor in order, as float32 [rows, columns], a vector as [1, n]; in one piece unless it
        is larger than SLICE weights. Raises as `read`."""
        shape = self.infos[name].shape
        if len(shape) == 1:
            yield 0, self.read(name)[None]
            return
        rows = max(1, self.SLICE // prod(shape[1:]))
        for start in range(0, shape[0], rows):
            yield start, self.read(name, start, min(start + rows, shape[0]))

    def read_torch(self, name: str, dtype: "torch.dtype | None" = None) -> "torch.Tensor":
        """The whole tensor for torch; float32 unless `dtype` is given. Raises as `read`."""
        import torch

        return torch.from_numpy(self.read(name)).to(dtype or torch.float32)

    @staticmethod
    def _pickled(location: Location) -> "torch.Tensor":
        from xent_quant.checkpoint.pickles import load

        return load(location.file)[location.info.name]


def widen(raw: NDArray[np.uint8], dtype: str) -> NDArray[np.float32]:
    """Little-endian bytes of F32, F16 or BF16 to float32, exactly."""
    if dtype == "BF16":  # the upper half of a float32
        wide = raw.view("<u2").astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    return raw.view({"F32": "<f4", "F16": "<f2"}[dtype]).astype(np.float32, copy=False)
