"""Weights that make up for what the weights before them lost.

A weight is quantised for the inputs x that it will get, behind quantised weights, though its output should be what the
model has: W x̂ with x̂ the exact inputs. The weights nearest to that in the mean square are W + (W D + R) (H + λ)⁻¹, with
H = mean x xᵀ, the drift D = mean (x̂ − x) xᵀ and, where the output is added to the residual stream, R = mean r xᵀ of the residual
r that the exact stream holds more than this one. Noise that quantisation put where inputs have little energy is filtered out, as
by Wiener's filter. After QEP (Arai and Ichikawa, 2025), which has no R and no held-out share.

The experts of a layer read rows of the same states, and what was done to those does not depend on who reads them: D (H + λ)⁻¹ of
all tokens serves every expert's gate and up, and the router (`Regression`); their own rows need not be summed against the exact
ones.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import inf, isfinite
from typing import TYPE_CHECKING, Any, Generic, Protocol, cast

import numpy as np

from xent_quant.formats.base import Encoding
from xent_quant.linalg import Matrix, dot, gaussian, product
from xent_quant.methods.rtn import rounding_error
from xent_quant.parallel import once, one_thread
from xent_quant.tensors import InputStatistics

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from xent_quant.device.statistics import DeviceStatistics


FURTHEST = 2.25
"""Times as far as rounding to the coarsest type of an export would move a row, a correction moves it at most: `validate` so knows
moved weights from damaged ones (docs/validation.md)."""

PROBES, CLEAR = 128, 0.7
"""Products that estimate how far a row is moved, within some ten per cent, and what share of the furthest this may be without a
closer look."""

MIXED = 256
"""Mixtures of a layer's held-out rows that every expert's gate and up are multiplied by, twice, to know one number."""


def furthest(encodings: Iterable[Encoding]) -> float:
    """Of its norm, that a row of an export in these encodings is moved at most; see FURTHEST."""
    return FURTHEST * max((rounding_error(kind) for kind in set(encodings)), default=0.0)


class Solver(Protocol[Matrix]):
    """A factorised Hessian."""

    def solve(self, rows: Matrix) -> Matrix:
        """rows (H + λ)⁻¹."""


class Known(Protocol[Matrix]):
    """`InputStatistics` or `DeviceStatistics` with a Hessian and rows that are held out."""

    @property
    def curvature(self) -> Solver[Matrix] | None: ...

    @property
    def held_out(self) -> Matrix | None: ...

    @property
    def reaching(self) -> Matrix: ...


@dataclass(frozen=True)
class Correction(Generic[Matrix]):
    """`known` of H, `drift` D [in, in] and `residuals` R [out, in] or None as above. Of the rows that `known` holds out:
    `drifts` x̂ − x [n, in], `residual` r [n, out] or None. All float32, in memory or on one device."""

    known: Known[Matrix]
    drift: Matrix
    residuals: Matrix | None
    drifts: Matrix
    residual: Matrix | None
    furthest: float = inf
    """Of its norm, that a row is moved at most."""

    @property
    def curvature(self) -> Solver[Matrix]:
        """Of H."""
        assert self.known.curvature is not None
        return self.known.curvature

    @property
    def inputs(self) -> Matrix:
        """x [n, in], held out."""
        assert self.known.held_out is not None
        return self.known.held_out

    def moved(self, start: int, weights: Matrix) -> tuple[Matrix, Matrix | None]:
        """For rows `start`… [rows, in] float32 of a weight: W and P of that shape; W + P (H + λ)⁻¹ is to be quantised."""
        pull = self.pull(start, weights)
        if self.furthest < inf:
            far = _squares(product(pull, self._probes.T))
            some = ~(far < (CLEAR * self.furthest) ** 2 * _squares(weights))
            if some.any():
                far_reaching = pull[some]
                _keep_within(self.furthest, weights[some], self.curvature.solve(far_reaching), far_reaching)
                pull[some] = far_reaching
        return weights, pull

    @once
    def _probes(self) -> Matrix:
        """Gaussian rows g (H + λ)⁻¹ [PROBES, in]: the squares of their products with p add up to ‖p (H + λ)⁻¹‖², about."""
        return self.curvature.solve(gaussian(PROBES, self.inputs) * PROBES**-0.5)

    def pull(self, start: int, weights: Matrix) -> Matrix:
        """For rows `start`… [rows, in] float32 of the weight, P of the same shape: W + P (H + λ)⁻¹ should be quantised.

        Goes as far towards the solution, P = W D + R, as is best on the held-out rows, between not at all and all the way: a
        regression on few rows promises more than it keeps. Holds two copies of the weights.
        """
        rows = slice(start, start + len(weights))
        wanted = product(weights, self.drift)
        wish = product(self.drifts, weights.T)
        if self.residuals is not None and self.residual is not None:
            wanted += self.residuals[rows]
            wish += self.residual[:, rows]
        reach = product(self.known.reaching, wanted.T)
        wanted *= _share(wish, reach)
        return wanted


@dataclass(frozen=True)
class Regression(Generic[Matrix]):
    """`matrix` D (H + λ)⁻¹ [in, in] of a layer's tokens, for weights that read some of them; `inputs`, `drifts` and
    `furthest` as of `Correction`, or, of many rows, MIXED Gaussian mixtures of them, whose products add up to theirs, about."""

    matrix: Matrix
    inputs: Matrix
    drifts: Matrix
    furthest: float = inf

    @classmethod
    def of(cls, known: Correction[Matrix]) -> "Regression[Matrix]":
        """Of a correction of all of the layer's tokens."""
        inputs, drifts = known.inputs, known.drifts
        if len(inputs) > MIXED:
            mix = gaussian(MIXED, inputs.T) * MIXED**-0.5
            inputs, drifts = product(mix, inputs), product(mix, drifts)
        return cls(known.curvature.solve(known.drift), inputs, drifts, known.furthest)

    def on(self, device: "torch.device") -> "Regression[Tensor]":
        """One of tensors, on another device."""
        matrix, inputs, drifts = (cast(Any, each).to(device) for each in (self.matrix, self.inputs, self.drifts))
        return Regression(matrix, inputs, drifts, self.furthest)

    def moved(self, start: int, weights: Matrix) -> tuple[Matrix, Matrix | None]:
        """As `Correction.moved`, with None for P = 0. Goes as far as is best on the held-out rows. Holds another copy of the
        weights."""
        with one_thread():  # products of a router's few rows are cut by threads in other ways than those of many
            change = product(weights, self.matrix)
            change *= _share(product(self.drifts, weights.T), product(self.inputs, change.T))
        if self.furthest < inf:
            _keep_within(self.furthest, weights, change, change)
        change += weights
        return change, None


