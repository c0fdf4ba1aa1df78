"""One run of the quantised model over all suites, compared position by position with the reference."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from xent_quant.errors import ValidationError
from xent_quant.progress import Progress
from xent_quant.validation import measures
from xent_quant.validation.measures import F64, I64, Summary
from xent_quant.validation.reference import F32, SuiteTokens, pieces

COMPARED = 1024
"""Token ids that are compared at a time."""


class Runtime(Protocol):
    """A loaded model in a runtime that people use."""

    name: str
    version: str
    vocab_size: int

    def tokenize(self, text: str) -> list[int]:
        """The runtime's own token ids of a text, without special tokens."""

    def logits(self, ids: list[int], first: int = 0) -> F32:
        """[len(ids) − first, vocab] float32 of one fresh context, from position `first` on."""


@dataclass(frozen=True)
class Scores:
    """Of one suite, all [n_windows, per window]: negative log-likelihood and KL divergence in nats, same likeliest token."""

    nll: F64
    kl: F64
    agree: NDArray[np.bool_]


@dataclass(frozen=True)
class CrossCheck:
    """The runtime against the exact path on the first window of every suite: mean KL(exact ‖ runtime) and mean difference of
    the negative log-likelihoods, nats per token."""

    kl: float
    nll_difference: float
    tokens: int


def run(runtime: Runtime, export: Path, windows: I64, progress: Progress) -> Iterator[F32]:
    """Logits of the scored positions, window by window. Raises ValidationError, naming the export, where they are not finite."""
    positions, _ = measures.scored(windows.shape[1])
    for index, window in enumerate(windows):
        block = runtime.logits(window.tolist(), positions.start)[: positions.stop - positions.start]
        if not np.isfinite(block).all():
            raise ValidationError(
                f"{export}: {runtime.name} computes NaN or infinite logits with it (window {index}); export it again"
            )
        yield block
        progress.advance(len(block))


@dataclass
class Comparison:
    """Everything that one run yields, flat over all suites' scored positions."""

    nll: F64
    kl: F64
    agree: NDArray[np.bool_]

    @classmethod
    def of(cls, blocks: Iterator[F32], targets: I64, reference: Summary) -> "Comparison":
        """Consume logits in order: targets [n], reference over the same n positions."""
        n = len(targets)
        result = cls(np.empty(n), np.empty(n), np.empty(n, bool))
        for where, log_q in pieces(blocks):
            result.nll[where] = measures.nll(log_q, targets[where])
            result.kl[where] = measures.kl_from_summary(reference[where], log_q)
            result.agree[where] = measures.top1_agreement(reference[where], log_q)
        return result

    def split(self, suites: Sequence[SuiteTokens]) -> list[Scores]:
        found, start = [], 0
        for suite in suites:
            rows, shape = slice(start, start + suite.targets.size), suite.targets.shape
            found.append(Scores(self.nll[rows].reshape(shape), self.kl[rows].reshape(shape), self.agree[rows].reshape(shape)))
            start += suite.targets.size
        return found


def agreement(ours: Sequence[int], theirs: Sequence[int]) -> float:
    """Share of the reference's tokens that the runtime's tokenizer yields too, in order. Where they differ they are compared part
    by part, since time grows with the square of it."""
    from difflib import SequenceMatcher

    own, other = np.array(ours, np.int64), np.array(theirs, np.int64)
    same = here = there = 0
    while here < len(own) and there < len(other):
        length = min(len(own) - here, len(other) - there, 64 * COMPARED)
        different = np.flatnonzero(own[here : here + length] != other[there : there + length])
        alike = int(different[0]) if len(different) else length
        same, here, there = same + alike, here + alike, there + alike
        if alike == length:
            continue
        parts = own[here : here + COMPARED].tolist(), other[there : there + COMPARED + COMPARED // 8].tolist()
        *blocks, _ = SequenceMatcher(None, *parts, autojunk=False).get_matching_blocks()
        same += sum(block.size for block in blocks)
        here += len(parts[0])
        there += blocks[-1].b + blocks[-1].size if blocks else len(parts[0])
    return same / max(len(own), len(other))
