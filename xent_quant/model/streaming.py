"""Runs one model over many windows of tokens while holding an expert for each thread, or one layer's attention, at a time.

The weights may come from a checkpoint or from an exported file that is dequantised on the way: anything that is a WeightSource.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from xent_quant import memory
from xent_quant.errors import CalibrationError
from xent_quant.journal import FILE, Journal, software
from xent_quant.linalg import linear
from xent_quant.model.sizes import Room
from xent_quant.model.stages import Pass, Stage, Stream, WeightSource, take
from xent_quant.model.states import InMemory, States
from xent_quant.model.streams import Streams
from xent_quant.progress import Progress, Silent

HEAD_WEIGHTS = 16 * 1024 * 1024
"""Weights of the embedding and the head read at a time."""

Observer = Callable[[Stage], None]
"""Gets each stage before the state goes on with its weights: to look at their rows, or not. Those of routed experts come from
several threads."""
AfterLayer = Callable[[int, States], None]
"""Gets a layer's number and the residual stream behind it [n_windows · length, hidden], which it must not change."""


class StreamingModel:
    """The forward pass. `dtype` is that of weights and hidden states; routing and norms are at least float32; `products`: see
    `Pass`; `room`: what is held on the way."""

    def __init__(
        self,
        source: WeightSource,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        products: torch.dtype | None = None,
        room: Room | None = None,
    ) -> None:
        self._products, self._room = products, room or Room()
        self.source = source
        self.architecture = source.architecture
        self.dtype = dtype
        self.device = torch.device(device)

    @torch.no_grad()
    def hidden_states(
        self,
        windows: Tensor,
        observer: Observer | None = None,
        progress: Progress | None = None,
        after_layer: AfterLayer | None = None,
        folder: Path | None = None,
    ) -> Tensor:
        """Token ids [n_windows, length] to final, normed hidden states [n_windows, length, hidden]; see `run`, and holds these
        beside."""
        found = torch.empty((windows.numel(), self.architecture.hidden_size), dtype=self.dtype, device=self.device)

        def final(stage: Stage) -> None:
            if observer:
                observer(stage)
            if stage.is_head:
                for batch in stage.batches(0):
                    found[batch.tokens] = batch.inputs

        self.run(windows, final, progress, after_layer, folder)
        return found.view(*windows.shape, -1)

    @torch.no_grad()
    def run(
        self,
        windows: Tensor,
        observer: Observer,
        progress: Progress | None = None,
        after_layer: AfterLayer | None = None,
        folder: Path | None = None,
    ) -> None:
        """Run token ids [n_windows, length] through all stages, the head's the last.

        With a `folder` the states lie in files there, and a call with the same windows goes on behind the last layer that an
        earlier one finished; it sees no more of those before. Holds what `Pass` holds and, without a folder, two copies of the
        states (and what attention makes, where that has another width); and the result. Raises CalibrationError naming layer and
        expert where activations become NaN or infinite.
        """
        model, report = self.architecture, progress or Silent()
        windows = windows.to(self.device)
        with ExitStack() as files:
            journal = None
            if folder:
                identity = {"windows": hashlib.sha256(windows.cpu().numpy().tobytes()).hexdigest(), "version": software()}
                journal = Journal.load(folder / FILE, identity) or Journal(folder / FILE, identity)
                opened = Streams(
                    self.source,
                    windows,
                    folder,
                    self.dtype,
                    1,
                    self._room.kept_rows,
                    fresh=not journal.done,
                    inner=False,
                    products=self._products,
                )
                streams = files.enter_context(closing(opened))
                streams.swapped = journal.swapped
                run = streams.run
            else:
                widths = [model.hidden_size] * 2
                if model.attention_size != model.hidden_size:
                    widths.append(model.attention_size)
                x, y, *attended = (
                    InMemory(torch.empty((windows.numel(), width), dtype=self.dtype, device=self.device)) for width in widths
                )
                run = Pass(self.source, windows, [Stream(x, y, x, *attended)], self.dtype, self._room.kept_rows, self._products)
            done = journal.done if journal else 0
            report.start("Running the model", model.num_layers * run.n_tokens, "tokens", done=max(0, done - 1) * run.n_tokens)
            if not done:
                for start, rows in self._slices(model.embedding.name):
                    run.embed(0, start, rows)
            for layer in range(max(0, done - 1), model.num_layers):
                report.phase(f"layer {layer + 1} of {model.num_layers}")
                take(run.layer(layer), partial(_advance, observer), self._room.experts)
                if after_layer:
                    after_layer(layer, run.streams[0].x)
                if journal:
                    streams.sync()
                    journal.swapped, journal.done = streams.swapped, layer + 2
                    journal.save()
                report.advance(run.n_tokens)
            observer(run.head())
            report.finish()

    @property
    def _head_name(self) -> str:
        return self.architecture.head.name

    def _slices(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows) of a matrix with a row for every token, at most HEAD_WEIGHTS weights at a time."""
        rows = max(1, HEAD_WEIGHTS // self.architecture.hidden_size)
        for start in range(0, self.architecture.vocab_size, rows):
            stop = min(start + rows, self.architecture.vocab_size)
            yield start, torch.from_numpy(self.source.read(name, start, stop)).to(self.device, self.dtype)

    def head_slices(self) -> Iterator[tuple[int, Tensor]]:
        """(first token id, rows of the head) in order, at most HEAD_WEIGHTS weights at a time."""
        return self._slices(self._head_name)

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """[..., hidden] to [..., vocab]; for few rows, since the result is whole in memory, once."""
        found = hidden.new_empty(hidden[..., 0].numel(), self.architecture.vocab_size)
        for start, rows in self.head_slices():
            found[:, start : start + len(rows)] = linear(hidden.flatten(0, -2), rows)
        return found.view(*hidden.shape[:-1], -1)

    @torch.no_grad()
    def log_probabilities(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Log-probability of each target: hidden [n, hidden], targets [n] to [n] float64. Streams the head."""
        top = torch.full((len(hidden),), -torch.inf, dtype=torch.float64, device=self.device)
        total = torch.zeros_like(top)
        picked = torch.zeros_like(top)
        for start, rows in self.head_slices():
            for part in torch.split(torch.arange(len(hidden), device=self.device), 1024):
                scores = linear(hidden[part], rows).double()
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


def _advance(observer: Observer, stages: Sequence[Stage]) -> None:
    for stage in stages:
        observer(stage)
        stage.advance([{spec.name: stage.run.read(spec.name) for spec in stage.weights}])
    memory.give_back()
