"""The importance-weighted search: every block's scales and codes minimise Σ importance · (w − ŵ)²."""

from dataclasses import dataclass

from xent_quant.formats.base import F32, U8, Effort, Encoding, QuantFormat
from xent_quant.tensors import InputStatistics


@dataclass(frozen=True)
class Search:
    """Without statistics every column counts the same."""

    effort: Effort = "normal"
    name: str = "imatrix"
    needs_hessian: bool = False

    def quantize(
        self, weights: F32, kind: Encoding, statistics: InputStatistics | None, *, name: str, pull: F32 | None = None
    ) -> U8:
        """See `Method.quantize`."""
        return searched(weights, kind, statistics.importance if statistics else None, self.effort, name)


def searched(weights: F32, kind: Encoding, importance: F32 | None, effort: Effort, name: str) -> U8:
    """Weights [rows, columns] as the type's search encodes them, and no smaller for it: see `QuantFormat.quantize`, which raises,
    and `QuantFormat.unshrunk`."""
    packed = kind.quantize(weights, importance, effort=effort, name=name)
    return kind.unshrunk(packed, weights, importance) if isinstance(kind, QuantFormat) else packed
