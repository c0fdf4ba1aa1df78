"""A checkpoint folder, opened from headers and read one tensor, or one slice of rows, at a time."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from xent_quant.checkpoint import names, quantised
from xent_quant.checkpoint.architecture import Architecture
from xent_quant.checkpoint.files import locate
from xent_quant.checkpoint.headers import Location, read_json
from xent_quant.checkpoint.quantised import Scheme
from xent_quant.checkpoint.sources import Floats, Source, Transposed
from xent_quant.errors import CheckpointError, UnsupportedError
from xent_quant.tensors import Role, TensorInfo, TensorSpec
from xent_quant.values import finite, largest

if TYPE_CHECKING:
    import torch

    from xent_quant.checkpoint.dropping import KeptExperts

FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class Checkpoint:
    """A validated checkpoint. Opening it reads headers only; `read` reads one tensor's rows.

    `infos` are the architecture's tensors by its own names, `sources` how each is read, `locations` what the files hold by the
    same names. `ignored` names what the architecture does not use (rotary_emb.inv_freq and the like); `notes` are for the person.
    Of a view without some experts (`dropping.keep`) `kept` says which are there, and `whole` is the checkpoint with all of them.
    """

    SLICE: ClassVar[int] = 16 * 1024 * 1024
    """Weights that `slices` reads at once, at most (one row at least)."""

    path: Path
    config: dict[str, Any]
    architecture: Architecture
    infos: dict[str, TensorInfo]
    sources: dict[str, Source]
    locations: dict[str, Location]
    ignored: tuple[str, ...]
    notes: tuple[str, ...]
    kept: "KeptExperts | None" = None
    whole: "Checkpoint | None" = None

    @classmethod
    def open(cls, path: Path) -> "Checkpoint":
        """Check config.json, the index and every header. Raises CheckpointError, ConfigError or UnsupportedError."""
        adapter = path / "adapter_config.json"
        if adapter.is_file():
            base = read_json(adapter).get("base_model_name_or_path")
            named = base if isinstance(base, str) and base else "a model that it does not name"
            raise UnsupportedError(
                f"{path}: is a LoRA of {named[:200]}, not a model (adapter_config.json); "
                "merge it (peft's merge_and_unload), save, and give the result"
            )
        config = read_json(path / "config.json")
        scheme = Scheme.of(config, str(path))
        if (path / "model.onnx").is_file():
            raise UnsupportedError(f"{path}: is an ONNX model; give the checkpoint that it was made from")
        architecture = Architecture.from_config(config, str(path / "config.json"))
        locations, notes = names.plain(locate(path), architecture, path)
        sources: dict[str, Source] = {}
        infos: dict[str, TensorInfo] = {}
        for spec in architecture.each_tensor():
            source = _source(spec, locations, scheme, architecture, path)
            sources[spec.name] = source
            infos[spec.name] = TensorInfo(spec.name, spec.shape, source.dtype)
        used = {location.info.name for source in sources.values() for location in source.locations}
        shapes = {f"{name.removesuffix('.weight')}.weight_shape" for name in sources}
        ignored = tuple(sorted(name for name, place in locations.items() if place.info.name not in used and name not in shapes))
        notes += names.leftover(ignored, architecture, path, quantised=scheme is not None)
        if scheme is not None and any(source.dtype not in FLOATS for source in sources.values()):
            notes = (scheme.note, *notes)
        return cls(path, config, architecture, infos, sources, locations, ignored, notes)

    @property
    def nbytes(self) -> int:
        """Bytes of the weights as stored, with their scales."""
        parts = {location.info.name: location for source in self.sources.values() for location in source.locations}
        return sum(location.info.nbytes for location in parts.values())

    @property
    def n_weights(self) -> int:
        return sum(info.n_weights for info in self.infos.values())

    def read(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
        """Rows start:stop of a tensor (elements of a vector) as contiguous float32.

        Holds what its `Source` holds. Raises CheckpointError for NaN, infinities, or a file that became shorter.
        """
        source, shape = self.sources[name], self.infos[name].shape
        values = source.rows(start, shape[0] if stop is None else stop)
        if not np.isfinite(largest(values)):
            row = int(np.argwhere(~np.isfinite(values))[0][0]) + start
            file = source.locations[0].file
            raise CheckpointError(f"{file}: {name}: NaN or infinite weight in row {row}; the checkpoint is damaged")
        return values

    def slices(self, name: str) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """(first row, rows) of a tensor in order, as float32 [rows, columns], a vector as [1, n]; in one piece unless it
        is larger than SLICE weights. Raises as `read`."""
        for start, read in self.pieces(name, self.SLICE):
            yield start, read()

    def pieces(self, name: str, weights: int, step: int = 1) -> Iterator[tuple[int, Callable[[], NDArray[np.float32]]]]:
        """As `slices`, each read when it is called for: of at most so many weights, but of `step` rows or a multiple of them."""
        shape, rows = self.infos[name].shape, self.rows_together(name, weights, step)
        if len(shape) == 1:
            yield 0, lambda: self.read(name)[None]
            return
        for start in range(0, shape[0], rows):
            yield start, partial(self.read, name, start, min(start + rows, shape[0]))

    def rows_together(self, name: str, weights: int, step: int = 1) -> int:
        """How many rows of a tensor are at most so many weights, and a multiple of `step`; all of a vector, or where they lie as
        columns."""
        shape = self.infos[name].shape
        if len(shape) == 1 or isinstance(self.sources[name], Transposed):
            return shape[0]
        return max(1, weights // prod(shape[1:]) // step) * step

    def read_torch(self, name: str, dtype: "torch.dtype | None" = None) -> "torch.Tensor":
        """The whole tensor for torch; float32 unless `dtype` is given. Raises as `read`."""
        import torch

        source, info = self.sources[name], self.infos[name]
        if dtype == torch.bfloat16 and isinstance(source, Floats) and info.dtype == "BF16" and len(info.shape) == 2:
            halves = source.halves(info.shape[0])
            if finite(halves.reshape(-1)):  # else `read` says where they are not
                return torch.from_numpy(halves).view(torch.bfloat16)
        return torch.from_numpy(self.read(name)).to(dtype or torch.float32)


def _source(spec: TensorSpec, stored: Mapping[str, Location], scheme: Scheme | None, model: Architecture, folder: Path) -> Source:
    """Where a tensor of the architecture lies, under its own name or within a fused one, and how it is read."""
    if scheme is not None and (found := quantised.source(spec, stored, scheme)) is not None:
        return found
    location = stored.get(spec.name)
    if location is None:
        fused = _fused(spec, stored, model)
        if fused is None:
            raise names.missing(spec.name, stored, folder)
        return fused
    if location.info.shape != spec.shape:
        raise _wrong_shape(location, spec.shape)
    _check_floats(location)
    return Floats(location, spec.shape[-1] if len(spec.shape) > 1 else 1)


def _fused(spec: TensorSpec, stored: Mapping[str, Location], model: Architecture) -> Source | None:
    """A part of a tensor that holds several of the model's; None where there is none."""
    if spec.layer is None:
        return None
    layer = model.layer(spec.layer)
    if spec.expert is not None:
        return _fused_expert(spec, spec.expert, stored, layer.fused_experts(), model.num_experts)
    name, firsts = layer.fused_qkv() or ("", {})
    location = stored.get(name)
    if location is None or spec.role not in firsts:
        return None
    _check_floats(location)
    whole = model.attention_size + 2 * model.kv_size, model.hidden_size
    if location.info.shape != whole:
        raise _wrong_shape(location, whole)
    return Floats(location, model.hidden_size, firsts[spec.role])


