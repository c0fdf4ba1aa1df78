"""Which device computes, and how much of its memory is free."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch

from xent_quant.errors import ConfigError, ExportError

KINDS = ("cuda", "xpu", "mps")
"""In the order in which `auto` looks for them."""

ON_CPU = "torch-cpu"
"""The device's code on the CPU: for tests and for scripts/check_gpu."""

SHARE = 0.9
"""Of what is free, that is planned with: other programs draw on the same card."""


def choose(name: str) -> torch.device | None:
    """The device that `--device` names; None for the CPU's kernels. Raises ConfigError where torch has no such device."""
    if name == "cpu":
        return None
    if name == ON_CPU:
        return torch.device("cpu")
    if name == "auto":
        return next((torch.device(kind, 0) for kind in KINDS[:2] if _count(kind)), None)
    kind, _, number = name.partition(":")
    count = _count(kind)
    if int(number or 0) < count:
        return torch.device(kind, int(number or 0))
    there = ", ".join(f"{each}:{index}" for each in KINDS for index in range(_count(each)))
    remedy = f"there is {there}" if there else "use --device cpu"
    raise ConfigError(f"--device {name}: torch {torch.__version__} sees no such device; {remedy}")


def _module(kind: str) -> ModuleType:
    found: ModuleType = torch.backends.mps if kind == "mps" else getattr(torch, kind)
    return found


def _count(kind: str) -> int:
    module = _module(kind)
    if not module.is_available():
        return 0
    return 1 if kind == "mps" else int(module.device_count())


def free_bytes(device: torch.device) -> int | None:
    """What may be planned with, what torch keeps for its next tensors among it; None where that is not known (the CPU)."""
    if device.type == "mps":
        return int(SHARE * (torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()))
    if device.type in ("cuda", "xpu"):
        module = _module(device.type)
        cached = module.memory_reserved(device) - module.memory_allocated(device)
        return int(SHARE * (module.mem_get_info(device)[0] + cached))
    return None


@contextmanager
def memory_of(device: torch.device, limit: int | None = None) -> Iterator[None]:
    """Raise ExportError where the device has no memory left for the block. On CUDA devices that is where `limit` bytes more than
    now would be taken, too; elsewhere the plan is all that there is."""
    capped = device.type == "cuda" and limit is not None
    if capped and limit is not None:
        total = torch.cuda.mem_get_info(device)[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_allocated(device) + limit) / total), device)
    try:
        yield
    except RuntimeError as error:  # OutOfMemoryError is one; MPS raises a plain one
        if not isinstance(error, torch.OutOfMemoryError) and "out of memory" not in str(error):
            raise
        remedy = "close what else uses it, or give --vram less than it took, so that less is worked on together"
        raise ExportError(f"--device {device}: its memory ran out; {remedy}, and the same command goes on") from error
    finally:
        if capped:
            torch.cuda.set_per_process_memory_fraction(1.0, device)
