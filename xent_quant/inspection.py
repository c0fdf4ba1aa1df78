"""What a checkpoint folder or an exported file is, from its headers: `xent-quant inspect`."""

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from exporters.interface import TensorRow, type_totals
from xent_quant.checkpoint import hub
from xent_quant.checkpoint.architecture import Architecture
from xent_quant.checkpoint.files import locate
from xent_quant.checkpoint.headers import read_json
from xent_quant.checkpoint.reader import Checkpoint
from xent_quant.errors import ConfigError
from xent_quant.progress import Progress
from xent_quant.validation.runtimes import Kind, kind_of


def describe(path: str | Path, reference: str | Path | None = None, *, progress: Progress | None = None) -> dict[str, Any]:
    """Facts about a checkpoint folder, an exported folder or a GGUF file, as plain values; from headers alone.

    With `reference`, the checkpoint (folder or Hub id) that a GGUF file was made from, "errors" is added: the tensors of
    `exporters.gguf.compare.tensor_errors`, for which the weights of both are read.
    """
    path = hub.snapshot(Path(path))
    if reference is not None:
        if path.suffix != ".gguf" or not path.is_file():
            raise ConfigError(f"--reference: {path} is not a GGUF file; there is nothing to compare")
        from exporters.gguf.compare import tensor_errors

        return {
            **_describe_gguf(path),
            "errors": [asdict(row) for row in tensor_errors(path, Checkpoint.open(hub.resolve(reference)), progress)],
        }
    return DESCRIBE[kind_of(path)](path)


def _totals(stored: Sequence[tuple[str, int, int]]) -> dict[str, Any]:
    """Of (type, weights, bytes) triples."""
    weights = sum(count for _, count, _ in stored)
    return {
        "parameters": weights,
        "bits_per_weight": 8 * sum(nbytes for _, _, nbytes in stored) / weights,
        "types": [asdict(row) for row in type_totals(stored)],
    }


def _tensors(rows: Sequence[TensorRow]) -> dict[str, Any]:
    return {
        **_totals([(row.type, row.n_weights, row.nbytes) for row in rows]),
        "tensors": [row.to_json() for row in rows],
    }


def _describe_checkpoint(path: Path) -> dict[str, Any]:
    checkpoint = Checkpoint.open(path)
    model = checkpoint.architecture
    idle = model.num_experts - model.experts_per_token
    expert = 3 * model.hidden_size * model.intermediate_size
    return {
        "path": str(path),
        "kind": "checkpoint",
        "parameters": checkpoint.n_weights,
        "active_parameters": checkpoint.n_weights - model.num_layers * idle * expert,
        "bytes": checkpoint.nbytes,
        **asdict(model),
        "notes": list(checkpoint.notes),
        "types": [asdict(row) for row in type_totals([(i.dtype, i.n_weights, i.nbytes) for i in checkpoint.infos.values()])],
    }


def _describe_onnx(path: Path) -> dict[str, Any]:
    from xent_quant.validation.onnx_source import OnnxSource

    source = OnnxSource(path)
    return {
        "path": str(path),
        "kind": "onnx",
        "bytes": sum(file.stat().st_size for file in path.glob("model.onnx*")),
        **asdict(source.architecture),
        **_totals(source.stored()),
    }


def _describe_bnb(path: Path) -> dict[str, Any]:
    from xent_quant.validation.bnb_source import BnbSource

    config = read_json(path / "config.json")
    architecture = Architecture.from_config(config, str(path / "config.json"))
    source, sizes = BnbSource(path, architecture), dict[str, int]()
    locations = locate(path)
    for name, location in locations.items():
        # Scales and tables count with their weight.
        owner = re.sub(r"\.weight\..+$|\.SCB$|\.weight_format$", ".weight", name)
        sizes[owner] = sizes.get(owner, 0) + location.info.nbytes
    rows = [TensorRow(name, spec.shape, source.type(name), sizes[name]) for name, spec in architecture.tensors().items()]
    return {
        "path": str(path),
        "kind": "bitsandbytes",
        "bytes": sum(file.stat().st_size for file in {location.file for location in locations.values()}),
        **asdict(architecture),
        **_tensors(rows),
    }


def _describe_gguf(path: Path) -> dict[str, Any]:
    from xent_quant.validation.gguf_source import GGUFFile

    file = GGUFFile(path)
    told = {
        key: value for key, value in file.metadata.items() if not isinstance(value, list) and not key.endswith("chat_template")
    }
    return {
        "path": str(path),
        "kind": "gguf",
        "bytes": file.nbytes,
        **told,
        **_tensors([TensorRow(t.name, t.shape, t.type, t.nbytes) for t in file.tensors.values()]),
    }


DESCRIBE: dict[Kind, Callable[[Path], dict[str, Any]]] = {
    "gguf": _describe_gguf,
    "onnx": _describe_onnx,
    "bitsandbytes": _describe_bnb,
    "checkpoint": _describe_checkpoint,
}
