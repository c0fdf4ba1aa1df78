"""pytorch_model*.bin through torch, memory-mapped and without running code from the file."""

from pathlib import Path
from typing import TYPE_CHECKING

from xent_quant.errors import CheckpointError

if TYPE_CHECKING:
    import torch


def load(file: Path) -> "dict[str, torch.Tensor]":
    """The file's tensors, mapped lazily: nothing is read until a tensor is copied. Raises CheckpointError."""
    import pickle

    import torch

    try:
        value = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{file}: torch cannot map it ({first}); convert it to safetensors, or copy it again") from error
    if not isinstance(value, dict) or not all(isinstance(item, torch.Tensor) for item in value.values()):
        raise CheckpointError(f"{file}: does not hold a plain dictionary of tensors")
    return value
