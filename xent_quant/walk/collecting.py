"""A whole calibration pass into an importance matrix: what `xent-quant calibrate` keeps in a file."""

import io
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from calibration.coverage import Coverage
from calibration.imatrix import Entry, Imatrix
from calibration.measuring import sums
from calibration.rare import FEWEST_ROWS
from calibration.session import Session
from xent_quant import journal as journals
from xent_quant.checkpoint.fingerprint import check_same, fingerprint
from xent_quant.checkpoint.llama_names import HEAD, llama_name
from xent_quant.device.choice import memory_of
from xent_quant.errors import ExportError
from xent_quant.journal import Journal, software
from xent_quant.memory import give_back
from xent_quant.model.stages import Stage, take
from xent_quant.model.streams import Streams
from xent_quant.progress import Progress
from xent_quant.storage import (
    Move,
    Target,
    Workspace,
    check_free_space,
    publish,
    read_bytes,
    replace_bytes,
    sealed,
    unsealed,
)
from xent_quant.tensors import KEPT_ROLES, Role
from xent_quant.walk import resources
from xent_quant.walk.job import PROBE, PRODUCTS
from xent_quant.walk.unfinished import kept

Sums = dict[str, tuple[np.ndarray, ...]]
"""By llama.cpp's tensor name what `Entry` holds, float64."""


class Collecting:
    """Σx² and row counts of every weight, raw, as llama-imatrix keeps them, and of experts Σ(g·x)² and Σg².

    The head is included, which llama-imatrix does with --process-output only; the router is not. Each step's sums are a file of
    `folder` when it is done, so that another run can go on behind it. Holds the sums of one layer, and what `Pass` holds, with
    at most so many `experts` side by side, on each of further `devices` too.
    """

    def __init__(
        self,
        session: Session,
        streams: Streams,
        journal: Journal,
        folder: Path,
        progress: Progress,
        experts: int | None = None,
        devices: Sequence[torch.device] = (),
    ) -> None:
        self._experts, self._devices = experts, devices
        self._model, self._checkpoint = session.checkpoint.architecture, session.checkpoint
        self._streams, self._journal, self._folder, self._report = streams, journal, folder, progress

    @torch.no_grad()
    def run(self) -> None:
        """All steps that the journal does not have yet."""
        layers, tokens = self._model.num_layers, self._streams.run.n_tokens
        self._streams.swapped = self._journal.swapped
        self._report.start("Running the model", layers * tokens, "tokens", done=self._journal.layers(layers) * tokens)
        for step in range(self._journal.done, layers + 2):
            if not step:
                for start, rows in self._checkpoint.slices(self._model.embedding.name):
                    self._streams.embed(0, start, rows)
                self._commit(step, {})
            elif step <= layers:
                self._report.phase(f"layer {step} of {layers}")
                self._commit(step, self._layer(step - 1))
                self._report.advance(tokens)
            else:
                found: Sums = {}
                self._add(self._streams.run.head(), found)
                self._commit(step, found)
        self._report.finish()

    def _layer(self, index: int) -> Sums:
        found: Sums = {}
        take(self._streams.run.layer(index), partial(self._measure, index, found), self._experts, self._devices)
        return found

    def _measure(self, index: int, found: Sums, stages: Sequence[Stage]) -> None:
        for stage in stages:
            run = stage.run
            if stage.weights:
                self._add(stage, found)
            exact: dict[str, Tensor] = {spec.name: run.read(spec.name) for spec in stage.weights}
            stage.advance([exact])
            if stage.weights and stage.weights[0].role is Role.ROUTER:
                self._journal.coverage = [*self._journal.coverage[:index], run.expert_tokens(0)]
        give_back()

    def _add(self, stage: Stage, found: Sums) -> None:
        parts = sums(stage)
        for spec in stage.weights:
            if spec.role in KEPT_ROLES or not parts:
                continue
            name = HEAD if spec.role is Role.EMBEDDING else llama_name(spec)
            experts = self._model.num_experts if spec.expert is not None else 1
            own = found.setdefault(name, tuple(np.zeros((experts, *part.shape)) for part in parts))
            for total, part in zip(own, parts, strict=True):
                total[spec.expert or 0] += part.numpy()

    def _commit(self, step: int, found: Sums) -> None:
        _save(self._folder / f"sums-{step}.npz", found)
        self._streams.sync()
        self._journal.swapped, self._journal.done = self._streams.swapped, step + 1
        self._journal.save()

    def entries(self) -> dict[str, Entry]:
        """Of all steps."""
        found: dict[str, Entry] = {}
        for step in range(self._model.num_layers + 2):
            for name, parts in _load(self._folder / f"sums-{step}.npz").items():
                found[name] = Entry(*(part.astype(np.float32) for part in parts))
        return found