def _keep_within(furthest: float, weights: Matrix, moved: Matrix, pull: Matrix) -> None:
    """Make `pull` [rows, in] smaller in rows that it moves, by `moved`, further than so many times the norm of theirs."""
    with np.errstate(over="ignore", invalid="ignore"):
        reach, far = (_squares(each) ** 0.5 for each in (weights, moved))
        share = furthest * reach / (far + 1e-30)
    share[~(share < 1)] = 1
    if (share < 1).any():
        pull *= share[:, None]


def _squares(rows: Matrix) -> Matrix:
    """The sum of each row's."""
    with np.errstate(over="ignore", invalid="ignore"):  # of weights that are too large, which is said elsewhere
        found: Matrix = np.einsum("ij,ij->i", rows, rows) if isinstance(rows, np.ndarray) else (rows * rows).sum(1)
    return found


def _share(wish: Matrix, reach: Matrix) -> float:
    """How much of a change should be made that reaches so far where so much is wished, both [n, out] float32: 0 to 1. Raises
    FloatingPointError where one of them holds NaN or infinities: the weights are too large for float32."""
    energy = dot(reach, reach)
    if not isfinite(energy) or not isfinite(dot(wish, wish)):
        raise FloatingPointError
    return min(max(dot(wish, reach) / energy, 0.0), 1.0) if energy else 0.0


@dataclass(frozen=True)
class Measured:
    """What the rows in front of a stage's weights say: how codes are chosen and, behind quantised weights, how the weights are
    moved before. None where no row is known."""

    statistics: "InputStatistics | DeviceStatistics | None"
    correction: Correction[Any] | Regression[Any] | None

    @property
    def in_memory(self) -> InputStatistics | None:
        """The statistics, wherever they are."""
        known = self.statistics
        return known if known is None or isinstance(known, InputStatistics) else known.on_cpu()


NOTHING = Measured(None, None)
