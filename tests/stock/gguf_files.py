"""What is in a GGUF file, as gguf-py reads it."""

from pathlib import Path
from typing import Any

import gguf


def keys(file: Path) -> dict[str, Any]:
    """Keys and values, without what gguf-py adds of the header."""
    fields = gguf.GGUFReader(file).fields
    return {name: field.contents() for name, field in fields.items() if not name.startswith("GGUF.")}


def tensors(file: Path) -> dict[str, tuple[list[int], str, bytes]]:
    """Shape, type and bytes by name."""
    return {
        tensor.name: (tensor.shape.tolist(), tensor.tensor_type.name, tensor.data.tobytes())
        for tensor in gguf.GGUFReader(file).tensors
    }
