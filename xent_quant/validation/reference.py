"""The reference's side: tokens of every suite, and what the full-precision checkpoint says of them, cached on disk.

The checkpoint is streamed layer by layer (see xent_quant.model.streaming), so a 51 GB model is measured in 16 GB of
memory. What is kept of it per scored token is its log-probability and a Summary of the distribution; and, at a few positions of
each suite, the residual stream behind every layer, for per-layer errors.
"""

import hashlib
import io
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from xent_quant.checkpoint import special_tokens
from xent_quant.checkpoint.architecture import HEAD
from xent_quant.checkpoint.fingerprint import fingerprint
from xent_quant.checkpoint.reader import Checkpoint
from xent_quant.checkpoint.tokenizer import load_tokenizer
from xent_quant.errors import ExportError, ValidationError
from xent_quant.model.states import States
from xent_quant.model.streaming import Observer, StreamingModel
from xent_quant.progress import Progress, Silent
from xent_quant.storage import Target, Workspace, read_bytes, replace_bytes, sealed, unsealed
from xent_quant.validation import measures
from xent_quant.validation.measures import F64, I64, Summary
from xent_quant.validation.suites import Suite

if TYPE_CHECKING:
    from tokenizers import Tokenizer

log = logging.getLogger(__name__)

F32 = NDArray[np.float32]
SCHEMA = 2
"""Raise it when the meaning of a cached file changes."""
LOGITS = 2 * 1024 * 1024
"""Logits worked on at a time: [rows, vocab] with rows · vocab at most this (one row at least), in a few float64 copies. Small
enough for malloc to use the same pages again: larger ones are mapped and zeroed anew each time, which costs as much as the
arithmetic."""
STREAMED_LOGITS = 64 * 1024 * 1024
"""Logits held as float32 for one pass over the head, which is read from disk anew for each."""
MARGIN = 64
"""Tokens: how far from where a text is cut off its ids are no others than the whole text's."""
LAYER_POSITIONS = 48
"""Positions of a suite at which the residual stream is compared."""


@dataclass(frozen=True)
class SuiteTokens:
    """A suite in the model's tokens: `windows` [n, context] as the model sees them, `targets` [n, per window] as scored.

    `ids` are those of `text`, with a BOS before them if `has_bos`; `n_bytes` the UTF-8 bytes that the scored tokens spell.
    """

    name: str
    text: str
    ids: list[int]
    windows: I64
    targets: I64
    n_bytes: int
    has_bos: bool


@dataclass(frozen=True)
class Reference:
    """The checkpoint on one suite: `nll` [n, per window], `summary` over the flattened n · per window positions, and
    `layers` [num_layers, positions, hidden] float32, the residual stream of the first window (see `layer_positions`)."""

    nll: F64
    summary: Summary
    layers: F32


def layer_positions(context: int) -> list[int]:
    """Where in a first window the residual stream is kept: evenly over the scored half."""
    positions, _ = measures.scored(context)
    count = min(LAYER_POSITIONS, positions.stop - positions.start)
    return [int(p) for p in np.linspace(positions.start, positions.stop - 1, count)]


