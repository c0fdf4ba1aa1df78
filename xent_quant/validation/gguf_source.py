"""An exported GGUF file as weights under the checkpoint's names: what its bytes mean, rotary permutation and padding undone.

Written apart from the exporter, against llama.cpp's conventions, so that a slip in one shows against the other. Reads from
offsets rather than through gguf-py's map, since mapped pages that were touched count as resident memory; holds one slice.
"""

import re
from dataclasses import replace
from math import isclose, log
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from xent_quant import formats
from xent_quant.checkpoint.architecture import Architecture
from xent_quant.checkpoint.gguf_header import GGUFTensor, read_gguf
from xent_quant.checkpoint.llama_names import llama_name
from xent_quant.checkpoint.rope import shown
from xent_quant.errors import CheckpointError, UnsupportedError, ValidationError
from xent_quant.tensors import Role

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]

UNSCALED = ("logit_scale", "embedding_scale", "residual_scale", "attention.scale", "expert_weights_scale")
"""Keys that must be absent or 1: the model scales nothing."""


def shards(path: Path) -> list[Path]:
    """All files of the model that `path` begins."""
    match = re.fullmatch(r"(.+)-(\d{5})-of-(\d{5})\.gguf", path.name)
    if not match:
        return [path]
    return [path.with_name(f"{match[1]}-{index + 1:05d}-of-{match[3]}.gguf") for index in range(int(match[3]))]


