"""Weights on their way to a device: read and copied by a thread of their own while those before them are worked on."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch
from torch import Tensor

from xent_quant.formats.base import F32

Weights = dict[str, tuple[F32, Tensor]]
"""By name, as read and on the device."""


def ahead(read: Callable[[str], F32], device: torch.device, groups: Iterable[Sequence[str]]) -> Iterator[Weights]:
    """The tensors of each group of names in turn, float32 of the shapes that `read` gives. Holds those of two groups, and on CUDA
    a copy in pinned memory of one. Raises what `read` raises."""
    copy = _copier(device) if device.type == "cuda" and torch.cuda.is_available() else None

    def fetch(names: Sequence[str]) -> tuple[dict[str, F32], "dict[str, Tensor] | None"]:
        arrays = {name: read(name) for name in names}
        return arrays, copy.begin(arrays) if copy else None

    with ThreadPoolExecutor(1) as pool:
        waiting = None
        for names in groups:
            coming = pool.submit(fetch, names)
            if waiting is not None:
                yield _arrived(*waiting.result(), device, copy)
            waiting = coming
        if waiting is not None:
            yield _arrived(*waiting.result(), device, copy)


def _arrived(arrays: dict[str, F32], copies: "dict[str, Tensor] | None", device: torch.device, copy: "_Copier | None") -> Weights:
    if copy is not None and copies is not None:
        copy.end(copies)
    else:
        copies = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
    return {name: (array, copies[name]) for name, array in arrays.items()}


class _Copier:
    """Copies beside what the device computes, on a CUDA stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def begin(self, arrays: dict[str, F32]) -> dict[str, Tensor]:
        """In the thread that reads: returns when all copies are there, for pinned memory is to be let go of."""
        with torch.cuda.stream(self._stream):
            pinned = {name: torch.from_numpy(array).pin_memory() for name, array in arrays.items()}
            made = {name: tensor.to(self._device, non_blocking=True) for name, tensor in pinned.items()}
        self._stream.synchronize()
        return made

    def end(self, copies: dict[str, Tensor]) -> None:
        """In the thread that computes: the memory is the computing stream's from now on, too."""
        for tensor in copies.values():
            tensor.record_stream(torch.cuda.current_stream(self._device))


@cache
def _copier(device: torch.device) -> _Copier:
    """One for all layers: what a stream frees is kept for that stream alone, so each new one would take memory of its own."""
    return _Copier(device)
