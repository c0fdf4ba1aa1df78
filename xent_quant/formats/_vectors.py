"""Packed rows whose weights are chosen several at a time: what error feedback (GPTQ) rounds onto where codes are shared.

Scales stay as the search left them. For the weights of one vector, all rows' at once, the point of least Σw(x − p)² is looked for
among all points, x being what the weights should be.
"""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from xent_quant.compilation import jit
from xent_quant.formats._gain import stretched, within_float16
from xent_quant.formats._lanes import WIDTH, load, smaller, spread, store, where_less
from xent_quant.formats._search import HUGE, ONE, TWO, ZERO, empty, fill
from xent_quant.formats.base import F32, U8, QuantFormat

U16 = NDArray[np.uint16]
Flags = NDArray[np.bool_]


@jit
def costs(w, points, out):  # type: ignore[no-untyped-def]
    """Fill out [n] with Σwg² of points [n, dim]; `w` [dim]."""
    for p in range(len(points)):
        total = ZERO
        for j in range(points.shape[1]):
            total += w[j] * points[p, j] * points[p, j]
        out[p] = total


@jit
def closest(x, start, w, inverse, cost, points):  # type: ignore[no-untyped-def]
    """Number, Σwg² and 2Σw(x·inverse)g of the best of points [n, 4] for the vector at x[start]; `cost` is of `costs`."""
    a0 = load(x, start) * inverse * (TWO * w[start])
    a1 = load(x, start + 1) * inverse * (TWO * w[start + 1])
    a2 = load(x, start + 2) * inverse * (TWO * w[start + 2])
    a3 = load(x, start + 3) * inverse * (TWO * w[start + 3])
    number, energy, least = spread(ZERO), spread(ZERO), spread(HUGE)
    for p in range(len(points)):
        score = cost[p] - a0 * points[p, 0] - a1 * points[p, 1] - a2 * points[p, 2] - a3 * points[p, 3]
        number = where_less(score, least, np.float32(p), number)
        energy = where_less(score, least, cost[p], energy)
        least = smaller(score, least)
    return number, energy, energy - least


@jit
def closest_of_eight(x, w, cost, points):  # type: ignore[no-untyped-def]
    """Number and Σw(g² − 2xg) of the best of points [n, 8] for the vector in x, looked for among all: `_eights` has a quicker way
    where levels and scale are chosen with it."""
    a0, a1, a2, a3 = load(x, 0) * (TWO * w[0]), load(x, 1) * (TWO * w[1]), load(x, 2) * (TWO * w[2]), load(x, 3) * (TWO * w[3])
    a4, a5, a6, a7 = load(x, 4) * (TWO * w[4]), load(x, 5) * (TWO * w[5]), load(x, 6) * (TWO * w[6]), load(x, 7) * (TWO * w[7])
    number, least = spread(ZERO), spread(HUGE)
    for p in range(len(points)):
        score = cost[p] - a0 * points[p, 0] - a1 * points[p, 1] - a2 * points[p, 2] - a3 * points[p, 3]
        score = score - a4 * points[p, 4] - a5 * points[p, 5] - a6 * points[p, 6] - a7 * points[p, 7]
        number = where_less(score, least, np.float32(p), number)
        least = smaller(score, least)
    return number, least


@jit
def nearest_points(values, w, points, numbers, losses):  # type: ignore[no-untyped-def]
    """Fill numbers [rows, vectors] u16 with the points g of least Σw(g − x)², of equal ones the first, and losses [rows, vectors]
    with Σw(g² − 2xg); x are `values` [rows, vectors · dim], `w` [vectors · dim], `points` [n, dim], dim 4 or 8 (one vector)."""
    dim = points.shape[1]
    vectors = values.shape[1] // dim
    x = np.empty(values.shape[1] * WIDTH, np.float32)
    found, least = np.empty(vectors * WIDTH, np.float32), np.empty(vectors * WIDTH, np.float32)
    cost = np.empty((vectors, len(points)), np.float32)
    for v in range(vectors):
        costs(w[v * dim : (v + 1) * dim], points, cost[v])
    for first in range(0, values.shape[0], WIDTH):
        fill(values, first, 0, values.shape[1], x)
        if dim == 4:
            for v in range(vectors):
                number, energy, twice = closest(x, 4 * v, w, ONE, cost[v], points)
                store(found, v, number)
                store(least, v, energy - twice)
        else:
            number, score = closest_of_eight(x, w, cost[0], points)
            store(found, 0, number)
            store(least, 0, score)
        empty(found, first, 0, vectors, numbers)
        empty(least, first, 0, vectors, losses)


class Choice(NamedTuple):
    """For one vector of all rows: the weights [rows, size] float32 that it gives, and what the bytes hold of it."""

    values: F32
    numbers: U16
    """[rows, points]."""
    flags: Flags
    """Signs [rows, size], or whether delta is subtracted [rows, 1]."""


class Vectors(ABC):
    """See the module. `size` weights make a vector."""

    size: int

    @abstractmethod
    def choose(self, vector: int, targets: F32, weights: F32) -> Choice:
        """The points nearest to targets [rows, size] by `weights` [size]; nothing is changed."""

    @abstractmethod
    def keep(self, vector: int, choice: Choice, rows: Flags) -> None:
        """Take over a choice in those rows."""

    @abstractmethod
    def packed(self) -> U8:
        """Bytes with what was kept."""


class VectorFormat(QuantFormat):
    """A type that shares codes among weights. Subclasses write `store` and `load`, each other's inverse, and `vectors`; what they
    hold has the float16 scales `d` [n, 1] of blocks."""

    block_size = 256
    has_zero = False
    group_size: int
    points: F32
    """[points, 4 or 8] float32, ggml's grid."""

    @abstractmethod
    def store(self, blocks: U8, points: Any) -> None:
        """Fill blocks [n, block_bytes]."""

    @abstractmethod
    def load(self, blocks: U8) -> Any:
        """What blocks hold."""

    @abstractmethod
    def vectors(self, packed: U8) -> Vectors:
        """Packed rows [rows, row_bytes], to choose anew within their scales."""

    def unshrunk(self, packed: U8, weights: F32, importance: F32 | None) -> U8:
        """See `QuantFormat.unshrunk`."""
        return stretched(self, packed, weights, importance)

    def stretch(self, blocks: U8, gains: F32) -> None:
        """See `Stretched`."""
        found = self.load(blocks)
        self.store(blocks, found._replace(d=within_float16(found.d * gains)))


def chosen(values: F32, weights: F32, points: F32) -> tuple[U16, F32]:
    """`nearest_points` for values [rows, vectors · dim]: point numbers and losses, [rows, vectors]."""
    shape = (len(values), values.shape[1] // points.shape[1])
    numbers, losses = np.empty(shape, np.uint16), np.empty(shape, np.float32)
    nearest_points(np.ascontiguousarray(values), np.ascontiguousarray(weights), points, numbers, losses)
    return numbers, losses


def inverted(scale: F32) -> F32:
    """1 / scale, 0 where it is 0."""
    inverse: F32 = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale != 0)
    return inverse
