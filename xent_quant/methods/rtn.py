"""Round to nearest: no statistics and the shortest search; the baseline that other methods must beat."""

from dataclasses import dataclass

import numpy as np

from xent_quant.formats.base import F32, U8, Encoding
from xent_quant.methods.search import searched
from xent_quant.tensors import InputStatistics


@dataclass(frozen=True)
class RoundToNearest:
    """Every column counts the same; a block's scale comes from the few candidates that the type tries at least."""

    name: str = "rtn"
    needs_hessian: bool = False

    def quantize(
        self, weights: F32, kind: Encoding, statistics: InputStatistics | None, *, name: str, pull: F32 | None = None
    ) -> U8:
        """See `Method.quantize`."""
        return searched(weights, kind, None, "fast", name)


def rounding_error(kind: Encoding) -> float:
    """How far Gaussian weights that are rounded to nearest lie from what they were, relative to their norm."""
    weights = np.random.default_rng(0).standard_normal((16, 2048), np.float32)
    read = kind.read(RoundToNearest().quantize(weights, kind, None, name=kind.name), (16, 2048))
    return float(np.linalg.norm(read - weights) / np.linalg.norm(weights))
