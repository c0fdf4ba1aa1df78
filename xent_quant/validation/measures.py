"""What is measured, as pure functions on arrays: n scored positions, V vocabulary, natural logarithms, float64 results.

Windows and the choice of what is scored are llama-perplexity's, so that figures can be compared with stock tools. KL
divergence is KL(reference ‖ quantised), as llama-perplexity's --kl-divergence has it, here from a summary of the
reference's distribution that is 30 to 500 times smaller than its logits.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import exp, log, sqrt

import numpy as np
from numpy.typing import NDArray

from xent_quant.errors import ValidationError

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
Logits = NDArray[np.float32] | NDArray[np.float64]

TOP_K = 128
TAIL_SAMPLES = 64
MASS_FLOOR = 1e-12
"""Below this a tail's mass is rounding noise of the sum over the top k."""


def windows(ids: list[int] | I64, context: int, bos: int | None = None) -> I64:
    """Token ids cut into [n_windows, context], the rest dropped; `bos` replaces each first token, as llama-perplexity does.

    Raises ValidationError for an odd or tiny context and for a text shorter than one window.
    """
    if context < 4 or context % 2:
        raise ValidationError(f"--context {context}: windows need an even length of at least 4")
    count = len(ids) // context
    if not count:
        raise ValidationError(f"{len(ids)} tokens are fewer than one window of {context}; give more text or a smaller --context")
    cut = np.array(ids[: count * context], dtype=np.int64).reshape(count, context)
    if bos is not None:
        cut[:, 0] = bos
    return cut


def scored(context: int) -> tuple[slice, slice]:
    """(positions whose prediction is scored, positions of their targets): the second half of a window but its last."""
    half = context // 2
    return slice(half, context - 1), slice(half + 1, context)


def log_softmax(logits: Logits) -> F64:
    """[..., V] logits to log-probabilities, computed in float64."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    return wide


def nll(log_q: F64, targets: I64) -> F64:
    """Negative log-likelihood [n] in nats of targets [n] under log-probabilities [n, V]."""
    return -log_q[np.arange(len(targets)), targets]


def exponential(value: float) -> float:
    """exp, of 700 beyond 700: a damaged model's perplexity is a number, too."""
    return exp(min(value, 700.0))


def relative_errors(found: Sequence[F32], exact: Sequence[F32]) -> tuple[float, ...]:
    """Of the residual stream behind each layer: the root of Σ (found − exact)² over Σ exact² of all pairs
    [layers, positions, hidden]."""
    wide = [each.astype(np.float64) for each in exact]  # a damaged model's squares are beyond float32
    differences = sum(((a - b) ** 2).sum(axis=(1, 2)) for a, b in zip(found, wide, strict=True))
    norms = sum((each**2).sum(axis=(1, 2)) for each in wide)
    return tuple(float(value) for value in np.sqrt(differences / norms))


def perplexity(nlls: F64) -> float:
    """exp of the mean negative log-likelihood per token."""
    return exponential(float(nlls.mean()))


def bits_per_byte(nlls: F64, n_bytes: int) -> float:
    """Bits that the model needs per UTF-8 byte of the scored text: comparable across tokenizers."""
    return float(nlls.sum()) / log(2) / n_bytes


def kl_divergence(log_p: F64, log_q: F64) -> F64:
    """KL(p ‖ q) [n] in nats of two full sets of log-probabilities [n, V]."""
    result: F64 = (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)
    return result


@dataclass(frozen=True)
class Summary:
    """A distribution's k most likely tokens, the mass of the rest, and tokens drawn from the rest.

    `ids` and `log_p` [n, k], by falling probability, of equal ones the lower id first; `tail` [n] is the mass beyond them;
    `sample_ids` and `sample_log_p` [n, m] are draws from the tail in proportion to its probabilities (m is 0 where k = V).
    """

    ids: NDArray[np.int32]
    log_p: NDArray[np.float32]
    tail: F64
    sample_ids: NDArray[np.int32]
    sample_log_p: NDArray[np.float32]

    def __getitem__(self, rows: slice) -> "Summary":
        """Some of the positions."""
        return Summary(*(getattr(self, field.name)[rows] for field in fields(self)))

    @staticmethod
    def joined(parts: Sequence["Summary"]) -> "Summary":
        """The positions of all parts, in order."""
        return Summary(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Summary)))


def draw_offsets(n: int) -> F64:
    """The random numbers [n] in [0, 1) that `summarise` draws with; always the same."""
    return np.random.default_rng(0).random(n)


