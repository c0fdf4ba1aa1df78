"""Runs a whole checkpoint over many windows of tokens while holding one expert, or one layer's attention, at a time.

The weights may come from a checkpoint or from an exported file that is dequantised on the way: anything that is a
WeightSource. The pass is a generator of steps, one for every batch of input rows that a weight sees, which is all that
calibration needs; it advances only as far as it is asked to.
"""

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
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
    """

    weights: tuple[str, ...]
    inputs: Tensor
    tokens: Tensor
    gates: Tensor | None = None
    last: bool = True
    others: Tensor | None = None


Observer = Callable[[Step], None]
AfterLayer = Callable[[int, Tensor], None]
"""Gets a layer's number and the residual stream behind it [n_windows, length, hidden], which it must not change."""


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
    ) -> Generator[Step, None, Tensor]:
        """The forward pass of token ids [n_windows, length], one Step at a time in the order of `Architecture.tensors()`
        (the shared MLP's first inputs come with the router's); returns final, normed hidden states [n_windows, length, hidden].

        Work is done only as steps are asked for. An expert chosen by fewer than `fewest` tokens has `fewest` rows of `others`
        in its last step of the down projection. Holds two copies of the hidden states, the weights of one
        layer's attention or one expert, and PART_TOKENS rows on their way through it. Raises CalibrationError naming layer and
        expert where activations become NaN or infinite.
        """
        model, report = self.architecture, progress or Silent()
        report.start("Running the model", model.num_layers * windows.numel(), "tokens")
        x = self._embed(windows)
        tables = rotary_tables(windows.shape[1], model.head_dim, model.rope_theta, self.dtype)
        for layer in range(model.num_layers):
            yield from self._attend(layer, x, (tables[0].to(self.device), tables[1].to(self.device)))
            yield from self._mlp(layer, x, fewest)
            if not torch.isfinite(x).all():
                raise CalibrationError(f"layer {layer}: NaN or infinite activations; the checkpoint is damaged")
            if after_layer:
                after_layer(layer, x)
            report.advance(windows.numel())
        norm = self._weight(names.FINAL_NORM)
        flat = x.view(-1, model.hidden_size)
        for tokens, last in self._parts(torch.arange(len(flat), device=self.device)):
            flat[tokens] = rms_norm(flat[tokens], norm, model.rms_norm_eps)
            yield Step((self._head_name,), flat[tokens], tokens, last=last)
        report.finish()
        return x

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

    def _attend(self, layer: int, x: Tensor, tables: tuple[Tensor, Tensor]) -> Iterator[Step]:
        """x += attention(norm(x)), a few windows at a time."""
        model, length = self.architecture, x.shape[1]
        norm = self._weight(names.input_norm(layer))
        q_name, k_name, v_name, o_name = (names.attention(layer, which) for which in ("q", "k", "v", "o"))
        q, k, v, o = (self._weight(name) for name in (q_name, k_name, v_name, o_name))
        at_once = max(1, PART_TOKENS // length)
        for start in range(0, len(x), at_once):
            part = x[start : start + at_once]
            last = start + at_once >= len(x)
            tokens = torch.arange(start * length, start * length + part.shape[0] * length, device=self.device)
            h = rms_norm(part, norm, model.rms_norm_eps)
            yield Step((q_name, k_name, v_name), h.flatten(0, 1), tokens, last=last)
            mixed = attention(F.linear(h, q), F.linear(h, k), F.linear(h, v), model.head_dim, tables)
            yield Step((o_name,), mixed.flatten(0, 1), tokens, last=last)
            part += F.linear(mixed, o)
            if not torch.isfinite(part).all():
                raise CalibrationError(f"layer {layer}, attention: NaN or infinite activations; the checkpoint is damaged")

    def _mlp(self, layer: int, x: Tensor, fewest: int) -> Iterator[Step]:
        """x += experts(norm(x)), one expert at a time over all the tokens that chose it."""
        model = self.architecture
        flat = x.view(-1, model.hidden_size)
        norm = self._weight(names.post_attention_norm(layer))
        every = torch.arange(len(flat), device=self.device)

        def normed(tokens: Tensor) -> Tensor:
            return rms_norm(flat[tokens], norm, model.rms_norm_eps)

        if not model.num_experts:
            dense = [names.dense_mlp(layer, projection) for projection in names.PROJECTIONS]
            gate, up, down = (self._weight(name) for name in dense)
            for tokens, last in self._parts(every):
                h = normed(tokens)
                yield Step((dense[0], dense[1]), h, tokens, last=last)
                inner = swiglu(h, gate, up)
                yield Step((dense[2],), inner, tokens, last=last)
                flat[tokens] += F.linear(inner, down)
            return

        wide = torch.promote_types(self.dtype, torch.float32)
        router = self._weight(names.router(layer), wide)
        shared = [names.shared_expert(layer, projection) for projection in names.PROJECTIONS] if model.num_shared_experts else []
        chosen = torch.empty(len(flat), model.experts_per_token, dtype=torch.int64, device=self.device)
        gates = torch.empty(chosen.shape, dtype=wide, device=self.device)
        for tokens, last in self._parts(every):
            h = normed(tokens)
            yield Step((names.router(layer), *shared[:2]), h, tokens, last=last)
            gates[tokens], chosen[tokens] = route(F.linear(h.to(wide), router), model.experts_per_token, model.norm_topk_prob)
        sample = every[:: max(1, len(every) // fewest)][:fewest] if fewest else every[:0]
        y = torch.zeros_like(flat)
        for index in range(model.num_experts):
            expert = [names.expert(layer, index, projection) for projection in names.PROJECTIONS]
            mine, slots = (chosen == index).nonzero(as_tuple=True)
            gate, up, down = (self._weight(name) for name in expert)
            done = 0
            for tokens, last in self._parts(mine):
                weight = gates[tokens, slots[done : done + len(tokens)]]
                done += len(tokens)
                h = normed(tokens)
                yield Step((expert[0], expert[1]), h, tokens, weight, last)
                inner = swiglu(h, gate, up)
                others = swiglu(normed(sample), gate, up) if last and len(mine) < fewest else None
                yield Step((expert[2],), inner, tokens, weight, last, others)
                out = F.linear(inner, down)
                if not torch.isfinite(out).all():
                    raise CalibrationError(
                        f"layer {layer}, expert {index}: NaN or infinite activations; the checkpoint is damaged"
                    )
                y.index_add_(0, tokens, (out.to(wide) * weight[:, None]).to(y.dtype))
        if shared:
            gate, up, down = (self._weight(name) for name in shared)
            for tokens, last in self._parts(every):
                inner = swiglu(normed(tokens), gate, up)
                yield Step((shared[2],), inner, tokens, last=last)
                y[tokens] += F.linear(inner, down)
        flat += y

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