class GGUFFile:
    """Header of a GGUF model, all shards: `metadata` without the token lists, and `tensors` by name.

    Raises ValidationError naming the file that is missing, truncated or not GGUF.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = shards(path)
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, GGUFTensor] = {}
        for file in self.files:
            if not file.is_file():
                raise ValidationError(f"{file}: no such file" + ("; a shard is missing" if len(self.files) > 1 else ""))
            try:
                header = read_gguf(file)
            except CheckpointError as error:
                raise ValidationError(str(error)) from error
            for key, value in header.metadata.items():
                if not key.startswith(("tokenizer.ggml.tokens", "tokenizer.ggml.scores", "tokenizer.ggml.merges")):
                    self.metadata.setdefault(key, value)
            self.tensors |= header.tensors
        if not self.tensors:
            raise ValidationError(f"{path}: holds no tensors; export or download it again")
        wanted = self.metadata.get("split.tensors.count", len(self.tensors))
        if wanted != len(self.tensors):
            raise ValidationError(
                f"{path}: {len(self.tensors)} tensors in its shards, the header says {shown(wanted)}; export it again"
            )

    @property
    def nbytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)


class GGUFSource:
    """A WeightSource over a GGUF file. `architecture` is the reference's, which the file's keys must repeat.

    Raises ValidationError naming the key or the tensor that does not fit the reference.
    """

    def __init__(self, file: GGUFFile, reference: Architecture) -> None:
        self.file, self.path = file, file.path
        self._llama = reference.family.gguf(reference, reference.intermediate_size)
        # llama.cpp may multiply by an output.weight even where the checkpoint ties it to the embedding.
        tied = reference.tie_word_embeddings and not self._llama.own_head
        self.architecture = replace(reference, tie_word_embeddings=tied)
        self.width = self._check_keys(reference)
        self._tensors = self.architecture.tensors()
        for name in self._tensors:
            self._check_shape(name)

    def _check_keys(self, model: Architecture) -> int:
        """Compare hyperparameters; returns the width of an expert in the file, padding included."""
        data, arch = self.file.metadata, self.file.metadata.get("general.architecture")
        if arch != self._llama.arch:
            raise ValidationError(
                f"{self.file.path}: architecture {shown(arch)}; the reference is {self._llama.arch!r} in llama.cpp"
            )
        wanted: dict[str, Any] = {
            "block_count": model.num_layers,
            "embedding_length": model.hidden_size,
            "attention.head_count": model.num_heads,
            "attention.head_count_kv": model.num_kv_heads,
            "attention.layer_norm_rms_epsilon": model.rms_norm_eps,
            "rope.freq_base": model.rope_theta,
            "attention.key_length": model.head_dim,
            "attention.value_length": model.head_dim,
            "rope.dimension_count": model.head_dim,
        }
        scaling = model.rope_scaling
        wanted["rope.scaling.factor"] = scaling.factor if scaling else 1.0
        if scaling and scaling.kind == "yarn":
            wanted["rope.scaling.original_context_length"] = scaling.original_context
            wanted["rope.scaling.attn_factor"] = scaling.attention_factor / (1 + 0.1 * log(scaling.factor))
        kind, needed = data.get(f"{arch}.rope.scaling.type", "linear"), scaling.kind if scaling else "linear"
        if kind not in (needed, "none" if scaling is None else needed):
            raise ValidationError(
                f"{self.file.path}: {arch}.rope.scaling.type is {shown(kind)}, the reference needs {needed}; "
                "it is another model, or a wrong export"
            )
        if model.num_experts:
            wanted |= {"expert_count": model.num_experts, "expert_used_count": model.experts_per_token}
        wanted |= {
            key: value
            for key, value in self._llama.keys.items()
            if key != "expert_feed_forward_length" and not isinstance(value, str)
        }
        defaults = {"attention.head_count_kv": model.num_heads, "expert_weights_norm": False, "rope.freq_base": 10000.0}
        defaults |= {"rope.scaling.factor": 1.0, "rope.scaling.attn_factor": 1.0}
        defaults |= dict.fromkeys(("attention.key_length", "attention.value_length"), model.hidden_size // model.num_heads)
        defaults["rope.dimension_count"] = data.get(f"{arch}.attention.key_length", model.hidden_size // model.num_heads)
        wanted |= dict.fromkeys(UNSCALED, 1.0)
        defaults |= dict.fromkeys(UNSCALED, 1.0)
        for key, value in wanted.items():
            found = data.get(f"{arch}.{key}", defaults.get(key))
            if not isinstance(found, int | float) or not isclose(found, value, rel_tol=1e-5):
                raise ValidationError(
                    f"{self.file.path}: {arch}.{key} is {shown(found)}, the reference needs {value}; "
                    "it is another model, or a wrong export"
                )
        key = "expert_feed_forward_length" if "expert_feed_forward_length" in self._llama.keys else "feed_forward_length"
        width = data.get(f"{arch}.{key}")
        if not isinstance(width, int) or width < model.intermediate_size:
            raise ValidationError(
                f"{self.file.path}: {arch}.{key} is {shown(width)}, the reference needs at least {model.intermediate_size}"
            )
        return width

    def stored(self, name: str) -> tuple[GGUFTensor, int]:
        """The file's tensor that holds a checkpoint tensor, and the index of its matrix there."""
        spec = self._tensors[name]
        tensor, index = llama_name(spec), spec.expert or 0
        if tensor not in self.file.tensors:
            raise ValidationError(f"{self.file.path}: {tensor} is missing; export it again")
        return self.file.tensors[tensor], index

    def _padded(self, name: str) -> tuple[int, ...]:
        """The shape that a checkpoint tensor has in the file."""
        spec = self._tensors[name]
        if spec.role not in (Role.GATE, Role.UP, Role.DOWN) or self.width == self.architecture.intermediate_size:
            return spec.shape
        width = self.width * (self.architecture.num_shared_experts if spec.shared else 1)
        return (spec.shape[0], width) if spec.role is Role.DOWN else (width, spec.shape[1])

    def _check_shape(self, name: str) -> None:
        stored, _ = self.stored(name)
        wanted = self._padded(name)
        if self._tensors[name].expert is not None:
            wanted = (self.architecture.num_experts, *wanted)
        if stored.shape != wanted:
            raise ValidationError(
                f"{self.file.path}: {stored.name} has shape {list(stored.shape)}, the reference needs {list(wanted)}"
            )

    def type(self, name: str) -> str:
        """ggml type of a checkpoint tensor."""
        return self.stored(name)[0].type

    def _rows(self, name: str, start: int, stop: int, column: int = 0) -> F32:
        """Rows start:stop as stored, padding included, from `column` on: [rows, columns − column]; a vector is one row."""
        stored, index = self.stored(name)
        shape = self._padded(name)
        rows, columns = (1, *shape) if len(shape) == 1 else shape
        kind = gguf.GGMLQuantizationType[stored.type]
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        row_bytes = columns // block * block_bytes
        offset = stored.offset + (index * rows + start) * row_bytes
        packed = np.fromfile(stored.file, np.uint8, count=(stop - start) * row_bytes, offset=offset)
        if packed.size != (stop - start) * row_bytes:
            raise ValidationError(f"{stored.file}: {stored.name}: the file ends before the tensor does; export it again")
        packed = packed.reshape(stop - start, row_bytes)
        if column:
            packed = np.ascontiguousarray(packed[:, column // block * block_bytes :])
        wide: F32
        if stored.type in formats.NAMES:
            wide = formats.get(stored.type).dequantize(packed)
        else:  # types that this project does not write
            try:
                wide = gguf.quants.dequantize(packed, kind).astype(np.float32)
            except NotImplementedError as error:
                raise UnsupportedError(f"{stored.file}: {stored.name}: its type {stored.type} cannot be read") from error
        return wide[:, column % block :] if column else wide

    def read(self, name: str, start: int = 0, stop: int | None = None) -> F32:
        """Rows start:stop of a checkpoint tensor (elements of a vector), dequantised, in the checkpoint's order."""
        spec, model = self._tensors[name], self.architecture
        shape = spec.shape
        stop = shape[0] if stop is None else stop
        if len(shape) == 1:
            return self._rows(name, 0, 1)[0, start:stop]
        heads = {Role.ATTENTION_Q: model.num_heads, Role.ATTENTION_K: model.num_kv_heads}.get(spec.role)
        if heads and self._llama.interleaved:  # row 2i + part of a head holds row i + part · half
            whole = self._rows(name, 0, shape[0]).reshape(heads, -1, 2, shape[1])
            return np.ascontiguousarray(whole.swapaxes(1, 2)).reshape(shape)[start:stop]
        return np.ascontiguousarray(self._rows(name, start, stop)[:, : shape[1]])

    def padding(self, name: str) -> float:
        """The largest absolute value in what was padded to a checkpoint tensor, 0 where nothing was.

        Columns of a type that has no zero are left out: they meet what padded rows of gate and up make, which must be zeros.
        """
        shape, padded = self._tensors[name].shape, self._padded(name)
        if shape == padded:
            return 0.0
        if padded[0] > shape[0]:
            return float(np.abs(self._rows(name, shape[0], padded[0])).max())
        kind = self.type(name)
        if kind in formats.NAMES and not formats.get(kind).has_zero:
            return 0.0
        return float(np.abs(self._rows(name, 0, shape[0], shape[1])).max())