def summarise(log_p: F64, top_k: int = TOP_K, samples: int = TAIL_SAMPLES, offsets: F64 | None = None) -> Summary:
    """Summary of log-probabilities [n, V]; `offsets` [n] are `draw_offsets`, or their part. Holds two copies of `log_p`."""
    n, vocab = log_p.shape
    top_k = min(top_k, vocab)
    if top_k < vocab:
        ids = np.sort(np.argpartition(-log_p, top_k - 1, axis=1)[:, :top_k], axis=1)
    else:
        ids = np.broadcast_to(np.arange(vocab), (n, vocab)).copy()
    order = np.argsort(-np.take_along_axis(log_p, ids, 1), axis=1, kind="stable")
    ids = np.take_along_axis(ids, order, 1)
    top = np.take_along_axis(log_p, ids, 1)
    if top_k == vocab:
        nothing = np.empty((n, 0))
        return Summary(ids.astype(np.int32), top.astype(np.float32), np.zeros(n), nothing.astype(np.int32), nothing.astype("f4"))
    rest = np.exp(log_p)
    np.put_along_axis(rest, ids, 0.0, 1)
    cumulated = rest.cumsum(axis=1)
    tail = cumulated[:, -1].copy()  # a view would keep [n, V] alive for as long as the summary
    # Systematic draws: one random offset per position, then equal steps through the tail's mass in order of token id.
    offsets = draw_offsets(n) if offsets is None else offsets
    steps = (np.arange(samples) + offsets[:, None]) / max(samples, 1)  # [n, m]
    drawn = np.empty((n, samples), np.int64)
    for row in range(n):
        drawn[row] = np.searchsorted(cumulated[row], steps[row] * tail[row], side="right")
    drawn = np.minimum(drawn, vocab - 1)
    return Summary(
        ids.astype(np.int32),
        top.astype(np.float32),
        tail,
        drawn.astype(np.int32),
        np.take_along_axis(log_p, drawn, 1).astype(np.float32),
    )


def kl_from_summary(p: Summary, log_q: F64) -> F64:
    """KL(p ‖ q) [n] of a summarised reference and full log-probabilities [n, V] of the quantised model.

    With P, Q the tail masses it is  Σ_top p·(log p − log q) + P·log(P/Q) + P·KL(tail of p ‖ tail of q).  The first two terms
    are exact and, by the log-sum inequality, never more than the whole; dropping the third, as a summary without draws
    must, loses about the share P of the whole (a fifth on text of perplexity 100). The third is the mean over the draws of
    r − 1 − log r with r = (q/Q)/(p/P): unbiased, never negative, and with far less variance than the mean of −log r
    (J. Schulman, Approximating KL Divergence, 2020).
    """
    log_top = p.log_p.astype(np.float64)
    at_top = np.take_along_axis(log_q, p.ids.astype(np.int64), 1)
    exact: F64 = (np.exp(log_top) * (log_top - _single(at_top))).sum(axis=1)
    if not p.sample_ids.shape[1]:
        return exact
    tail_p = np.maximum(p.tail, MASS_FLOOR)
    tail_q = np.maximum(1.0 - np.exp(at_top).sum(axis=1), MASS_FLOOR)
    log_ratio = np.log(tail_p / tail_q)
    at_samples = np.take_along_axis(log_q, p.sample_ids.astype(np.int64), 1)
    log_r = _single(at_samples) - p.sample_log_p.astype(np.float64) + log_ratio[:, None]
    log_r = np.minimum(log_r, 600.0)  # of a damaged model; sums of such powers are finite
    within = (np.expm1(log_r) - log_r).mean(axis=1)
    result: F64 = exact + np.where(p.tail > MASS_FLOOR, p.tail * (log_ratio + within), 0.0)
    return result


def _single(log_q: F64) -> F64:
    """Rounded as the summary's log-probabilities are, so that equal distributions are 0 apart and not a rounding error."""
    return log_q.astype(np.float32).astype(np.float64)


def top1_agreement(p: Summary, log_q: F64) -> NDArray[np.bool_]:
    """Whether both think the same token likeliest, [n]; of equal ones the lower id counts."""
    same: NDArray[np.bool_] = log_q.argmax(axis=1) == p.ids[:, 0]
    return same


@dataclass(frozen=True)
class Estimate:
    """A figure with its standard error; the error is infinite where one window alone was measured."""

    value: float
    error: float


def token_mean(values: NDArray[np.generic]) -> Estimate:
    """Mean with the standard error of independent tokens, as llama-perplexity prints it."""
    wide = values.astype(np.float64)
    error = float(wide.std(ddof=1)) / sqrt(len(wide)) if len(wide) > 1 else float("inf")
    return Estimate(float(wide.mean()), error)


def window_mean(values: NDArray[np.generic]) -> Estimate:
    """Mean of [n_windows, per window] with its standard error over windows, or over tokens where that is larger.

    Tokens of one window share a topic and are not independent; whole windows nearly are, but a few may agree by chance.
    """
    over_windows, over_tokens = token_mean(values.astype(np.float64).mean(axis=1)), token_mean(values.ravel())
    return Estimate(over_windows.value, max(over_windows.error, over_tokens.error))


def perplexity_ratio(nlls: F64, reference: F64) -> Estimate:
    """Perplexity over the reference's on the same tokens, [n_windows, per window] each, with the paired standard error.

    exp of the mean difference d; by the delta method its error is the ratio times the error of d over windows.
    """
    difference = window_mean(nlls - reference)
    ratio = exponential(difference.value)
    return Estimate(ratio, ratio * difference.error)