def _fused_expert(
    spec: TensorSpec,
    expert: int,
    stored: Mapping[str, Location],
    fused: tuple[tuple[str, ...], tuple[str, ...]],
    experts: int,
) -> Source | None:
    """One expert of the 3-D tensors that transformers 5 writes: gate's rows before up's, [experts, out, in], or, as models with
    transposed experts have it, [experts, in, out]. None where there are none."""
    both, down = (next((stored[name] for name in names if name in stored), None) for names in fused)
    if both is None or down is None:
        return None
    out, inner = spec.shape
    hidden, width = (out, inner) if spec.role is Role.DOWN else (inner, out)
    location = down if spec.role is Role.DOWN else both
    _check_floats(location)
    found = both.info.shape, down.info.shape
    straight = (experts, 2 * width, hidden), (experts, hidden, width)
    turned = (experts, hidden, 2 * width), (experts, width, hidden)
    if found not in (straight, turned):
        raise _wrong_shape(location, straight[location is down])
    first = width if spec.role is Role.UP else 0
    if found == turned:
        return Transposed(location, expert, first)
    return Floats(location, inner, expert * location.info.shape[1] + first)


def _check_floats(location: Location) -> None:
    if location.info.dtype not in FLOATS:
        raise CheckpointError(
            f"{location.file}: {location.info.name}: dtype {location.info.dtype}; only F32, F16 and BF16 weights can be quantised"
        )


def _wrong_shape(location: Location, wanted: tuple[int, ...]) -> CheckpointError:
    return CheckpointError(
        f"{location.file}: {location.info.name}: shape {list(location.info.shape)}, config.json asks for {list(wanted)}"
    )
