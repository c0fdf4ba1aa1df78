"""Which device computes, and how much of its memory is free."""

from collections.abc import Iterator, Sequence
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


def choose(name: str) -> tuple[torch.device, ...]:
    """The devices that `--device` names, the first of which does all but its share of experts; none for the CPU's kernels. A
    kind without a number is all of it that is like the first. Raises ConfigError where torch has no such device."""
    if name == "cpu":
        return ()
    if name == "auto":
        return next((_alike(kind) for kind in KINDS[:2] if _count(kind)), ())
    found: list[torch.device] = []
    for each in name.split(","):
        kind, _, number = each.partition(":")
        if each == ON_CPU:
            found.append(torch.device("cpu"))
        elif int(number or 0) < _count(kind):
            found += [torch.device(kind, int(number))] if number else _alike(kind)
        else:
            there = ", ".join(f"{each}:{index}" for each in KINDS for index in range(_count(each)))
            remedy = f"there is {there}" if there else "use --device cpu"
            raise ConfigError(f"--device {name}: torch {torch.__version__} sees no {each}; {remedy}")
    if len({device.type for device in found}) > 1 or (found[0].type != "cpu" and len(set(found)) < len(found)):
        raise ConfigError(f"--device {name}: name devices of one kind, each once")
    return tuple(found)


def _alike(kind: str) -> tuple[torch.device, ...]:
    every = [torch.device(kind, number) for number in range(_count(kind))]
    return tuple(device for device in every if len(every) == 1 or _name(device) == _name(every[0]))


def _name(device: torch.device) -> str:
    return str(_module(device.type).get_device_name(device))


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
def memory_of(devices: Sequence[torch.device], limit: int | None = None) -> Iterator[None]:
    """Raise ExportError where one of the devices has no memory left for the block. On CUDA devices that is where `limit` bytes
    more than now would be taken of one, too; elsewhere the plan is all that there is."""
    capped = [device for device in devices if device.type == "cuda" and limit is not None]
    for device in capped:
        total = torch.cuda.mem_get_info(device)[1]
        share = (torch.cuda.memory_allocated(device) + (limit or 0)) / total
        torch.cuda.set_per_process_memory_fraction(min(1.0, share), device)
    try:
        yield
    except RuntimeError as error:  # OutOfMemoryError is one; MPS raises a plain one
        if not isinstance(error, torch.OutOfMemoryError) and "out of memory" not in str(error):
            raise
        named = ",".join(map(str, devices))
        remedy = "close what else uses it, or give --vram less than it took, so that less is worked on together"
        raise ExportError(f"--device {named}: its memory ran out; {remedy}, and the same command goes on") from error
    finally:
        for device in capped:
            torch.cuda.set_per_process_memory_fraction(1.0, device)
