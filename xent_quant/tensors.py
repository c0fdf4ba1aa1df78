"""Frozen records that travel between the parts."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class TensorInfo:
    """What a checkpoint's header says of one tensor.

    `shape` is row-major as in torch, `dtype` one of "F32", "F16", "BF16" (safetensors spelling), of a quantised checkpoint "U8"
    and "I8" too.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def n_weights(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes as stored."""
        return self.n_weights * {"F32": 4, "U8": 1, "I8": 1}.get(self.dtype, 2)


@dataclass(frozen=True)
class InputStatistics:
    """What calibration knows of the inputs of one weight [out, in], ready for use: blended for rare experts, floored.

    `importance` [in] float32 is the mean x² of each input column; `hessian` [in, in] float32 is the mean x xᵀ (no factor
    2), or None where it was not asked for; `rows` counts the weight's own rows (tokens), 0 for an expert never reached.
    `held_out` [n, in] float32 are input rows that neither of them has seen, to judge a method by; None where there are none.
    """

    importance: NDArray[np.float32]
    hessian: NDArray[np.float32] | None
    rows: int
    held_out: NDArray[np.float32] | None = None

    def padded(self, columns: int) -> "InputStatistics":
        """The statistics of inputs that are followed by zeros up to `columns`."""
        missing = columns - len(self.importance)
        if not missing:
            return self
        hessian, held_out = self.hessian, self.held_out
        return replace(
            self,
            importance=np.pad(self.importance, (0, missing)),
            hessian=None if hessian is None else np.pad(hessian, ((0, missing), (0, missing))),
            held_out=None if held_out is None else np.pad(held_out, ((0, 0), (0, missing))),
        )


class StatisticsSource(Protocol):
    """Where statistics come from: a file, or a calibration pass that runs along.

    Asked in the order of `Architecture.tensors()`; a running pass need not answer for tensors it has passed.
    """

    def get(self, name: str) -> InputStatistics | None:
        """Of one checkpoint tensor, or None where nothing is known (norms, routers, tensors a file lacks)."""

    def target(self, name: str, start: int, weights: NDArray[np.float32]) -> NDArray[np.float32]:
        """What to quantise in place of rows `start`… [rows, columns] of a tensor: the same, unless the source knows better."""
        return weights

    def quantized(self, name: str, start: int, weights: Callable[[], NDArray[np.float32]]) -> None:
        """Told what those rows became; `weights` makes them, [rows, columns], for a source that runs on with them."""
        return