def _save(path: Path, found: Sums) -> None:
    """A .npz of each tensor's parts behind its digest, replaced whole."""
    stream = io.BytesIO()
    arrays = {f"{name}/{index}": part for name, parts in found.items() for index, part in enumerate(parts)}
    np.savez(stream, **arrays)  # type: ignore[arg-type]
    replace_bytes(path, sealed(stream.getvalue()))


def _load(path: Path) -> Sums:
    whole = unsealed(read_bytes(path) or b"")
    if whole is None:
        raise ExportError(f"{path}: missing or damaged, so the run that it is of cannot be gone on with; remove its folder")
    found: dict[str, list[np.ndarray]] = {}
    with np.load(io.BytesIO(whole), allow_pickle=False) as file:
        for key in file.files:
            found.setdefault(key.rsplit("/", 1)[0], []).append(file[key])
    return {name: tuple(parts) for name, parts in found.items()}


def collect(
    session: Session,
    target: Path,
    *,
    force: bool,
    restart: bool,
    progress: Progress,
    memory: int | None = None,
    vram: int | None = None,
) -> tuple[Imatrix, Coverage]:
    """Run the text of `session` and write the importance matrix `target`; an interrupted call is gone on with by the same one.

    Raises what running the model raises, and ExportError for what cannot be written.
    """
    model = session.checkpoint.architecture
    devices = session.devices
    device, sharing = devices[0] if devices else None, devices[:0]
    if device is None:
        room = resources.room(model, 0, session.length, memory)
    else:
        room = resources.device_room(model, 0, session.length, device, vram, memory=memory)
        sharing = resources.helping(model, 0, session.length, room, devices, progress, memory=memory, stacks=False)
    before = fingerprint(session.checkpoint)
    identity = {
        "checkpoint": before,
        "version": software(),
        **session.identity,
        PRODUCTS: str(session.narrow),
    }
    with Workspace.open(target.parent, [Target(target, folder=False)], force=force) as work, ExitStack() as files:
        path = work.path / journals.FILE
        journal = None if restart else Journal.load(path, identity)
        if journal is None:
            work.clear()
            journal = Journal(path, identity)
        files.enter_context(kept(work, journal))
        if device is not None:
            files.enter_context(memory_of((device, *sharing), vram))
        opened = files.enter_context(ExitStack())
        if done := journal.layers(model.num_layers):
            progress.note(f"Going on with an interrupted run: {done} of {model.num_layers} layers are done.")
        if journal.windows is None:
            windows = session.windows(FEWEST_ROWS, progress, work.path / PROBE, room)
            check_free_space(work.path, resources.disk(model, windows.numel(), 0, device))
            journal.windows = len(windows)
            journal.save()
        else:
            windows = session.first(journal.windows)
        streams = Streams(
            session.checkpoint,
            windows,
            work.path,
            session.dtype,
            1,
            room.kept_rows,
            fresh=not journal.done,
            products=session.narrow,
        )
        opened.callback(streams.close)
        collecting = Collecting(session, streams, journal, work.path, progress, room.experts, sharing)
        collecting.run()
        opened.close()
        matrix = Imatrix(collecting.entries(), session.text.names, len(windows), windows.shape[1])
        staged = work.path / target.name
        matrix.write(staged)
        check_same(session.checkpoint, before)
        publish(work, [Move(staged, target)])
    coverage = Coverage(model.num_layers, model.num_experts, FEWEST_ROWS)
    if model.num_experts:
        coverage.tokens = journal.coverage
    return matrix, coverage
