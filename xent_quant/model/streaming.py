"""Runs a whole checkpoint over many windows of tokens while holding one expert, or one layer's attention, at a time.

The weights may come from a checkpoint or from an exported file that is dequantised on the way: anything that is a
WeightSource. An Observer sees the input rows of every weight, which is all that calibration needs.
"""

from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from xent_quant.checkpoint import architecture as names
from xent_quant.checkpoint.architecture import Architecture
from xent_quant.errors import CalibrationError
from xent_quant.model.layers import attention, rms_norm, rotary_tables, route
from xent_quant.progress import Progress, Silent

ATTENTION_TOKENS = 4096
"""Tokens that go through attention together; bounds what it holds besides the hidden states."""
HEAD_WEIGHTS = 16 * 1024 * 1024
"""Weights of the head multiplied at a time."""


class WeightSource(Protocol):
    """Where weights come from; `Checkpoint` is one."""

    @property
    def architecture(self) -> Architecture: ...

    def read(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
        """Rows start:stop of a checkpoint tensor as float32."""


Observer = Callable[[tuple[str, ...], Tensor, Tensor | None], None]
"""Called with the names of the weights that share an input, its rows [n, in_features], and the gate weights [n] with
which an expert's output will be scaled (None outside experts)."""


class StreamingModel:
    """The forward pass. `dtype` is that of weights and hidden states; routing and norms are at least float32."""

    def __init__(self, source: WeightSource, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
        self.source = source
        self.architecture = source.architecture
        self.dtype = dtype
        self.device = torch.device(device)

    def _weight(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        return torch.from_numpy(self.source.read(name)).to(self.device, dtype or self.dtype)

    @torch.no_grad()
    def hidden_states(self, windows: Tensor, observer: Observer | None = None, progress: Progress | None = None) -> Tensor:
        """Token ids [n_windows, length] to final, normed hidden states [n_windows, length, hidden].

        Holds three copies of the hidden states and the weights of one layer's attention or one expert. Raises
        CalibrationError naming layer and expert where activations become NaN or infinite.
        """
        model, report = self.architecture, progress or Silent()
        report.start("Running the model", model.num_layers * windows.numel(), "tokens")
        x = self._embed(windows)
        tables = tuple(
            table.to(self.device) for table in rotary_tables(windows.shape[1], model.head_dim, model.rope_theta, self.dtype)
        )
        for layer in range(model.num_layers):
            self._attend(layer, x, (tables[0], tables[1]), observer)
            self._mlp(layer, x, observer)
            if not torch.isfinite(x).all():
                raise CalibrationError(f"layer {layer}: NaN or infinite activations; the checkpoint is damaged")
            report.advance(windows.numel())
        x = rms_norm(x, self._weight(names.FINAL_NORM), model.rms_norm_eps)
        if observer:
            observer((self._head_name,), x.flatten(0, 1), None)
        report.finish()
        return x

    @property
    def _head_name(self) -> str:
        return names.EMBEDDING if self.architecture.tie_word_embeddings else names.HEAD

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

    def _attend(self, layer: int, x: Tensor, tables: tuple[Tensor, Tensor], observer: Observer | None) -> None:
        """x += attention(norm(x)), a few windows at a time."""
        model = self.architecture
        norm = self._weight(names.input_norm(layer))
        q_name, k_name, v_name, o_name = (names.attention(layer, which) for which in ("q", "k", "v", "o"))
        q, k, v, o = (self._weight(name) for name in (q_name, k_name, v_name, o_name))
        for part in torch.split(x, max(1, ATTENTION_TOKENS // x.shape[1])):
            h = rms_norm(part, norm, model.rms_norm_eps)
            if observer:
                observer((q_name, k_name, v_name), h.flatten(0, 1), None)
            mixed = attention(F.linear(h, q), F.linear(h, k), F.linear(h, v), model.head_dim, tables)
            if observer:
                observer((o_name,), mixed.flatten(0, 1), None)
            part += F.linear(mixed, o)

    def _mlp(self, layer: int, x: Tensor, observer: Observer | None) -> None:
        """x += experts(norm(x)), one expert at a time over all the tokens that chose it."""
        model = self.architecture
        flat = x.view(-1, model.hidden_size)
        h = rms_norm(flat, self._weight(names.post_attention_norm(layer)), model.rms_norm_eps)
        if not model.num_experts:
            dense = [names.dense_mlp(layer, projection) for projection in names.PROJECTIONS]
            flat += self._swiglu(h, dense, observer, None)
            return
        wide = torch.promote_types(self.dtype, torch.float32)
        scores = F.linear(h.to(wide), self._weight(names.router(layer), wide))
        if observer:
            observer((names.router(layer),), h, None)
        gates, chosen = route(scores, model.experts_per_token, model.norm_topk_prob)
        y = torch.zeros_like(h, dtype=wide)
        for index in range(model.num_experts):
            tokens, slots = (chosen == index).nonzero(as_tuple=True)
            if not len(tokens):
                continue
            gate = gates[tokens, slots]
            expert = [names.expert(layer, index, projection) for projection in names.PROJECTIONS]
            out = self._swiglu(h[tokens], expert, observer, gate)
            if not torch.isfinite(out).all():
                raise CalibrationError(f"layer {layer}, expert {index}: NaN or infinite activations; the checkpoint is damaged")
            y.index_add_(0, tokens, out.to(wide) * gate[:, None])
        if model.num_shared_experts:
            shared = [names.shared_expert(layer, projection) for projection in names.PROJECTIONS]
            y += self._swiglu(h, shared, observer, None)
        flat += y.to(self.dtype)

    def _swiglu(self, h: Tensor, weights: list[str], observer: Observer | None, gate_weights: Tensor | None) -> Tensor:
        """down(silu(gate(h)) · up(h)); `weights` names gate, up and down."""
        gate, up, down = weights
        if observer:
            observer((gate, up), h, gate_weights)
        inner = F.silu(F.linear(h, self._weight(gate))) * F.linear(h, self._weight(up))
        if observer:
            observer((down,), inner, gate_weights)
        return F.linear(inner, self._weight(down))

    def head_slices(self) -> Iterator[tuple[int, Tensor]]:
        """(first token id, rows of the head) in order, at most HEAD_WEIGHTS weights at a time."""
        rows = max(1, HEAD_WEIGHTS // self.architecture.hidden_size)
        for start in range(0, self.architecture.vocab_size, rows):
            stop = min(start + rows, self.architecture.vocab_size)
            yield start, torch.from_numpy(self.source.read(self._head_name, start, stop)).to(self.device, self.dtype)

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """[..., hidden] to [..., vocab]; for few rows, since the result is whole in memory."""
        return torch.cat([F.linear(hidden, rows) for _, rows in self.head_slices()], -1)

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
