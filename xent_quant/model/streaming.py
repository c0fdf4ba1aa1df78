"""Runs a whole checkpoint over many windows of tokens while holding one expert, or one layer's attention, at a time.

The weights may come from a checkpoint or from an exported file that is dequantised on the way: anything that is a
WeightSource. The pass is a generator of steps, one for every batch of input rows that a weight sees, which is all that
calibration needs; it advances only as far as it is asked to.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from xent_quant.checkpoint import architecture as names
from xent_quant.checkpoint.architecture import Architecture
from xent_quant.errors import CalibrationError
from xent_quant.model.layers import attention, rms_norm, rotary_tables, route, swiglu
from xent_quant.progress import Progress, Silent

PART_TOKENS = 4096
"""Tokens that go through a weight together (one window at least through attention); bounds what is held besides the hidden
states."""
KEPT_SHARE = 0.25
"""An expert's inner activations are kept between the looks at them where no more than this share of the tokens chose it."""
HEAD_WEIGHTS = 16 * 1024 * 1024
"""Weights of the head multiplied at a time."""


class WeightSource(Protocol):
    """Where weights come from; `Checkpoint` is one."""

    @property
    def architecture(self) -> Architecture: ...

    def read(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
        """Rows start:stop of a checkpoint tensor as float32."""


@dataclass(frozen=True)
class Step:
    """A batch of input rows that is about to be multiplied by the weights named, which share them.

    `inputs` [n, in_features]; `tokens` [n] int64, which token of the flattened windows each row belongs to; `gates` [n], the
    factors with which an expert's output will be scaled, None outside experts; `last`: these weights get no more rows.
    Every expert has a step, of 0 rows where no token chose it. `others` [m, in_features], where `steps` was asked for
    them: what the weight would see if evenly spaced tokens of the layer were sent through its expert.

    With a follower, inputs are the follower's, `exact` [n, in_features] the rows that the model itself has there, and `gap`
    [n, out_features], where the output goes straight to the residual stream, what the follower's lacks of the model's.
    """

    weights: tuple[str, ...]
    inputs: Tensor
    tokens: Tensor
    gates: Tensor | None = None
    last: bool = True
    others: Tensor | None = None
    exact: Tensor | None = None
    gap: Tensor | None = None


class Follower(Protocol):
    """The same model with other weights, run beside it on the same tokens; norms and routers are the model's.

    `embedded` [n_windows, length, hidden] is its own embedding of the tokens, and becomes its residual stream.
    """

    embedded: Tensor

    def read(self, name: str) -> NDArray[np.float32]:
        """A matrix, asked for once, after the last step of its inputs was taken."""


Observer = Callable[[Step], None]
AfterLayer = Callable[[int, Tensor], None]
"""Gets a layer's number and the residual stream behind it [n_windows, length, hidden], which it must not change."""


@dataclass
class _Stream:
    """A residual stream `x` [n_windows, length, hidden] under way, what is about to be added to it, and its weights."""

    weight: Callable[[str], Tensor]
    x: Tensor
    y: Tensor = field(init=False)
    chosen: Tensor = field(init=False)
    gates: Tensor = field(init=False)

    @property
    def flat(self) -> Tensor:
        return self.x.view(-1, self.x.shape[-1])


def _gap(states: Sequence[Tensor]) -> Tensor | None:
    return (states[0] - states[-1]).flatten(0, -2) if len(states) > 1 else None


def _step(
    weights: tuple[str, ...],
    rows: Sequence[Tensor],
    tokens: Tensor,
    last: bool,
    gates: Tensor | None = None,
    mine: Tensor | None = None,
    others: Tensor | None = None,
    gap: Tensor | None = None,
) -> Step:
    """A step of all streams' rows [n, in_features], or of those in the mask `mine` [n]."""
    exact = rows[0] if len(rows) > 1 else None
    if mine is None:
        return Step(weights, rows[-1], tokens, gates, last, others, exact, gap)
    assert gates is not None
    assert exact is not None
    return Step(weights, rows[-1][mine], tokens[mine], gates[mine], last, others, exact[mine])


class StreamingModel:
    """The forward pass. `dtype` is that of weights and hidden states; routing and norms are at least float32."""

    def __init__(self, source: WeightSource, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
        self.source = source
        self.architecture = source.architecture
        self.dtype = dtype
        self.device = torch.device(device)

    def _weight(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        return torch.from_numpy(self.source.read(name)).to(self.device, dtype or self.dtype)

    def hidden_states(
        self,
        windows: Tensor,
        observer: Observer | None = None,
        progress: Progress | None = None,
        after_layer: AfterLayer | None = None,
    ) -> Tensor:
        """Token ids [n_windows, length] to final, normed hidden states [n_windows, length, hidden]; see `steps`."""
        steps = self.steps(windows, progress=progress, after_layer=after_layer)
        while True:
            try:
                step = next(steps)
            except StopIteration as end:
                final: Tensor = end.value
                return final
            if observer:
                observer(step)

    @torch.no_grad()
    def steps(
        self,
        windows: Tensor,
        fewest: int = 0,
        progress: Progress | None = None,
        after_layer: AfterLayer | None = None,
        follower: Follower | None = None,
    ) -> Generator[Step, None, Tensor]:
        """The forward pass of token ids [n_windows, length], one Step at a time in the order of `Architecture.tensors()`
        (the shared MLP's first inputs come with the router's); returns final, normed hidden states [n_windows, length, hidden].

        Work is done only as steps are asked for. An expert chosen by fewer than `fewest` tokens has `fewest` rows of `others`
        in its last step of the down projection. Holds two copies of the hidden states, the weights of one layer's attention or
        one expert, the rows of one expert where no more than a KEPT_SHARE of the tokens chose it, and PART_TOKENS rows on their
        way; with a follower twice that. Raises CalibrationError naming layer and expert where the model's activations become
        NaN or infinite.
        """
        model, report = self.architecture, progress or Silent()
        report.start("Running the model", model.num_layers * windows.numel(), "tokens")
        streams = [_Stream(self._weight, self._embed(windows))]
        if follower:
            streams.append(
                _Stream(lambda name: torch.from_numpy(follower.read(name)).to(self.device, self.dtype), follower.embedded)
            )
        tables = rotary_tables(windows.shape[1], model.head_dim, model.rope_theta, self.dtype)
        for layer in range(model.num_layers):
            yield from self._attend(layer, streams, (tables[0].to(self.device), tables[1].to(self.device)))
            yield from self._mlp(layer, streams, fewest)
            if not torch.isfinite(streams[0].x).all():
                raise CalibrationError(f"layer {layer}: NaN or infinite activations; the checkpoint is damaged")
            if after_layer:
                after_layer(layer, streams[0].x)
            report.advance(windows.numel())
        norm = self._weight(names.FINAL_NORM)
        for tokens, last in self._parts(torch.arange(windows.numel(), device=self.device)):
            for stream in streams:
                stream.flat[tokens] = rms_norm(stream.flat[tokens], norm, model.rms_norm_eps)
            yield _step((self._head_name,), [stream.flat[tokens] for stream in streams], tokens, last)
        report.finish()
        return streams[0].x

    @property
    def _head_name(self) -> str:
        return names.EMBEDDING if self.architecture.tie_word_embeddings else names.HEAD

    @staticmethod
    def _parts(tokens: Tensor) -> Iterator[tuple[Tensor, bool]]:
        """At most PART_TOKENS of them at a time, and whether these are the last; one empty part of none."""
        parts = torch.split(tokens, PART_TOKENS)
        for index, part in enumerate(parts):
            yield part, index == len(parts) - 1

    def _embed(self, windows: Tensor) -> Tensor:
        """Rows of the embedding, read in slices so that it is never whole in memory."""
        model = self.architecture
        x = torch.empty(*windows.shape, model.hidden_size, dtype=self.dtype, device=self.device)
        rows = max(1, HEAD_WEIGHTS // model.hidden_size)
        for start in range(0, model.vocab_size, rows):
            stop = min(start + rows, model.vocab_size)
            here = (windows >= start) & (windows < stop)
            if here.any():
                part = torch.from_numpy(self.source.read(names.EMBEDDING, start, stop)).to(self.device, self.dtype)
                x[here] = part[windows[here] - start]
        return x

    def _attend(self, layer: int, streams: Sequence["_Stream"], tables: tuple[Tensor, Tensor]) -> Iterator[Step]:
        """x += attention(norm(x)), a few windows at a time."""
        model = self.architecture
        count, length, _ = streams[0].x.shape
        norm = self._weight(names.input_norm(layer))
        *qkv, o = (names.attention(layer, which) for which in ("q", "k", "v", "o"))
        at_once = max(1, PART_TOKENS // length)
        parts = []  # of the windows, the tokens in them, and whether they are the last
        for start in range(0, count, at_once):
            stop = min(start + at_once, count)
            parts.append((slice(start, stop), torch.arange(start * length, stop * length, device=self.device), stop == count))
        for part, tokens, last in parts:
            rows = [rms_norm(stream.x[part], norm, model.rms_norm_eps).flatten(0, 1) for stream in streams]
            yield _step(tuple(qkv), rows, tokens, last)
        for stream in streams:
            q, k, v = (stream.weight(name) for name in qkv)
            stream.y = torch.empty_like(stream.x)
            for part, _, _ in parts:
                h = rms_norm(stream.x[part], norm, model.rms_norm_eps)
                stream.y[part] = attention(F.linear(h, q), F.linear(h, k), F.linear(h, v), model.head_dim, tables)
        for part, tokens, last in parts:
            gap = _gap([stream.x[part] for stream in streams])
            yield _step((o,), [stream.y[part].flatten(0, 1) for stream in streams], tokens, last, gap=gap)
        for stream in streams:
            weight = stream.weight(o)
            for part, _, _ in parts:
                stream.x[part] += F.linear(stream.y[part], weight)
            if stream is streams[0] and not torch.isfinite(stream.x).all():
                raise CalibrationError(f"layer {layer}, attention: NaN or infinite activations; the checkpoint is damaged")
            del stream.y

    def _mlp(self, layer: int, streams: Sequence["_Stream"], fewest: int) -> Iterator[Step]:
        """x += experts(norm(x)), one expert at a time over all the tokens that chose it."""
        model = self.architecture
        norm = self._weight(names.post_attention_norm(layer))
        every = torch.arange(streams[0].x.numel() // model.hidden_size, device=self.device)

        def normed(stream: _Stream, tokens: Tensor) -> Tensor:
            return rms_norm(stream.flat[tokens], norm, model.rms_norm_eps)

        for stream in streams:
            stream.y = torch.zeros_like(stream.flat)
        if not model.num_experts:
            dense = [names.dense_mlp(layer, projection) for projection in names.PROJECTIONS]
            yield from self._swiglu(dense, streams, every, normed)
        else:
            wide = torch.promote_types(self.dtype, torch.float32)
            router = self._weight(names.router(layer), wide)
            shared = (
                [names.shared_expert(layer, projection) for projection in names.PROJECTIONS] if model.num_shared_experts else []
            )
            for stream in streams:
                stream.chosen = torch.empty(len(every), model.experts_per_token, dtype=torch.int64, device=self.device)
                stream.gates = torch.empty(stream.chosen.shape, dtype=wide, device=self.device)
            for tokens, last in self._parts(every):
                rows = [normed(stream, tokens) for stream in streams]
                yield _step((names.router(layer), *shared[:2]), rows, tokens, last)
                for stream, h in zip(streams, rows, strict=True):
                    logits = F.linear(h.to(wide), router)
                    stream.gates[tokens], stream.chosen[tokens] = route(logits, model.experts_per_token, model.norm_topk_prob)
            sample = every[:: max(1, len(every) // fewest)][:fewest] if fewest else every[:0]
            for index in range(model.num_experts):
                expert = [names.expert(layer, index, projection) for projection in names.PROJECTIONS]
                yield from self._swiglu(expert, streams, every, normed, (layer, index), sample)
            if shared:
                yield from self._swiglu(shared, streams, every, normed, first=False)
        for stream in streams:
            stream.x += stream.y.view_as(stream.x)
            del stream.y

    def _swiglu(
        self,
        weights: Sequence[str],
        streams: Sequence["_Stream"],
        tokens: Tensor,
        normed: Callable[["_Stream", Tensor], Tensor],
        expert: tuple[int, int] | None = None,
        sample: Tensor | None = None,
        first: bool = True,
    ) -> Iterator[Step]:
        """y += down(silu(gate(h)) · up(h)) of every stream for `tokens`, or for those of them that chose `expert` (layer, index).

        Streams that choose differently all run the tokens that any of them chose; a step has those of the last stream. `first`:
        the inputs of gate and up are a step.
        """
        gate_up, down = tuple(weights[:2]), weights[2]
        every, factors, mine = len(tokens), [], None
        if expert:
            chose = [stream.chosen == expert[1] for stream in streams]
            tokens = torch.stack([each.any(1) for each in chose]).any(0).nonzero()[:, 0]
            factors = [(stream.gates[tokens] * each[tokens]).sum(1) for stream, each in zip(streams, chose, strict=True)]
            mine = chose[-1][tokens].any(1) if len(streams) > 1 else None
        parts = list(self._parts(torch.arange(len(tokens), device=self.device)))

        def step(before: tuple[str, ...], rows: list[Tensor], part: Tensor, last: bool, others: Tensor | None = None) -> Step:
            here = tokens[part]
            gap = _gap([stream.flat[here] + stream.y[here] for stream in streams]) if before == (down,) and not expert else None
            gates = factors[-1][part] if expert else None
            return _step(before, rows, here, last, gates, None if mine is None else mine[part], others, gap)

        if first:
            for part, last in parts:
                yield step(gate_up, [normed(stream, tokens[part]) for stream in streams], part, last)
        pairs = [tuple(stream.weight(name) for name in gate_up) for stream in streams]

        def inner(part: Tensor) -> list[Tensor]:
            rows = [normed(stream, tokens[part]) for stream in streams]
            return [swiglu(h, *pair) for h, pair in zip(rows, pairs, strict=True)]

        kept = [inner(part) for part, _ in parts] if len(parts) == 1 or len(tokens) <= KEPT_SHARE * every else None
        own = len(tokens) if mine is None else int(mine.sum())
        for index, (part, last) in enumerate(parts):
            others = None
            if last and sample is not None and own < len(sample):
                others = swiglu(normed(streams[-1], sample), *pairs[-1])
            yield step((down,), kept[index] if kept else inner(part), part, last, others)
        downs = [stream.weight(down) for stream in streams]
        for index, (part, _) in enumerate(parts):
            for number, rows in enumerate(kept[index] if kept else inner(part)):
                out = F.linear(rows, downs[number])
                if expert and not number and not torch.isfinite(out).all():
                    raise CalibrationError(
                        f"layer {expert[0]}, expert {expert[1]}: NaN or infinite activations; the checkpoint is damaged"
                    )
                if expert:
                    out = (out.to(factors[number].dtype) * factors[number][part, None]).to(self.dtype)
                streams[number].y[tokens[part]] += out

    def head_slices(self) -> Iterator[tuple[int, Tensor]]:
        """(first token id, rows of the head) in order, at most HEAD_WEIGHTS weights at a time."""
        rows = max(1, HEAD_WEIGHTS // self.architecture.hidden_size)
        for start in range(0, self.architecture.vocab_size, rows):
            stop = min(start + rows, self.architecture.vocab_size)
            yield start, torch.from_numpy(self.source.read(self._head_name, start, stop)).to(self.device, self.dtype)

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """[..., hidden] to [..., vocab]; for few rows, since the result is whole in memory, once."""
        found = hidden.new_empty(*hidden.shape[:-1], self.architecture.vocab_size)
        for start, rows in self.head_slices():
            found[..., start : start + len(rows)] = F.linear(hidden, rows)
        return found

    @torch.no_grad()
    def log_probabilities(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Log-probability of each target: hidden [n, hidden], targets [n] to [n] float64. Streams the head."""
        top = torch.full((len(hidden),), -torch.inf, dtype=torch.float64, device=self.device)
        total = torch.zeros_like(top)
        picked = torch.zeros_like(top)
        for start, rows in self.head_slices():
            for part in torch.split(torch.arange(len(hidden), device=self.device), 1024):
                scores = F.linear(hidden[part], rows).double()
                new_top = torch.maximum(top[part], scores.max(-1).values)
                total[part] = total[part] * (top[part] - new_top).exp() + (scores - new_top[:, None]).exp().sum(-1)
                top[part] = new_top
                inside = (targets[part] >= start) & (targets[part] < start + len(rows))
                picked[part[inside]] = scores[inside, targets[part[inside]] - start]
        return picked - top - total.log()

    def perplexity(self, ids: list[int], window: int = 512, progress: Progress | None = None) -> tuple[float, int]:
        """llama-perplexity's figure (windows apart, second half scored) and the number of tokens scored.

        Raises CalibrationError where the text is shorter than one window.
        """
        count = len(ids) // window
        if not count:
            raise CalibrationError(f"{len(ids)} tokens are fewer than one window of {window}; give more text")
        windows = torch.tensor(ids[: count * window], device=self.device).view(count, window)
        hidden = self.hidden_states(windows, progress=progress)
        half = window // 2
        scored = hidden[:, half:-1].reshape(-1, hidden.shape[-1])
        log_p = self.log_probabilities(scored, windows[:, half + 1 :].reshape(-1))
        return float((-log_p.mean()).exp()), len(log_p)
