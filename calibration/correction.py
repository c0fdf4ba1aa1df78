"""Weights that make up for what the weights before them lost.

A weight is quantised for the inputs x that it will get, behind quantised weights, though its output should be what the
model has: W x̂ with x̂ the exact inputs. The weights nearest to that in the mean square are W + (W D + R) (H + λ)⁻¹, with
H = mean x xᵀ, the drift D = mean (x̂ − x) xᵀ and, where the output is added to the residual stream, R = mean r xᵀ of the residual
r that the exact stream holds more than this one. Noise that quantisation put where inputs have little energy is filtered out, as
by Wiener's filter. After QEP (Arai and Ichikawa, 2025), which has no R and no held-out share.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from xent_quant.linalg import F32, Curvature, product
from xent_quant.tensors import InputStatistics


@dataclass(frozen=True)
class Correction:
    """`curvature` of H, `drift` D [in, in] and `residuals` R [out, in] or None as above. Of rows that none of them has seen:
    `inputs` x and `drifts` x̂ − x [n, in], `residual` r [n, out] or None. All float32."""

    curvature: Curvature
    drift: F32
    residuals: F32 | None
    inputs: F32
    drifts: F32
    residual: F32 | None

    @cached_property
    def _reaching(self) -> F32:
        """x (H + λ)⁻¹: with it the outputs of a change of weights are known before the change is."""
        return self.curvature.solve(self.inputs)

    def pull(self, start: int, weights: F32) -> F32:
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
        reach = product(self._reaching, wanted.T)
        energy = float(np.square(reach, dtype=np.float64).sum())
        share = float(np.clip(np.multiply(wish, reach, dtype=np.float64).sum() / energy, 0, 1)) if energy else 0.0
        wanted *= np.float32(share)
        return wanted


@dataclass(frozen=True)
class Measured:
    """What the rows in front of a stage's weights say: how codes are chosen and, behind quantised weights, how the weights are
    moved before. None where no row is known."""

    statistics: InputStatistics | None
    correction: Correction | None


NOTHING = Measured(None, None)
