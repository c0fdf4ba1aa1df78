"""pytorch_model*.bin through torch, memory-mapped and without running code from the file."""

import pickle
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from xent_quant.errors import CheckpointError

if TYPE_CHECKING:
    import torch

DTYPES = {
    "torch.float32": "F32",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.float8_e4m3fn": "F8_E4M3",
    "torch.int64": "I64",
    "torch.int32": "I32",
    "torch.int8": "I8",
    "torch.uint8": "U8",
}
"""torch's names to safetensors'."""


def load(file: Path) -> "dict[str, torch.Tensor]":
    """The file's tensors, mapped lazily: nothing is read until a tensor is copied. Raises CheckpointError."""
    import torch

    try:
        with warnings.catch_warnings(action="ignore"):  # of an odd protocol, for example
            value = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # what torch raises on damaged files is anything
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if isinstance(error, pickle.UnpicklingError):  # torch advises to run the code in it
            first = "it is damaged, or holds more than tensors"
        raise CheckpointError(f"{file}: torch cannot map it ({first}); convert it to safetensors, or copy it again") from error
    if isinstance(value, dict):
        within = next((key for key, item in value.items() if isinstance(item, dict) and _tensors(item)), None)
        if within is not None:
            raise CheckpointError(
                f"{file}: its tensors lie under {str(within)!r}, beside a trainer's state; save that alone: "
                f"torch.save(torch.load(file)[{str(within)!r}], file)"
            )
    if not isinstance(value, dict) or not _tensors(value):
        raise CheckpointError(f"{file}: does not hold a plain dictionary of tensors; save the model's state_dict()")
    return {name: item.detach() for name, item in value.items()}


def _tensors(value: "dict[object, object]") -> bool:
    """Whether a dictionary is one of names to dense tensors (parameters are tensors)."""
    import torch

    return bool(value) and all(
        isinstance(name, str) and isinstance(item, torch.Tensor) and item.layout == torch.strided and item.device.type == "cpu"
        for name, item in value.items()
    )
