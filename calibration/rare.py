"""The one rule for statistics of few rows, whether they come from text or from a file.

An expert with fewer rows than a statistic needs gets the missing ones from its layer: mean = (Σ of its own rows + missing · the
layer's mean) / (own rows + missing). One that no token reached has its layer's statistics, one with enough rows its own,
unchanged. And no column's importance falls below a share of the mean: a column that calibration never excited must survive.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from xent_quant.formats.base import F32

FEWEST_ROWS = 64
"""Rows on which an importance must stand."""

FEWEST_ROWS_PER_COLUMN = 1.0
"""The same for a Hessian, per input column: with fewer rows than columns it has no inverse."""

COLUMN_FLOOR = 1e-4
"""Least importance of a column, as a share of the mean."""


def fewest_rows(columns: int, hessian: bool) -> int:
    return max(FEWEST_ROWS, int(FEWEST_ROWS_PER_COLUMN * columns)) if hessian else FEWEST_ROWS


def missing_rows(rows: float, fewest: int) -> float:
    """Rows that are to be made up with the layer's."""
    return max(0.0, fewest - rows)


def floored(means: NDArray[Any]) -> F32:
    """Means of x² [n_columns] of any float type to float32, none below COLUMN_FLOOR of their mean."""
    result: F32 = np.maximum(means, COLUMN_FLOOR * means.mean()).astype(np.float32)
    return result