def tokenize(checkpoint: Checkpoint, suites: Sequence[Suite], context: int, max_tokens: int | None) -> list[SuiteTokens]:
    """Every suite in the tokens of the checkpoint's own tokenizer; a BOS is put where one belongs before a text.

    Raises CheckpointError for a missing or damaged tokenizer, ValidationError for ids beyond the vocabulary or a suite shorter
    than one window.
    """
    path, model = checkpoint.path / "tokenizer.json", checkpoint.architecture
    tokenizer = load_tokenizer(checkpoint.path)
    special = special_tokens.read(checkpoint.path, tokenizer, model.vocab_size)
    bos = special.ids["bos"] if special.add_bos else None
    found = []
    for suite in suites:
        text = suite.text if max_tokens is None else _beginning(tokenizer, suite.text, max_tokens)
        encoding = tokenizer.encode(text, add_special_tokens=False)
        ids, ends = list(encoding.ids), [end for _, end in encoding.offsets]
        if bos is not None:
            ids, ends = [bos, *ids], [0, *ends]
        if max(ids) >= model.vocab_size:
            raise ValidationError(f"{path}: token id {max(ids)} is beyond vocab_size {model.vocab_size}; it is another model's")
        try:
            windows = measures.windows(ids[:max_tokens], context, bos)
        except ValidationError as error:
            raise ValidationError(f"suite {suite.name}: {error}") from None
        _, target = measures.scored(context)
        plain = np.array(ids[: windows.size]).reshape(windows.shape)
        width = np.concatenate([[0], np.cumsum([len(char.encode()) for char in text])])  # bytes before each character
        end_bytes = width[np.array(ends[: windows.size])].reshape(windows.shape)
        n_bytes = int((end_bytes[:, -1] - end_bytes[:, target.start - 1]).sum())
        found.append(SuiteTokens(suite.name, text, ids, windows, plain[:, target], n_bytes, bos is not None))
    return found


def _beginning(tokenizer: "Tokenizer", text: str, tokens: int) -> str:
    """As much of a text as has so many tokens, and MARGIN behind them: an end that is cut off changes ids only near it."""
    room = tokens + MARGIN
    while True:
        room *= 4
        ends = [end for _, end in tokenizer.encode(text[:room], add_special_tokens=False).offsets]
        if len(ends) > tokens + 2 * MARGIN:
            return text[: ends[tokens + MARGIN]]
        if room >= len(text):
            return text


def _key(model: str, suite: SuiteTokens) -> str:
    settings = (SCHEMA, measures.TOP_K, measures.TAIL_SAMPLES, LAYER_POSITIONS, suite.windows.shape)
    return hashlib.sha256(f"{model} {settings}".encode() + suite.windows.tobytes() + suite.targets.tobytes()).hexdigest()[:20]


def _load(path: Path) -> Reference | None:
    try:
        raw = read_bytes(path)
    except (OSError, ExportError) as error:
        log.warning("%s, computed anew", error)
        return None
    whole = unsealed(raw) if raw is not None else None
    if whole is None:
        if raw is not None:
            log.warning("%s: damaged, computed anew", path)
        return None
    with np.load(io.BytesIO(whole), allow_pickle=False) as file:
        parts = [file[name] for name in ("ids", "log_p", "tail", "sample_ids", "sample_log_p")]
        return Reference(file["nll"], Summary(*parts), file["layers"])


def _save(path: Path, reference: Reference) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.npz")
    try:
        whole = io.BytesIO()
        np.savez(whole, nll=reference.nll, layers=reference.layers, **vars(reference.summary))
        temporary.write_bytes(sealed(whole.getvalue()))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@dataclass(frozen=True)
