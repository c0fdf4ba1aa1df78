"""The exported bytes against the checkpoint, weight by weight: which tensor is not what it should be, and where.

A perplexity cannot see one doubled scale among a million, and a wrong tensor is only worth a message if it is named.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numba
import numpy as np
from numpy.typing import NDArray

from xent_quant.checkpoint.reader import Checkpoint
from xent_quant.compilation import jit
from xent_quant.model.stages import WeightSource
from xent_quant.progress import Progress

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

BLOCK, SUPER_BLOCK = 32, 256


class TypedSource(WeightSource, Protocol):
    """A WeightSource over an export that knows how each tensor is stored."""

    def type(self, name: str) -> str:
        """The quant type of a checkpoint tensor, as the format names it."""

    def padding(self, name: str) -> float:
        """The largest absolute value in what was padded to a tensor, 0 where nothing was."""


@dataclass(frozen=True)
class TensorError:
    """How one tensor differs from the checkpoint.

    `error` is ‖stored − checkpoint‖ / ‖checkpoint‖; `worst` the same of the worst block of 32 weights, against the root
    mean square of the block or, where that is larger, half that of the 256 weights around it; `row` and `column` are where
    that block begins. `padding` is the largest absolute value among weights that are padding.
    """

    name: str
    type: str
    n_weights: int
    error: float
    worst: float
    row: int
    column: int
    padding: float


@partial(jit, parallel=True)
def _block_sums(stored: F32, wanted: F32, differences: F64, norms: F64) -> None:
    """Σ(stored − wanted)² and Σ wanted² of every BLOCK of a row: [rows, columns] to two [rows, blocks]."""
    rows, columns = wanted.shape
    for row in numba.prange(rows):
        for block in range(differences.shape[1]):
            difference, norm = 0.0, 0.0
            for column in range(block * BLOCK, min((block + 1) * BLOCK, columns)):
                value = float(wanted[row, column])
                delta = float(stored[row, column]) - value
                difference += delta * delta
                norm += value * value
            differences[row, block] = difference
            norms[row, block] = norm


def compare(name: str, checkpoint: Checkpoint, source: TypedSource) -> TensorError:
    """One tensor, slice by slice: at most Checkpoint.SLICE weights of each side in memory."""
    shape = checkpoint.infos[name].shape
    columns = shape[-1]
    rows = shape[0] if len(shape) == 2 else 1
    step = max(1, Checkpoint.SLICE // columns)
    difference = norm = 0.0
    worst, where = -1.0, (0, 0)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        span = (start, stop) if len(shape) == 2 else (0, columns)
        wanted, stored = (np.atleast_2d(side.read(name, *span)) for side in (checkpoint, source))
        differences, norms, errors = block_errors(stored, wanted)
        difference += float(differences.sum())
        norm += float(norms.sum())
        row, block = np.unravel_index(errors.argmax(), errors.shape)
        if errors[row, block] > worst:
            worst, where = float(errors[row, block]), (start + int(row), int(block) * BLOCK)
    total = (difference / norm) ** 0.5 if norm else float(difference > 0)
    return TensorError(name, source.type(name), int(np.prod(shape)), total, worst, where[0], where[1], source.padding(name))


def block_errors(stored: F32, wanted: F32) -> tuple[F64, F64, F64]:
    """Of every BLOCK of [rows, columns]: Σ(stored − wanted)², Σ wanted², and the error that `TensorError.worst` is the largest
    of; each [rows, blocks]."""
    blocks = -(-wanted.shape[1] // BLOCK)
    differences, norms = np.empty((len(wanted), blocks)), np.empty((len(wanted), blocks))
    _block_sums(np.ascontiguousarray(stored), np.ascontiguousarray(wanted), differences, norms)
    errors: F64 = np.sqrt(differences / np.maximum(np.maximum(norms, 0.25 * _around(norms)), 1e-30))
    return differences, norms, errors


def _around(norms: F64) -> F64:
    """Mean of each SUPER_BLOCK's block norms, at every block: [rows, blocks]."""
    size = SUPER_BLOCK // BLOCK
    rows, blocks = norms.shape
    padded = np.pad(norms, ((0, 0), (0, -blocks % size))).reshape(rows, -1, size)
    counts = np.minimum(size, blocks - np.arange(padded.shape[1]) * size)
    means = padded.sum(axis=2) / counts
    return np.repeat(means, size, axis=1)[:, :blocks]


def compare_all(
    checkpoint: Checkpoint, source: TypedSource, progress: Progress, keep: Callable[[str], bool] = lambda _: True
) -> list[TensorError]:
    """Every tensor of the checkpoint that `keep` takes, in its order."""
    chosen = [name for name in checkpoint.infos if keep(name)]
    progress.start("Comparing weights", sum(checkpoint.infos[name].n_weights for name in chosen))
    found = []
    for name in chosen:
        found.append(compare(name, checkpoint, source))
        progress.advance(checkpoint.infos[name].n_weights)
    progress.finish()
    return found
