"""One routed expert of a layer by itself: the rows that it reads, taken out of a pass, its stages over those rows alone, and what
they make of them, put back. Rows keep their order and come in the same parts, so every bit is as if they had stayed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xent_quant.checkpoint.architecture import Layer
from xent_quant.formats.base import F32
from xent_quant.model.stages import Expert, ExpertIn, Mlp, Pass, Stage, Stream, WeightSource
from xent_quant.model.states import InMemory


@dataclass(frozen=True)
class Seen:
    """What an expert reads. `tokens` [n] int64, ascending, of `total` are those that any stream sends there; by stream, `states`
    [n, hidden] float32 are theirs in front of the MLP's norm, `chosen` and `gates` [n, top k] their routing."""

    layer: int
    expert: int
    total: int
    tokens: NDArray[np.int64]
    states: tuple[F32, ...]
    chosen: tuple[NDArray[np.int32], ...]
    gates: tuple[F32, ...]

    @classmethod
    def by(cls, stages: Sequence[Stage]) -> "Seen":
        """By an expert with these stages."""
        expert = _expert(stages)
        run = expert.mlp.run
        tokens = torch.stack([expert.chose(number) for number in range(len(run.streams))]).any(0).nonzero()[:, 0]
        return cls(
            expert.mlp.layer,
            expert.number,
            run.n_tokens,
            tokens.numpy(),
            tuple(stream.x.take(tokens).numpy() for stream in run.streams),
            tuple(stream.chosen[tokens].numpy() for stream in run.streams),
            tuple(stream.gates[tokens].numpy() for stream in run.streams),
        )


def add(stages: Sequence[Stage], made: Sequence[F32]) -> None:
    """Add what an expert made of its tokens, by stream as `Alone.made`, to the streams that its stages belong to."""
    expert = _expert(stages)
    for number, rows in enumerate(made):
        tokens = expert.chose(number).nonzero()[:, 0]
        if len(tokens):
            expert.mlp.add(expert.number, number, tokens, torch.from_numpy(rows))
        expert.mlp.added(expert.number, number)


def samples(run: Pass, counts: Mapping[int, int]) -> dict[int, F32]:
    """By stream, the states of evenly spaced tokens, so many of each at most, for `Alone`."""
    return {stream: run.streams[stream].x.take(run.sampled(count)).numpy() for stream, count in counts.items()}


def _expert(stages: Sequence[Stage]) -> Expert:
    return cast(ExpertIn, stages[0]).own


class Alone:
    """An expert's `stages` over what it has `Seen`. `sampled` are `samples` of the layer's tokens, which make up a rare expert;
    `dtype`, `kept_rows` and `products` are those of the `Pass`.

    Holds a copy of both, what a `Pass` holds for an expert, and what it makes of the rows.
    """

    def __init__(
        self,
        source: WeightSource,
        seen: Seen,
        sampled: Mapping[int, F32],
        dtype: torch.dtype,
        kept_rows: int,
        products: torch.dtype | None = None,
    ) -> None:
        streams = []
        for number, (states, chosen, gates) in enumerate(zip(seen.states, seen.chosen, seen.gates, strict=True)):
            rows = np.concatenate([states, *([sampled[number]] if number in sampled else [])])
            x = InMemory(torch.from_numpy(rows).to(dtype))
            stream = Stream(x, x, x)
            stream.chosen, stream.gates = torch.from_numpy(chosen), torch.from_numpy(gates)
            streams.append(stream)
        tokens = torch.zeros(1, len(seen.tokens), dtype=torch.int64)
        self.run = _Tokens(source, tokens, streams, dtype, kept_rows, products)
        self.run.total = seen.total
        layer = self.run.architecture.layer(seen.layer)
        mlp = _Collecting(self.run, layer)
        weights = next(weights for number, weights in enumerate(layer.experts) if number == seen.expert)
        self.stages = Expert(mlp, seen.expert).stages(weights)
        self._rows = mlp.rows

    @property
    def made(self) -> list[F32]:
        """By stream, of the tokens that it sends to the expert, what is added to their states, [m, hidden] float32."""
        empty = torch.zeros(0, self.run.architecture.hidden_size)
        return [torch.cat([empty, *(part.float() for part in parts)]).numpy() for parts in self._rows]


class _Tokens(Pass):
    """A pass over some tokens, of `total`; behind them the states hold those of a sample."""

    total = 0

    def sampled(self, count: int) -> Tensor:
        """See `Pass.sampled`."""
        return self.tokens(self.n_tokens, self.n_tokens + min(count, self.total))


class _Collecting(Mlp):
    """Keeps what an expert makes of its tokens."""

    def __init__(self, run: Pass, layer: Layer) -> None:
        super().__init__(run, layer)
        self.rows: list[list[Tensor]] = [[] for _ in run.streams]

    def add(self, expert: int, stream: int, tokens: Tensor, rows: Tensor) -> None:
        """See `Mlp.add`."""
        self.rows[stream].append(rows)

    def added(self, expert: int, stream: int) -> None:
        """See `Mlp.added`."""
