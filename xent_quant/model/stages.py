"""A model's forward pass as a list of stages, over a whole text at a time.

A stage is a group of weights that read the same rows. Whoever runs the model takes the stages one by one: looks at the rows that
are about to be multiplied (`batches`), decides what the weights are, and lets the state go on with them (`advance`). Nothing
else happens between, so a quantiser stands exactly where a weight's inputs are known and its outputs are not.

The same tokens may run through several streams: the first is the model itself, the *exact stream*; each other one has weights of
its own, what an export made of the model's (a *quantised stream*). Norms are the model's in all of them.

    x ─ norm ─► q k v ─► attention ─► o ─► x ─ norm ─► router ─► experts, shared MLP ─► x
        stage 1                    stage 2      stage 3       two stages each
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import groupby
from pathlib import Path
from typing import Protocol, TypeVar, cast

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xent_quant.checkpoint.architecture import Architecture, Layer
from xent_quant.checkpoint.reader import Checkpoint
from xent_quant.errors import CalibrationError
from xent_quant.linalg import linear
from xent_quant.model.layers import attention, head_norm, rms_norm, rotary_tables, route, swiglu
from xent_quant.model.sizes import ATTENDED, DEVICE_PART_TOKENS, INNER, KEPT_ROWS, PART_TOKENS, STATE_FILES
from xent_quant.model.states import OnDisk, States
from xent_quant.parallel import Turns, check
from xent_quant.parallel import run as run_jobs
from xent_quant.tensors import TensorSpec

SMALLEST = 0.25
"""Of the median size of states, the size of one that is smaller: what is added to it has a size too."""

T = TypeVar("T")
Weights = Mapping[str, Tensor]


class WeightSource(Protocol):
    """Where weights come from; `Checkpoint` is one."""

    @property
    def architecture(self) -> Architecture: ...

    @property
    def path(self) -> Path:
        """The file or folder, for messages."""
        ...

    def read(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
        """Rows start:stop of a checkpoint tensor as float32."""


@dataclass(frozen=True)
class Batch:
    """Input rows of a stage in one stream.

    `inputs` [n, in_features]; `tokens` [n] int64, which token of the flattened windows each row belongs to; `gates` [n], the
    factors with which an expert's output will be scaled, None outside experts. In a quantised stream also `exact`
    [n, in_features], the rows of the exact stream there (but of routed experts' gate and up, whose rows are some of the router's)
    and, where the output goes to the residual stream, `sizes` [n] float32, see `Pass.sizes`; where it goes there straight,
    `residual` [n, out_features], how much more the exact stream holds there than this one.
    """

    inputs: Tensor
    tokens: Tensor
    gates: Tensor | None = None
    exact: Tensor | None = None
    residual: Tensor | None = None
    sizes: Tensor | None = None


@dataclass
class Stream:
    """A residual stream: `x` [n_tokens, hidden], what is about to be added to it, `y`, and where the next `x` is written, `spare`
    (which may be `x` itself where nobody asks for the layer's beginning again). `attended` [n_tokens, attention width] is what
    attention makes; None stands for `y`, where that is as wide. `inner` [n_tokens, width of the shared or dense MLP] keeps what
    is between that MLP's weights from one look at it to the next; None: it is computed again."""

    x: States
    y: States
    spare: States
    attended: States | None = None
    inner: States | None = None
    chosen: Tensor = field(init=False)
    gates: Tensor = field(init=False)

    @classmethod
    def of(cls, files: Mapping[str, States]) -> "Stream":
        """Of states by their names in `state_files`."""
        before, behind, added = (files[name] for name in STATE_FILES)
        return cls(before, added, behind, files.get(ATTENDED), files.get(INNER))

    @property
    def mixed(self) -> States:
        """What attention makes, until its output projection."""
        return self.attended or self.y

    def on(self, device: torch.device) -> "Stream":
        """The states of a stream in files, and its routing in the layer that is under way, for that layer's experts on another
        device."""
        assert isinstance(self.x, OnDisk)
        assert isinstance(self.y, OnDisk)
        x, y = self.x.on(device), self.y.on(device)
        found = Stream(x, y, x)
        found.chosen, found.gates = self.chosen.to(device), self.gates.to(device)
        return found


class Stage(ABC):
    """Weights that read the same rows, and what happens with what they make of them."""

    is_head = False
    """Whether it is the last one, of the whole model."""

    def __init__(self, run: "Pass", weights: Sequence[TensorSpec]) -> None:
        self.run, self.weights = run, tuple(weights)

    @property
    def expert(self) -> int | None:
        """The routed expert that it is a part of. Experts of a layer may run side by side, each one's stages in their order."""
        return self.weights[0].expert if self.weights else None

    @abstractmethod
    def batches(self, stream: int) -> Iterator[Batch]:
        """The rows of one stream, at most `Pass.part` (or one window) at a time."""

    @abstractmethod
    def advance(self, weights: Sequence[Weights]) -> None:
        """Go on with these weights of each stream, by name."""

    def others(self, stream: int, count: int) -> Batch | None:
        """At most `count` rows: what the weights would see of evenly spaced tokens of the layer, where that takes running them
        through the weights before; no exact ones. None where those rows are the layer's own."""
        return None


class Pass:
    """`windows` [n_windows, length] of token ids on their way through the model in every one of `streams`.

    `dtype` is that of weights and states, `products` of weights where rows are multiplied by them in another one
    (`linalg.linear`); routing and norms are at least float32. Holds the routing of one layer, and for every stream `part` rows
    on their way, an expert's inner rows (`kept_rows` at most), and the weights that were given for the stage; of as many experts
    as run side by side.
    """

    def __init__(
        self,
        source: WeightSource,
        windows: Tensor,
        streams: Sequence[Stream],
        dtype: torch.dtype,
        kept_rows: int = KEPT_ROWS,
        products: torch.dtype | None = None,
    ) -> None:
        self.kept_rows, self.products = kept_rows, products or dtype
        self.source, self.architecture, self.streams, self.dtype = source, source.architecture, streams, dtype
        self.windows, self.device = windows, windows.device
        self.count, self.length = windows.shape

    def on(self, device: torch.device) -> "Pass":
        """The same, of streams in files, for the experts of the layer that is under way on another device."""
        streams = [stream.on(device) for stream in self.streams]
        return Pass(self.source, self.windows.to(device), streams, self.dtype, self.kept_rows, self.products)

    @cached_property
    def tables(self) -> tuple[Tensor, Tensor]:
        """Of rotary embedding, for every place in a window."""
        cos, sin = rotary_tables(self.length, self.architecture, self.dtype)
        return cos.to(self.device), sin.to(self.device)

    @property
    def part(self) -> int:
        """Tokens that go through a weight together."""
        return PART_TOKENS if self.device.type == "cpu" else DEVICE_PART_TOKENS

    @property
    def n_tokens(self) -> int:
        return self.count * self.length

    def tensor(self, weights: NDArray[np.float32] | Tensor) -> Tensor:
        """Weights as the pass takes them."""
        return torch.as_tensor(weights).to(self.device, self.products)

    def read(self, name: str) -> Tensor:
        """A matrix of the model itself, as the pass takes weights."""
        if self.products == torch.bfloat16 and isinstance(self.source, Checkpoint):  # without a copy in float32 on the way
            return self.source.read_torch(name, self.products).to(self.device)
        return self.tensor(self.source.read(name))

    def weight(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor of the model itself."""
        return torch.from_numpy(self.source.read(name)).to(self.device, dtype or self.dtype)

    def embed(self, stream: int, start: int, rows: Tensor) -> None:
        """Rows `start`… of the embedding become the states of the tokens of these ids."""
        ids = self.windows.reshape(-1)
        here = ((ids >= start) & (ids < start + len(rows))).nonzero()[:, 0]
        for part in torch.split(here, self.part):
            if len(part):
                self.streams[stream].x.put(part, rows[(ids[part] - start).to(rows.device)].to(self.device, self.dtype))

    def layer(self, index: int) -> "list[Stage]":
        """The stages of a layer in their order; the last one's `advance` ends the layer."""
        layer = self.architecture.layer(index)
        mlp, every = Mlp(self, layer), layer.mlp or ()
        stages: list[Stage] = [_AttentionIn(self, layer), _AttentionOut(self, (layer.output,), index)]
        stages.append(_Router(mlp, (*((layer.router,) if layer.router else ()), *every[:2])))
        for number, weights in enumerate(layer.experts):
            stages += Expert(mlp, number).stages(weights)
        return [*stages, _SharedDown(mlp, every[2:])]

    def head(self) -> "Head":
        """The last stage, of final, normed states."""
        return Head(self, (self.architecture.head,))

    def expert_tokens(self, stream: int) -> list[int]:
        """How many tokens a stream sends to each expert of the layer that is under way."""
        counts = torch.bincount(self.streams[stream].chosen.reshape(-1), minlength=self.architecture.num_experts)
        return [int(count) for count in counts]

    def parts(self) -> Iterator[tuple[int, int]]:
        """(first, last + 1) of at most `part` tokens at a time."""
        for start in range(0, self.n_tokens, self.part):
            check()
            yield start, min(start + self.part, self.n_tokens)

    def window_parts(self) -> Iterator[tuple[int, int]]:
        """The same in whole windows, one at least."""
        step = max(1, self.part // self.length) * self.length
        for start in range(0, self.n_tokens, step):
            check()
            yield start, min(start + step, self.n_tokens)

    def tokens(self, start: int, stop: int) -> Tensor:
        return torch.arange(start, stop, device=self.device)

    def sampled(self, count: int) -> Tensor:
        """At most `count` tokens, evenly spaced from the first on."""
        count = min(count, self.n_tokens)
        return self.tokens(0, count) * self.n_tokens // max(1, count)

    def each_stream(self, work: Callable[[int], None]) -> None:
        """Have `work` done for every stream, by its number."""
        self.together([partial(work, number) for number in range(len(self.streams))])

    def together(self, jobs: Sequence[Callable[[], T]]) -> list[T]:
        """What the jobs return, which are done side by side on the CPU, where each has its share of the threads."""
        threads = numba.get_num_threads()
        most = min(len(jobs), threads) if self.device.type == "cpu" else 1
        return run_jobs(jobs, most, each=threads // most) if most > 1 else [job() for job in jobs]

    def sizes(self, stream: int, tokens: Tensor) -> Tensor:
        """[n] float32, what a norm would divide the states of `tokens` [n] by; no less than SMALLEST of the median."""
        squares = self.streams[stream].x.take(tokens).float().square().mean(1) + self.architecture.rms_norm_eps
        return squares.clamp_min(float(squares.median()) * SMALLEST**2).sqrt() if len(tokens) else squares

    def check_finite(self, rows: Tensor, where: str) -> None:
        """Raise CalibrationError naming the model and the place where its own activations are NaN or infinite."""
        # One by one, which takes many times as long, only where their sum overflows or is none.
        if not torch.isfinite(rows.sum()) and not torch.isfinite(rows).all():
            raise CalibrationError(f"{self.source.path}: {where}: NaN or infinite activations; the weights are damaged")


class _AttentionIn(Stage):
    def __init__(self, run: Pass, layer: Layer) -> None:
        super().__init__(run, (layer.q, layer.k, layer.v))
        self._norm, self._qk_norms = layer.attention_norm.name, layer.qk_norms

    def _rows(self, stream: int, start: int, stop: int, norm: Tensor) -> Tensor:
        return rms_norm(self.run.streams[stream].x.read(start, stop), norm, self.run.architecture.rms_norm_eps)

    def batches(self, stream: int) -> Iterator[Batch]:
        norm = self.run.weight(self._norm)
        for start, stop in self.run.window_parts():
            exact = self._rows(0, start, stop, norm) if stream else None
            yield Batch(self._rows(stream, start, stop, norm), self.run.tokens(start, stop), exact=exact)

    def advance(self, weights: Sequence[Weights]) -> None:
        run = self.run
        norm, head_dim, eps = run.weight(self._norm), run.architecture.head_dim, run.architecture.rms_norm_eps
        qk_norms = [run.weight(spec.name) for spec in self._qk_norms or ()]

        def advance(number: int) -> None:
            stream = run.streams[number]
            q, k, v = (weights[number][spec.name] for spec in self.weights)
            for start, stop in run.window_parts():
                h = self._rows(number, start, stop, norm)
                rows = [linear(h, each) for each in (q, k, v)]
                for index, weight in enumerate(qk_norms):
                    rows[index] = head_norm(rows[index], weight, eps)
                q_rows, k_rows, v_rows = (each.view(-1, run.length, each.shape[1]) for each in rows)
                stream.mixed.write(start, attention(q_rows, k_rows, v_rows, head_dim, run.tables).flatten(0, 1))

        run.each_stream(advance)


class _AttentionOut(Stage):
    def __init__(self, run: Pass, weights: Sequence[TensorSpec], layer: int) -> None:
        super().__init__(run, weights)
        self._layer = layer

    def batches(self, stream: int) -> Iterator[Batch]:
        exact, own = self.run.streams[0], self.run.streams[stream]
        for start, stop in self.run.window_parts():
            rows, tokens = own.mixed.read(start, stop), self.run.tokens(start, stop)
            if not stream:
                yield Batch(rows, tokens)
                continue
            residual = exact.x.read(start, stop) - own.x.read(start, stop)
            sizes = self.run.sizes(stream, tokens)
            yield Batch(rows, tokens, exact=exact.mixed.read(start, stop), residual=residual, sizes=sizes)

    def advance(self, weights: Sequence[Weights]) -> None:
        (spec,) = self.weights

        def advance(number: int) -> None:
            stream = self.run.streams[number]
            for start, stop in self.run.window_parts():
                rows = stream.mixed.read(start, stop)
                behind = stream.x.read(start, stop) + linear(rows, weights[number][spec.name])
                if not number:
                    self.run.check_finite(behind, f"layer {self._layer}, attention")
                stream.spare.write(start, behind)
            stream.x, stream.spare = stream.spare, stream.x

        self.run.each_stream(advance)


class Mlp:
    """What the stages of one layer's MLP share: its norm, and the gate and up weights of the shared (or dense) MLP."""

    def __init__(self, run: Pass, layer: Layer) -> None:
        self.run, self.layer, self._norm_name = run, layer.index, layer.mlp_norm.name
        self._norm: Tensor | None = None
        self.shared: list[tuple[Tensor, Tensor]] = []
        """gate and up in every stream."""
        self._kept = [0] * len(run.streams)
        """Tokens whose inner rows of the shared MLP are kept."""
        self._turn_of = list(range(run.architecture.num_experts or 0))
        self._adding = [Turns(len(self._turn_of)) for _ in run.streams]

    def on(self, device: torch.device) -> "Mlp":
        """Of the same layer on another device, for experts; those of both have their turns together."""
        found = copy(self)
        found.run, found._norm, found.shared = self.run.on(device), None, []
        return found

    @property
    def norm(self) -> Tensor:
        if self._norm is None:
            self._norm = self.run.weight(self._norm_name)
        return self._norm

    def normed(self, stream: int, tokens: Tensor) -> Tensor:
        return rms_norm(self.run.streams[stream].x.take(tokens), self.norm, self.run.architecture.rms_norm_eps)

    def largest_first(self) -> list[int]:
        """The experts' numbers in the order in which they have their turns from now on: first those to which the model itself
        sends most tokens. Neighbours so take about as long, and little is left to do where only one thread has an expert."""
        counts = self.run.expert_tokens(0)
        order = sorted(range(len(counts)), key=lambda expert: -counts[expert])
        for turn, expert in enumerate(order):
            self._turn_of[expert] = turn
        return order

    def add(self, expert: int, stream: int, tokens: Tensor, rows: Tensor) -> None:
        """What an expert makes of some of a stream's tokens, ascending. Experts add to a token's sum in their turn, so that it
        does not depend on who is done first."""
        own = self.run.streams[stream]
        with self._adding[stream].at(self._turn_of[expert], int(tokens[-1])):
            own.y.put(tokens, own.y.take(tokens) + rows)

    def added(self, expert: int, stream: int) -> None:
        """An expert has no more to add."""
        with self._adding[stream].at(self._turn_of[expert], self.run.n_tokens):
            pass

    def shared_inner(self, stream: int, start: int, stop: int, *, last: bool) -> Tensor:
        """[stop − start, width], inner rows of the shared MLP. They are kept where there is a place for them, unless this is the
        `last` look."""
        kept = self.run.streams[stream].inner
        if kept is not None and stop <= self._kept[stream]:
            return kept.read(start, stop)
        rows = swiglu(self.normed(stream, self.run.tokens(start, stop)), *self.shared[stream])
        if kept is not None and not last and start == self._kept[stream]:
            kept.write(start, rows)
            self._kept[stream] = stop
        return rows


class Expert:
    """What the stages of one expert share: its gate and up weights in every stream, and the inner rows of its first tokens."""

    def __init__(self, mlp: Mlp, number: int) -> None:
        self.mlp, self.number = mlp, number
        self._pairs: list[tuple[Tensor, Tensor]] = []
        self._inner: dict[int, tuple[Tensor, Tensor]] = {}

    def stages(self, weights: Sequence[TensorSpec]) -> list[Stage]:
        """Its stages, with gate, up and down."""
        return [ExpertIn(self, weights[:2]), ExpertDown(self, weights[2:])]

    def chose(self, stream: int) -> Tensor:
        """Mask [n_tokens] of the tokens of which a stream sends to the expert."""
        return (self.mlp.run.streams[stream].chosen == self.number).any(1)

    def seen(self, stream: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(tokens, gates) of a stream, `Pass.part` at most at a time."""
        state = self.mlp.run.streams[stream]
        for tokens in torch.split(self.chose(stream).nonzero()[:, 0], self.mlp.run.part):
            check()
            yield tokens, (state.gates[tokens] * (state.chosen[tokens] == self.number)).sum(1)

    def begin(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        """With these gate and up weights."""
        self._pairs = pairs
        wanted = [self.chose(number) for number in range(len(pairs))]
        wanted[0] = torch.stack(wanted).any(0)  # the exact rows of every token that any stream sends there
        for number, mask in enumerate(wanted):
            tokens = mask.nonzero()[: self.mlp.run.kept_rows, 0]
            if len(tokens):
                run = self.mlp.run
                rows = torch.empty(len(tokens), len(pairs[number][0]), dtype=run.dtype, device=run.device)
                for start in range(0, len(tokens), run.part):
                    here = slice(start, start + run.part)
                    rows[here] = self._compute(number, tokens[here])
                self._inner[number] = tokens, rows

    def end(self) -> None:
        """Let go of everything."""
        self._pairs, self._inner = [], {}

    def _compute(self, stream: int, tokens: Tensor) -> Tensor:
        check()
        return swiglu(self.mlp.normed(stream, tokens), *self._pairs[stream])

    def inner(self, stream: int, tokens: Tensor) -> Tensor:
        """Inner rows of some of the tokens that any stream sends there, ascending."""
        if stream not in self._inner:
            return self._compute(stream, tokens)
        known, rows = self._inner[stream]
        count = int(torch.searchsorted(tokens, known[-1], right=True))
        kept = rows if len(known) == count else rows[torch.searchsorted(known, tokens[:count])]
        return kept if count == len(tokens) else torch.cat([kept, self._compute(stream, tokens[count:])])

    def sample(self, stream: int, count: int) -> Batch:
        tokens = self.mlp.run.sampled(count)
        return Batch(self._compute(stream, tokens), tokens, sizes=self.mlp.run.sizes(stream, tokens) if stream else None)


class _MlpStage(Stage):
    def __init__(self, mlp: Mlp, weights: Sequence[TensorSpec]) -> None:
        super().__init__(mlp.run, weights)
        self.mlp = mlp

    def pairs(self, weights: Sequence[Weights]) -> list[tuple[Tensor, Tensor]]:
        """gate and up of every stream."""
        gate, up = (spec.name for spec in self.weights[-2:])
        return [(each[gate], each[up]) for each in weights]


class _Router(_MlpStage):
    """The router, and gate and up of the shared MLP, which read the same rows; of a dense model gate and up alone."""

    def batches(self, stream: int) -> Iterator[Batch]:
        for start, stop in self.run.parts():
            tokens = self.run.tokens(start, stop)
            exact = self.mlp.normed(0, tokens) if stream else None
            yield Batch(self.mlp.normed(stream, tokens), tokens, exact=exact)

    def advance(self, weights: Sequence[Weights]) -> None:
        run, model = self.run, self.run.architecture
        for stream in run.streams:
            for start, stop in run.parts():
                stream.y.write(start, torch.zeros(stop - start, model.hidden_size, dtype=run.dtype, device=run.device))
        if len(self.weights) > 1:
            self.mlp.shared = self.pairs(weights)
        if not model.num_experts:
            return
        wide = torch.promote_types(run.dtype, torch.float32)

        def advance(number: int) -> None:
            stream = run.streams[number]
            router = weights[number][self.weights[0].name].to(wide)
            stream.chosen = torch.empty(run.n_tokens, model.experts_per_token, dtype=torch.int32, device=run.device)
            stream.gates = torch.empty(stream.chosen.shape, dtype=wide, device=run.device)
            for start, stop in run.parts():
                logits = linear(self.mlp.normed(number, run.tokens(start, stop)).to(wide), router)
                gates, chosen = route(logits, model.experts_per_token, model.norm_topk_prob)
                stream.gates[start:stop], stream.chosen[start:stop] = gates, chosen

        run.each_stream(advance)


class ExpertIn(_MlpStage):
    """Gate and up of a routed expert, `own`."""

    def __init__(self, expert: Expert, weights: Sequence[TensorSpec]) -> None:
        super().__init__(expert.mlp, weights)
        self.own = expert

    def batches(self, stream: int) -> Iterator[Batch]:
        for tokens, gates in self.own.seen(stream):
            yield Batch(self.mlp.normed(stream, tokens), tokens, gates)

    def advance(self, weights: Sequence[Weights]) -> None:
        self.own.begin(self.pairs(weights))


class ExpertDown(_MlpStage):
    """Its down projection, whose output is added to its tokens' sums."""

    def __init__(self, expert: Expert, weights: Sequence[TensorSpec]) -> None:
        super().__init__(expert.mlp, weights)
        self.own = expert

    def batches(self, stream: int) -> Iterator[Batch]:
        for tokens, gates in self.own.seen(stream):
            exact, sizes = (self.own.inner(0, tokens), self.run.sizes(stream, tokens)) if stream else (None, None)
            yield Batch(self.own.inner(stream, tokens), tokens, gates, exact, sizes=sizes)

    def others(self, stream: int, count: int) -> Batch | None:
        return self.own.sample(stream, count)

    def advance(self, weights: Sequence[Weights]) -> None:
        run, expert = self.run, self.own.number
        (spec,) = self.weights
        for number in range(len(run.streams)):
            for tokens, gates in self.own.seen(number):
                if not len(tokens):
                    continue
                out = linear(self.own.inner(number, tokens), weights[number][spec.name])
                if not number:
                    run.check_finite(out, f"layer {self.mlp.layer}, expert {expert}")
                self.mlp.add(expert, number, tokens, (out.to(gates.dtype) * gates[:, None]).to(run.dtype))
            self.mlp.added(expert, number)
        self.own.end()


class _SharedDown(_MlpStage):
    """The shared (or dense) MLP's last weight, where there is one, and the end of the layer."""

    def batches(self, stream: int) -> Iterator[Batch]:
        if not self.weights:
            return
        exact, own = self.run.streams[0], self.run.streams[stream]
        for start, stop in self.run.parts():
            tokens, wanted = self.run.tokens(start, stop), sorted({0, stream})
            inner = self.run.together([partial(self.mlp.shared_inner, number, start, stop, last=False) for number in wanted])
            if not stream:
                yield Batch(inner[0], tokens)
                continue
            ahead = exact.x.read(start, stop) + exact.y.read(start, stop)
            residual = ahead - (own.x.read(start, stop) + own.y.read(start, stop))
            yield Batch(inner[1], tokens, exact=inner[0], residual=residual, sizes=self.run.sizes(stream, tokens))

    def advance(self, weights: Sequence[Weights]) -> None:
        def advance(number: int) -> None:
            stream = self.run.streams[number]
            for start, stop in self.run.parts():
                added = stream.y.read(start, stop)
                for spec in self.weights:
                    inner = self.mlp.shared_inner(number, start, stop, last=True)
                    added = added + linear(inner, weights[number][spec.name])
                behind = stream.x.read(start, stop) + added
                if not number:
                    self.run.check_finite(behind, f"layer {self.mlp.layer}")
                stream.x.write(start, behind)

        self.run.each_stream(advance)


class Head(Stage):
    """The last stage, whose rows may also be had token by token."""

    is_head = True

    def rows(self, stream: int, tokens: Tensor) -> Tensor:
        """[n, hidden], those of `tokens` [n] int64, ascending."""
        model = self.run.architecture
        return rms_norm(self.run.streams[stream].x.take(tokens), self.run.weight(model.final_norm.name), model.rms_norm_eps)

    def _rows(self, stream: int, start: int, stop: int, norm: Tensor) -> Tensor:
        return rms_norm(self.run.streams[stream].x.read(start, stop), norm, self.run.architecture.rms_norm_eps)

    def batches(self, stream: int) -> Iterator[Batch]:
        norm = self.run.weight(self.run.architecture.final_norm.name)
        for start, stop in self.run.parts():
            exact = self._rows(0, start, stop, norm) if stream else None
            yield Batch(self._rows(stream, start, stop, norm), self.run.tokens(start, stop), exact=exact)

    def advance(self, weights: Sequence[Weights]) -> None:
        """Nothing comes behind the head."""


def side_by_side(stages: Sequence[Stage]) -> Iterator[list[list[Stage]]]:
    """What may be under way together, each list in its order: one of stages outside routed experts, or one for each expert, in
    their turns, for which the stages before them must have been advanced."""
    for routed, group in groupby(stages, key=lambda stage: stage.expert is not None):
        chains = [list(own) for _, own in groupby(group, key=lambda stage: stage.expert)]
        if routed:
            mlp = cast(_MlpStage, chains[0][0]).mlp
            chains = [chains[number] for number in mlp.largest_first()]
        yield chains


Experts = list[list[Stage]]
"""Routed experts that are worked on together, each one's stages in their order."""


def dealt_out(groups: Sequence[Experts], devices: Sequence[torch.device]) -> list[list[Experts]]:
    """Groups of a layer's routed experts, dealt out: those that stay where they are, and those of each of these devices, there.
    Who gets which does not depend on who is done first. All must be under way at the same time (`on_devices`)."""
    used = devices[: len(groups) - 1]
    dealt = [list(groups[number :: len(used) + 1]) for number in range(len(used) + 1)]
    for number, device in enumerate(used, 1):
        mlp = cast(_MlpStage, groups[0][0][0]).mlp.on(device)
        dealt[number] = [[_of(mlp, own) for own in group] for group in dealt[number]]
    return dealt


def _of(mlp: Mlp, expert: Sequence[Stage]) -> list[Stage]:
    return Expert(mlp, cast(int, expert[0].expert)).stages([spec for stage in expert for spec in stage.weights])


def on_devices(jobs: Sequence[Callable[[], None]]) -> None:
    """Have each device do what `dealt_out` gave it. What the CPU does for it has as many threads as for one device: their number
    decides last bits of torch's products. Raises what one of them raises."""
    if len(jobs) == 1:
        jobs[0]()
    else:
        run_jobs(jobs, each=numba.get_num_threads(), every=True)


def take(
    stages: Sequence[Stage],
    work: Callable[[Sequence[Stage]], None],
    most: int | None = None,
    devices: Sequence[torch.device] = (),
) -> None:
    """Have `work` do stages in their order; on the CPU those of `most` routed experts at a time, of one for each thread, are
    done side by side, and elsewhere further `devices` share them. Raises what it raises."""
    for together in side_by_side(stages):
        routed = together[0][0].expert is not None
        if routed and together[0][0].run.device.type == "cpu" and not devices:
            run_jobs([partial(work, own) for own in together], most)
        elif routed:
            on_devices([partial(_each, work, groups) for groups in dealt_out([[own] for own in together], devices)])
        else:
            for own in together:
                work(own)


def _each(work: Callable[[Sequence[Stage]], None], groups: Sequence[Experts]) -> None:
    for group in groups:
        for own in group:
            work(own)
