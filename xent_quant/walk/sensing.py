"""Measures what a model loses by each quant type at each place (`xent_quant.sensitivities`), in one walk over its layers.

Two passes run side by side, stage by stage. One runs a calibration text through the exact model and gives every weight's Hessian
H: rounding to a type, by the weighted search, makes an error ΔW whose output error tr(ΔW H ΔWᵀ) is cheap to know, on a sample of
the weight's rows, for every type. The other runs a few held-out windows through the exact model and, for every place, through a
model that is rounded to REFERENCE there and exact elsewhere; at the end the KL divergence between the two is what that place
loses by the reference's output error. Loss is quadratic in small errors, so that of another type is the reference's times the
ratio of their output errors.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from calibration.measuring import Measuring
from calibration.session import Session
from xent_quant import formats, parallel
from xent_quant.checkpoint.architecture import Architecture
from xent_quant.checkpoint.fingerprint import check_same, fingerprint
from xent_quant.checkpoint.reader import Checkpoint
from xent_quant.errors import CalibrationError, ExportError
from xent_quant.formats.base import F32
from xent_quant.methods.search import Search
from xent_quant.model.sizes import state_files
from xent_quant.model.stages import Pass, Stage, Stream
from xent_quant.model.states import OnDisk
from xent_quant.model.streaming import StreamingModel
from xent_quant.progress import Progress, Silent
from xent_quant.sensitivities import EMBEDDING, HEAD, TYPES, Sensitivity, place, places, save
from xent_quant.storage import Move, Rows, Target, Workspace, check_free_space, publish
from xent_quant.tensors import InputStatistics, TensorSpec
from xent_quant.validation.measures import scored

REFERENCE = "Q4_0"
"""The type whose loss is measured: coarse enough to stand out of rounding, fine enough for its loss to be quadratic."""
SAMPLED_ROWS = 64
"""Of a weight, whose error is known for every type."""
LOGIT_ROWS = 512
"""Rows of logits that are held at a time."""
JUDGED = 8
"""Windows of a text that loss is measured on: one in so many, and so many at most."""


def measure(session: Session, target: Path, *, force: bool, progress: Progress | None = None) -> Sensitivity:
    """Measure on the text of `session`, some windows of which are kept for judging, and write the file `target`; what the work
    takes lies beside it until then. Raises what running the model raises, CalibrationError where the text is too short, and
    ExportError for what cannot be written."""
    checkpoint, windows = session.checkpoint, torch.from_numpy(session.text.windows)
    apart = judged_windows(len(windows))
    text, judged = windows[~apart], windows[apart]
    if not len(judged):
        raise CalibrationError(
            f"{len(windows)} windows of {windows.shape[1]} tokens are too few, there must be {JUDGED}; give more text or a "
            "smaller --seqlen"
        )
    before = fingerprint(checkpoint)
    with Workspace.open(target.parent, [Target(target, folder=False)], force=force) as work:
        work.clear()
        try:
            check_free_space(work.path, _disk(checkpoint.architecture, text.numel(), judged.numel()))
            found = Sensing(checkpoint, text, judged, TYPES, work.path, progress).run()
            check_same(checkpoint, before)
            staged = work.path / target.name
            save(found, checkpoint, staged)
            publish(work, [Move(staged, target)])
        except BaseException:
            if not work.published:
                with suppress(OSError, ExportError):  # what was raised matters more
                    work.clear()
            raise
    return found


def judged_windows(count: int) -> torch.Tensor:
    """Which of `count` windows are kept for judging: evenly over the text, which lies source by source."""
    apart, step = torch.zeros(count, dtype=torch.bool), max(JUDGED, count // JUDGED)
    apart[step - 1 :: step] = True
    return apart


def _disk(model: Architecture, text: int, judged: int) -> int:
    """Bytes of the states of so many tokens."""
    return 4 * sum(state_files(model, inner=False).values()) * (text + judged * len(places(model)))


class Sensing:
    """`text` [n, length] gives Hessians, `judged` [m, length] is what loss is measured on, both of token ids; by `types` and
    REFERENCE.

    States lie in files of `folder`: 12 bytes for each token of `text` and hidden column, and of `judged` for each place too.
    Holds what two `Pass`es and `Measuring` hold, a stage's weights for each of its places, a layer's routing of `judged` for each
    place, and LOGIT_ROWS rows of logits.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        text: Tensor,
        judged: Tensor,
        types: Sequence[str],
        folder: Path,
        progress: Progress | None = None,
    ) -> None:
        self.checkpoint, self.types, self.folder = checkpoint, tuple(dict.fromkeys([*types, REFERENCE])), folder
        self._report = progress or Silent()
        self._files = ExitStack()
        dtype = torch.float32
        self.exact = Pass(checkpoint, text, [self._stream(self._states("text", text.numel()), 0)], dtype)
        # Of all places in the same files: one each would be more than a process may have open. The head has no stream, but the
        # exact model has.
        self._judged = self._states("judged", judged.numel() * len(places(checkpoint.architecture)))
        self.rounded = Pass(checkpoint, judged, [self._stream(self._judged, 0)], dtype, kept_rows=0)
        self.places: list[str] = [""]  # of each stream of `rounded`; the first is exact
        self.errors: dict[str, dict[str, float]] = {}  # by place and type, of the output, on the sampled rows
        self._measuring = Measuring(0, text, hessian=True)

    def _states(self, name: str, tokens: int) -> dict[str, Rows]:
        """Files for the states of so many tokens."""
        widths = state_files(self.checkpoint.architecture, inner=False)
        return {
            file: self._files.enter_context(Rows.create(self.folder / f"{name}.{file}", tokens, width))
            for file, width in widths.items()
        }

    def _stream(self, files: Mapping[str, Rows], first: int) -> Stream:
        """States in rows of the files, from `first` on."""
        return Stream.of({name: OnDisk(rows, torch.float32, torch.device("cpu"), first) for name, rows in files.items()})

    def run(self) -> Sensitivity:
        """The whole walk."""
        model = self.checkpoint.architecture
        with self._files:
            self._report.start("Measuring sensitivity", model.num_layers, "layers")
            self._embedding()
            for layer in range(model.num_layers):
                self._report.phase(f"layer {layer + 1} of {model.num_layers}")
                for name in dict.fromkeys(place(spec) for spec in model.layer(layer).tensors() if spec.measured):
                    self._begin(name)
                for measured, run in zip(self.exact.layer(layer), self.rounded.layer(layer), strict=True):
                    self._stage(measured, run)
                self._report.advance(1)
            losses = self._head()
            self._report.finish()
        found = {}
        for name, lost in losses.items():
            errors = self.errors[name]
            slope = lost / errors[REFERENCE] if errors[REFERENCE] else 0.0
            found[name] = {kind: slope * errors[kind] for kind in self.types}
        return Sensitivity(found, "measured")

    def _begin(self, name: str) -> None:
        """A stream that is exact so far and will be rounded at a place."""
        run = self.rounded
        stream, first = self._stream(self._judged, len(run.streams) * run.n_tokens), run.streams[0]
        for start, stop in run.parts():
            stream.x.write(start, first.x.read(start, stop))
        run.streams = [*run.streams, stream]
        self.places.append(name)

    def _embedding(self) -> None:
        tensor = self.checkpoint.architecture.embedding
        self._begin(EMBEDDING)
        for start, rows in self.checkpoint.slices(tensor.name):
            for run in (self.exact, self.rounded):
                run.embed(0, start, torch.from_numpy(rows))
            self._add_errors(EMBEDDING, tensor, rows, None, 1.0)
            self.rounded.embed(1, start, torch.from_numpy(self._rounded(tensor, rows, None)))

    def _stage(self, measured: Stage, run: Stage) -> None:
        exact = {spec.name: self.checkpoint.read(spec.name) for spec in measured.weights}
        tensors = {name: torch.from_numpy(weights) for name, weights in exact.items()}
        weights = [dict(tensors) for _ in self.places]
        known = self._measuring.measure(measured).in_memory if measured.weights else None
        for spec in measured.weights:
            if not spec.measured:
                continue
            name = place(spec)
            self._add_errors(name, spec, exact[spec.name], known, self._weight(spec))
            made = self._rounded(spec, exact[spec.name], known)
            weights[self.places.index(name)][spec.name] = torch.from_numpy(made)
        measured.advance([tensors])
        run.advance(weights)

    def _weight(self, spec: TensorSpec) -> float:
        """How much a weight's output counts in the layer's: of an expert as the squares of its gates, in all tokens."""
        if spec.expert is None:
            return 1.0
        stream = self.exact.streams[0]
        return float(stream.gates[stream.chosen == spec.expert].double().square().sum()) / self.exact.n_tokens

    def _add_errors(self, name: str, spec: TensorSpec, weights: F32, known: InputStatistics | None, weight: float) -> None:
        """tr(ΔW H ΔWᵀ) of every type, on a sample of rows; without statistics H is 1."""
        sample = np.ascontiguousarray(weights[:: max(1, len(weights) // SAMPLED_ROWS)])
        found = self.errors.setdefault(name, dict.fromkeys(self.types, 0.0))

        def error(kind: str) -> float:
            change = self._rounded(spec, sample, known, kind) - sample
            spread = change if known is None or known.hessian is None else change @ known.hessian
            return weight * float(np.multiply(spread, change, dtype=np.float64).sum())

        for kind, lost in zip(self.types, parallel.run([partial(error, kind) for kind in self.types]), strict=True):
            found[kind] += lost

    def _rounded(self, spec: TensorSpec, rows: F32, known: InputStatistics | None, kind: str = REFERENCE) -> F32:
        """Rows as they are read back, padded to whole blocks on the way."""
        encoding, columns = formats.get(kind), rows.shape[1]
        wide = columns + -columns % encoding.block_size
        statistics = known and known.padded(wide)
        packed = Search().quantize(np.pad(rows, ((0, 0), (0, wide - columns))), encoding, statistics, name=spec.name)
        return np.ascontiguousarray(encoding.dequantize(packed)[:, :columns])

    def _head(self) -> dict[str, float]:
        """By place the KL divergence at the reference, mean over the scored tokens of `judged`."""
        model, run = self.checkpoint.architecture, self.rounded
        head = run.head()
        known = self._measuring.measure(self.exact.head()).in_memory
        plain, rounded = StreamingModel(self.checkpoint), StreamingModel(_RoundedHead(self, known))
        for _, rows in self.checkpoint.slices(model.head.name):
            self._add_errors(HEAD, model.head, rows, known, 1.0)
        positions, _ = scored(run.length)
        mask = torch.zeros(run.length, dtype=torch.bool)
        mask[positions] = True
        tokens = mask.repeat(run.count).nonzero()[:, 0]
        sides = [(name, plain, stream) for stream, name in enumerate(self.places) if stream]
        total = dict.fromkeys([*self.places[1:], HEAD], 0.0)
        for part in torch.split(tokens, LOGIT_ROWS):
            reference = plain.logits(head.rows(0, part)).double().log_softmax(-1)
            for name, source, stream in (*sides, (HEAD, rounded, 0)):
                logits = source.logits(head.rows(stream, part)).double().log_softmax(-1)
                total[name] += float((reference.exp() * (reference - logits)).sum())
        return {name: lost / len(tokens) for name, lost in total.items()}


class _RoundedHead:
    """The checkpoint with a rounded head."""

    def __init__(self, sensing: Sensing, known: InputStatistics | None) -> None:
        self.architecture, self.path = sensing.checkpoint.architecture, sensing.checkpoint.path
        self._sensing, self._known = sensing, known

    def read(self, name: str, start: int = 0, stop: int | None = None) -> F32:
        """See `WeightSource.read`."""
        rows = self._sensing.checkpoint.read(name, start, stop)
        return self._sensing._rounded(self.architecture.head, rows, self._known)
