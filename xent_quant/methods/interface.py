"""What a method is: it chooses the values, the format says what their bytes mean.

A method is one file here and one line in `xent_quant.methods.METHODS`.
"""

from typing import Protocol

from xent_quant.formats.base import F32, U8, Encoding
from xent_quant.tensors import InputStatistics


class Method(Protocol):
    """Quantises rows of one weight. Rows are independent: any slice of them gives the same bytes as the whole."""

    @property
    def name(self) -> str: ...

    @property
    def needs_hessian(self) -> bool:
        """Whether it uses `InputStatistics.hessian`."""

    def quantize(
        self, weights: F32, kind: Encoding, statistics: InputStatistics | None, *, name: str, pull: F32 | None = None
    ) -> U8:
        """[rows, columns] float32 to [rows, row_bytes] uint8. `name` is for messages. Raises QuantizationError.

        With a `pull` P [rows, columns], which a method that needs a Hessian H gets with its statistics, W + P (H + λ)⁻¹ is what
        the bytes should stand for."""
