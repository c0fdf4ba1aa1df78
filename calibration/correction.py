"""Weights that make up for what the weights before them lost.

A weight is quantised for the inputs x that it will get, behind quantised weights, though its output should be what the
model has: W x̂ with x̂ the exact inputs. The weights nearest to that in the mean square are W + (W D + G) (H + λ)⁻¹, with
H = mean x xᵀ, D = mean (x̂ − x) xᵀ and, where the output is added to the residual stream, G = mean g xᵀ of the gap g
between the exact stream and this one. Noise that quantisation put where inputs have little energy is filtered out, as by
Wiener's filter. After QEP (Arai and Ichikawa, 2025), which has no G and no held-out share.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from xent_quant.linalg import F32, damped, inverse, product

RIDGE = 0.01
"""λ as a share of H's mean diagonal."""


@dataclass(frozen=True)
class Correction:
    """`hessian` H, not all zeros, `drift` D [in, in] and `gaps` G [out, in] or None as above. Of rows that none of them has
    seen: `inputs` x and `drifts` x̂ − x [n, in], `gap` [n, out] or None. All float32."""

    hessian: F32
    drift: F32
    gaps: F32 | None
    inputs: F32
    drifts: F32
    gap: F32 | None

    def target(self, start: int, weights: F32) -> F32:
        """Rows `start`… [rows, in] float32 of the weight to what should be quantised in their place.

        Goes as far towards the solution as is best on the held-out rows, between not at all and all the way: a regression
        on few rows promises more than it keeps. Holds four copies of the weights.
        """
        rows = slice(start, start + len(weights))
        wanted = product(weights, self.drift)
        wish = product(self.drifts, weights.T)
        if self.gaps is not None and self.gap is not None:
            wanted += self.gaps[rows]
            wish += self.gap[:, rows]
        change = product(wanted, self._inverse)
        reach = product(self.inputs, change.T)
        energy = float(np.square(reach, dtype=np.float64).sum())
        if not energy:
            return weights
        share = np.float32(np.clip(np.multiply(wish, reach, dtype=np.float64).sum() / energy, 0, 1))
        result: F32 = weights + share * change
        return result

    @cached_property
    def _inverse(self) -> F32:
        """(H + λ)⁻¹ [in, in]."""
        return inverse(damped(self.hessian, RIDGE))