class Streamed:
    """A streamed run: final hidden states of the scored positions [n_windows · per window, hidden], and the residual
    streams [num_layers, positions, hidden] of each window that was asked for."""

    model: StreamingModel
    hidden: torch.Tensor
    layers: list[F32]

    def logits(self, progress: Progress) -> Iterator[F32]:
        """Logits of the scored positions in order, [rows, vocab] float32 with at most STREAMED_LOGITS values."""
        rows = max(1, STREAMED_LOGITS // self.model.architecture.vocab_size)
        for part in torch.split(self.hidden, rows):
            logits = self.model.logits(part).numpy()
            if not np.isfinite(logits).all():
                raise ValidationError(f"{HEAD}: makes infinite logits of finite weights; the weights are damaged")
            yield logits
            progress.advance(len(part))


def stream(
    model: StreamingModel,
    windows: I64,
    firsts: Sequence[int],
    progress: Progress,
    observer: Observer | None = None,
    folder: Path | None = None,
) -> Streamed:
    """Run `windows` [n, context]; `firsts` are the windows whose residual streams are kept. With a `folder` the run can be
    interrupted, and gone on with by the same call."""
    context = windows.shape[1]
    where, index = torch.tensor(layer_positions(context)), torch.tensor(list(firsts), dtype=torch.long)
    tokens = (index[:, None] * context + where).flatten()
    positions, _ = measures.scored(context)
    kept: dict[int, F32] = {}

    def keep(layer: int, x: States) -> None:
        kept[layer] = x.take(tokens).view(len(index), len(where), -1).float().numpy()
        if folder:
            file = io.BytesIO()
            np.save(file, kept[layer])
            replace_bytes(folder / f"layer-{layer}.npy", sealed(file.getvalue()))

    hidden = model.hidden_states(torch.from_numpy(windows), observer, progress, keep, folder)
    for layer in range(model.architecture.num_layers):
        if folder and layer not in kept:
            path = folder / f"layer-{layer}.npy"
            whole = unsealed(read_bytes(path) or b"")
            if whole is None:
                raise ExportError(f"{path}: missing or damaged; remove its folder")
            kept[layer] = np.load(io.BytesIO(whole))
    flat = hidden[:, positions].flatten(0, 1).contiguous()
    return Streamed(model, flat, list(np.stack([kept[layer] for layer in sorted(kept)], axis=1)))


@contextmanager
def work_folder(cache: Path, name: str) -> Iterator[Path]:
    """A private folder in `cache` for a run that takes long; kept where the block does not end well, so that the same run can
    go on. Raises ExportError where another process is at it."""
    with Workspace.open(cache, [Target(cache / name, folder=True)], force=True, choose="folder") as work:
        yield work.path
        work.clear()


def pieces(blocks: Iterator[F32]) -> Iterator[tuple[slice, F64]]:
    """Blocks of logits as log-probabilities of at most LOGITS values, with the positions they are of."""
    done = 0
    for block in blocks:
        rows = max(1, LOGITS // block.shape[1])
        for start in range(0, len(block), rows):
            part = block[start : start + rows]
            yield slice(done, done + len(part)), measures.log_softmax(part)
            done += len(part)


def references(
    checkpoint: Checkpoint,
    suites: Sequence[SuiteTokens],
    cache: Path,
    progress: Progress | None = None,
    note: Callable[[str], None] = log.info,
) -> list[Reference]:
    """What the checkpoint says of each suite: from `cache` where it was computed before, else computed in one streamed run of
    all that are missing, and kept there."""
    report = progress or Silent()
    model = fingerprint(checkpoint)
    paths = [cache / f"reference-{suite.name}-{_key(model, suite)}.npz" for suite in suites]
    found = [_load(path) for path in paths]
    missing = [index for index, reference in enumerate(found) if reference is None]
    if missing:
        note(f"reference of {', '.join(suites[index].name for index in missing)} is computed")
        windows = np.concatenate([suites[index].windows for index in missing])
        counts = [len(suites[index].windows) for index in missing]
        starts = [sum(counts[:i]) for i in range(len(counts))]
        together = hashlib.sha256("".join(path.name for path in paths).encode()).hexdigest()[:20]
        with work_folder(cache, f"reference-{together}") as folder:
            run = stream(StreamingModel(checkpoint), windows, starts, report, folder=folder)
        targets = np.concatenate([suites[index].targets for index in missing]).ravel()
        nll = np.empty(len(targets))
        offsets = np.concatenate([measures.draw_offsets(suites[index].targets.size) for index in missing])
        parts: list[Summary] = []
        report.start("Scoring the reference", len(targets), "tokens")
        for where, log_p in pieces(run.logits(report)):
            nll[where] = measures.nll(log_p, targets[where])
            parts.append(measures.summarise(log_p, offsets=offsets[where]))
        report.finish()
        whole = Summary.joined(parts)
        per_window = suites[0].targets.shape[1]
        for start, count, layers, index in zip(starts, counts, run.layers, missing, strict=True):
            own = slice(start * per_window, (start + count) * per_window)
            reference = Reference(nll[own].reshape(count, per_window), whole[own], layers)
            _save(paths[index], reference)
            found[index] = reference
    return [reference for reference in found if reference is not None]
