"""GPUs that are none: tensors in memory that say they are on one, and fail where one would.

Any operation of tensors on both sides, or on two of them, fails, and so does looking at one's numbers with numpy before it was
fetched. What comes out is what the CPU computes, so whole runs can be tested.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)
FETCHING = {"numpy", "__array__"}
DIVISIONS = {"div", "true_divide", "__truediv__"}


class Card(Tensor):
    """A tensor on the first GPU."""

    at = DEVICE

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(function, args, kwargs or {})


class Second(Card):
    """A tensor on the second one."""

    at = SECOND


def _plain(value: Any) -> Any:
    return value.as_subclass(Tensor) if isinstance(value, Card) else value


def _on(kind: type[Card], value: Any) -> Any:
    return value.as_subclass(kind) if isinstance(value, Tensor) and type(value) is not kind else value


def _call(function: Any, args: Any, kwargs: Any) -> Any:
    name = getattr(function, "__name__", "")
    with torch._C.DisableTorchFunctionSubclass():
        tensors = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, Tensor)]
        cards = [each for each in tensors if isinstance(each, Card)]
        if function == Tensor.device.__get__:  # type: ignore[attr-defined]
            return cards[0].at if cards else function(*args)
        if name in FETCHING and cards:
            raise TypeError(f"{name}: a tensor on {cards[0].at} has no array; it must be fetched")
        if name == "cpu":
            return _plain(args[0]).clone()
        device, left = kwargs.get("device"), args
        if name == "to":
            device = next((each for each in (*args[1:], device) if isinstance(each, torch.device | str)), None)
            left = tuple(each for each in args if not isinstance(each, torch.device | str))
        if device is not None:
            rest = {key: value for key, value in kwargs.items() if key != "device"}
            made = left[0].clone() if name == "to" and len(left) == 1 and not rest else function(*left, **rest)
            if torch.device(device).type != DEVICE.type:
                return _plain(made)
            return _on(Second if torch.device(device) == SECOND else Card, made)
        apart = [each for each in tensors if not isinstance(each, Card) and each.dim()]
        if cards and apart and name != "copy_":
            raise AssertionError(f"{name}: tensors of shapes {[tuple(each.shape) for each in apart]} are not on {cards[0].at}")
        if len({each.at for each in cards}) > 1 and name != "copy_":
            raise AssertionError(f"{name}: tensors of shapes {[tuple(each.shape) for each in cards]} are on both GPUs")
        if name in DIVISIONS and cards and isinstance(args[1], float | int):
            made = args[0] * float(np.float32(1) / np.float32(args[1]))  # as CUDA's kernels do
        else:
            made = function(*args, **kwargs)
        return tree_map(partial(_on, type(cards[0])), made) if cards else made


class _Mode(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(function, args, kwargs or {})


class _Pool(ThreadPoolExecutor):
    """Whose threads see the GPUs, too: a mode is one thread's."""

    def __init__(self, count: int, initializer: Any) -> None:
        def begin() -> None:
            _Mode().__enter__()
            initializer()

        super().__init__(count, initializer=begin)


@contextmanager
def card() -> Iterator[torch.device]:
    """Within it there are such GPUs; the first one."""
    with _Mode(), patch("xent_quant.parallel.ThreadPoolExecutor", _Pool):
        yield DEVICE
