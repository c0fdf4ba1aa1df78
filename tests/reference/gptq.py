"""GPTQ as the paper has it (Frantar et al., 2022, algorithm 1), in float64, one weight at a time, on fixed scales."""

import numpy as np


def nearest(value: float, scale: float, offset: float, levels: np.ndarray) -> int:
    """Index of the level whose value scale·level + offset is nearest; of two equally near ones the first."""
    return int(np.argmin([abs(value - (scale * float(level) + offset)) for level in levels]))


def gptq(weights: np.ndarray, hessian: np.ndarray, scale: np.ndarray, offset: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Codes [rows, columns]; `hessian` is damped already, `scale` and `offset` are [rows, columns]."""
    upper = np.linalg.cholesky(np.linalg.inv(hessian.astype(np.float64))).T  # inverse of H = upperᵀ · upper
    codes = np.zeros(weights.shape, np.uint8)
    for row in range(len(weights)):
        left = weights[row].astype(np.float64)
        for j in range(len(left)):
            codes[row, j] = nearest(left[j], scale[row, j], offset[row, j], levels)
            error = (left[j] - (scale[row, j] * float(levels[codes[row, j]]) + offset[row, j])) / upper[j, j]
            for c in range(j + 1, len(left)):
                left[c] -= error * upper[j, c]
    return codes


def descend(
    weights: np.ndarray, hessian: np.ndarray, scale: np.ndarray, offset: np.ndarray, levels: np.ndarray, codes: np.ndarray
) -> np.ndarray:
    """One round of coordinate descent on e H eᵀ: every code in turn is the best of all levels, found by trying each."""
    codes = codes.copy()
    for row in range(len(weights)):
        for j in range(weights.shape[1]):
            losses = []
            for level in range(len(levels)):
                codes[row, j] = level
                error = weights[row] - (scale[row] * levels[codes[row]].astype(np.float64) + offset[row])
                losses.append(error @ hessian @ error)
            codes[row, j] = int(np.argmin(losses))
    return codes


def vectors(
    weights: np.ndarray, hessian: np.ndarray, scale: np.ndarray, size: int, points: np.ndarray, shift: np.ndarray
) -> np.ndarray:
    """The same of `size` weights at a time, by block elimination: the weights, each vector the nearest of all `points` [n, size]
    (times scale [rows, columns], after adding shift [rows, columns]) by the diagonal of the Schur complement that is its cost."""
    rows, columns = weights.shape
    left, chosen = weights.astype(np.float64), np.zeros(weights.shape)
    for start in range(0, columns, size):
        own, rest = slice(start, start + size), slice(start + size, columns)
        after = np.linalg.inv(hessian[rest, rest].astype(np.float64)) @ hessian[rest, own]  # what those after can make up for
        cost = (hessian[own, own] - hessian[own, rest] @ after).diagonal()
        for row in range(rows):
            values = (points + shift[row, own]) * scale[row, own]
            best = int(np.argmin(((left[row, own] - values) ** 2) @ cost))
            chosen[row, own] = values[best]
            left[row, rest] += (left[row, own] - values[best]) @ after.T
    return chosen
