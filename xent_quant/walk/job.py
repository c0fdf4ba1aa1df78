"""A whole quantisation: from planned exporters to published files, in a private folder that a later run can go on in."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibration.coverage import Coverage
from calibration.rare import FEWEST_ROWS, fewest_rows
from exporters.interface import Exported, Exporter, PlanSummary, unmeasured_notes
from xent_quant import journal as journals
from xent_quant.checkpoint.fingerprint import check_same, fingerprint
from xent_quant.checkpoint.reader import Checkpoint
from xent_quant.journal import Journal, software
from xent_quant.model.sizes import Room
from xent_quant.progress import Progress, Silent
from xent_quant.storage import Workspace, check_free_space, publish
from xent_quant.tensors import StatisticsSource
from xent_quant.units import human_bytes
from xent_quant.walk import resources
from xent_quant.walk.lanes import Lane
from xent_quant.walk.loop import Walk
from xent_quant.walk.unfinished import kept

if TYPE_CHECKING:
    import torch

    from calibration.measuring import Measuring
    from calibration.session import Text
    from xent_quant.device.method import OnDevice
    from xent_quant.model.streams import Streams
    from xent_quant.walk.cluster import Cluster
    from xent_quant.walk.saliency import Dropping


PRODUCTS = "products of weights"
"""What a journal calls the type in which statistics were multiplied."""
PROBE = "probe"
"""Where in the work folder the states lie that tell how much text there must be."""
SALIENCY = "saliency"
"""And those that tell which experts are dropped."""


@dataclass(frozen=True)
class Done:
    """What was published, and as what it was planned; `coverage` where text was run; `resumed` layers were done by earlier runs,
    `seconds` is the time of the walk in all of them."""

    exported: tuple[Exported, ...]
    plans: tuple[PlanSummary, ...]
    coverage: Coverage | None
    resumed: int
    seconds: float


def run(
    checkpoint: Checkpoint,
    exporters: Sequence[Exporter],
    output: Path,
    *,
    statistics: StatisticsSource | None = None,
    text: "Text | None" = None,
    provenance: Mapping[str, str | int] | None = None,
    identity: Mapping[str, Any] | None = None,
    dropping: "Dropping | None" = None,
    force: bool = False,
    restart: bool = False,
    memory: int | None = None,
    vram: int | None = None,
    ray: str | None = None,
    progress: Progress | None = None,
) -> Done:
    """Quantise `checkpoint` for all `exporters`, which write into `output`, in one walk, with `statistics` of a file or of a
    `text` that runs along; files say of them what `provenance` holds, and `identity` is what their bytes depend on. At most
    `memory` bytes are resident, or ConfigError is raised before anything is read; on each device on which methods compute, where
    the text names some, `vram` (None: what is free). With `dropping` the checkpoint is any view with as many experts as will
    stay, and the exporters are planned for it; which stay is measured when the run begins, and their view takes its place. `ray`
    is the address of a cluster that helps.

    All exports appear, or none does, and what they replace is lost only when they are there. After an error or a kill the work
    that was done stays beside the output, and the same call goes on with it unless `restart` is given. Holds what `Walk` holds.
    Raises what it raises, ExportError for what cannot be written, CheckpointError where the checkpoint changed meanwhile.
    """
    model, report = checkpoint.architecture, progress or Silent()
    hessian = [exporter.method is not None and exporter.method.needs_hessian for exporter in exporters]
    followers = sum(hessian) if text else 0
    devices = text.devices if text else ()
    device, sharing = devices[0] if devices else None, devices[:0]
    length = text.length if text else dropping.session.length if dropping else 0
    if device is None:
        room = resources.room(model, followers, length, memory)
    else:
        fitting = partial(resources.device_room, model, followers, length, device, vram, memory=memory)
        room = fitting()
    for exporter in exporters:
        exporter.check(force)
    before = fingerprint(checkpoint)
    whole = _identity(before, exporters, hessian, text, {**(identity or {}), "statistics": dict(provenance or {})})
    targets = [target for exporter in exporters for target in exporter.targets]
    results = sum(exporter.nbytes for exporter in exporters)
    with Workspace.open(output, targets, force=force) as work, ExitStack() as files:
        path = work.path / journals.FILE
        journal = None if restart else Journal.load(path, whole)
        fresh = journal is None or (not journal.done and journal.windows is None)  # no more than which experts stay is known
        if journal is None or fresh:
            work.clear()
            check_free_space(output, results)
            journal = Journal(path, whole, experts=journal.experts if journal else None)
        resumed = journal.layers(model.num_layers)
        if resumed:
            report.note(f"Going on with an interrupted run: {resumed} of {model.num_layers} layers are done.")
        if device is not None:
            if journal.room is not None:
                earlier = Room(**journal.room)
                room = fitting(before=earlier)
                if room != earlier:
                    report.note(f"{device} has less memory left than before: other last bits than in one run are possible.")
            journal.room = vars(room).copy()
            sharing = resources.helping(model, followers, length, room, devices, report, memory=memory)
        cluster = files.enter_context(_cluster(ray, report))  # before `kept`: there may be one the next time
        files.enter_context(kept(work, journal))
        if device is not None:
            files.enter_context(_memory_of((device, *sharing), vram))
        if dropping:
            if journal.experts is None:
                journal.experts = dropping.measured(work.path / SALIENCY, report, room)
            if fresh:
                journal.save()
            checkpoint, exporters, text = dropping.applied(journal.experts)
            planned = [dict(exporter.identity) for exporter in exporters]
            if fresh:
                journal.exports = planned
            else:
                journal.check("exports", journal.exports, planned)
        opened = files.enter_context(ExitStack())
        lanes = []
        for number, exporter in enumerate(exporters):
            writer = exporter.open(work.path, provenance or {}, fresh=fresh)
            opened.callback(writer.close)
            lane = Lane(exporter, writer, None, statistics if exporter.method else None, _on(device, exporter))
            if not fresh and journal.measured:
                lane.resume(journal.unmeasured[number], journal.measured[number])
            lanes.append(lane)
        streams: Streams | None = None
        measuring: list[Measuring] = []
        if text:
            streams, measuring = _streams(checkpoint, text, lanes, hessian, results, journal, work, room, device, report)
            opened.callback(streams.close)
        Walk(checkpoint, lanes, journal, streams, measuring, report, room, cluster, sharing).run()
        exported = []
        for lane in lanes:
            exported.append(lane.writer.finish(unmeasured_notes(lane.unmeasured, lane.measured)))
            lane.writer.sync()
        check_same(checkpoint, before)
        opened.close()
        publish(work, [move for each in exported for move in each.moves], [one for each in exported for one in each.shared])
    coverage = None
    if text and model.num_experts:
        coverage = Coverage(
            model.num_layers, model.num_experts, fewest_rows(max(model.hidden_size, model.intermediate_size), any(hessian))
        )
        coverage.tokens = journal.coverage
    return Done(tuple(exported), tuple(exporter.summary for exporter in exporters), coverage, resumed, journal.seconds)


@contextmanager
def _cluster(address: str | None, report: Progress) -> "Iterator[Cluster | None]":
    if address is None:
        yield None
        return
    from xent_quant.walk.cluster import ray_cluster

    with ray_cluster(address) as cluster:
        report.note(f"Ray: {cluster.workers} workers.")
        yield cluster


def _memory_of(devices: "Sequence[torch.device]", limit: int | None) -> AbstractContextManager[None]:
    from xent_quant.device.choice import memory_of

    return memory_of(devices, limit)


def _on(device: "torch.device | None", exporter: Exporter) -> "OnDevice | None":
    """The exporter's method on a device."""
    if device is None or exporter.method is None:
        return None
    from xent_quant.device.method import OnDevice

    return OnDevice(exporter.method, device)


def _streams(
    checkpoint: Checkpoint,
    text: "Text",
    lanes: Sequence[Lane],
    hessian: Sequence[bool],
    results: int,
    journal: Journal,
    work: Workspace,
    room: Room,
    device: "torch.device | None",
    progress: Progress,
) -> "tuple[Streams, list[Measuring]]":
    """The exact stream, and one for each lane whose method goes on with what it made of the weights. `results` will have so many
    bytes."""
    from calibration.correction import furthest
    from calibration.measuring import Measuring
    from xent_quant.model.streams import Streams

    model = checkpoint.architecture
    # Not for the Hessian of a rare expert, which the layer makes up: all others would pay for that with three times the time.
    measured = [needed for lane, needed in zip(lanes, hessian, strict=True) if lane.choices.method is not None]
    known, fewest = journal.windows, 0 if all(measured) else FEWEST_ROWS
    windows = text.windows(fewest, progress, work.path / PROBE, room) if known is None else text.first(known)
    count = 1
    listened: dict[int, tuple[bool, float]] = {}
    for lane, needed in zip(lanes, hessian, strict=True):
        if lane.choices.method is None:
            continue
        lane.stream = count if needed else 0
        count += needed
        listened[lane.stream] = needed, furthest(slot.encoding for slots in lane.choices.slots.values() for slot in slots)
    if journal.windows is None:
        nbytes = resources.disk(model, windows.numel(), count - 1, device)
        unwritten = results - work.nbytes()  # the files are holes yet
        check_free_space(work.path, nbytes + max(0, unwritten))
        if nbytes >= resources.WORTH_SAYING:
            progress.note(f"The text's hidden states take {human_bytes(nbytes)} in {work.path} until the run is done.")
        journal.windows = len(windows)
        for lane in lanes:
            lane.writer.sync()
        journal.save()
    streams = Streams(
        checkpoint,
        windows,
        work.path,
        text.dtype,
        count,
        room.kept_rows,
        fresh=not journal.done,
        products=text.dtype if any(hessian) else text.narrow,
    )
    return streams, [
        Measuring(stream, windows, hessian=needed, device=device, furthest=most) for stream, (needed, most) in listened.items()
    ]


def _identity(
    checkpoint: str, exporters: Sequence[Exporter], hessian: Sequence[bool], text: "Text | None", options: Mapping[str, Any]
) -> Mapping[str, Any]:
    """What the bytes of these exports depend on."""
    return {
        "checkpoint": checkpoint,
        "version": software(),
        **options,
        **(text.identity if text else {}),
        **({PRODUCTS: str(text.narrow)} if text and not any(hessian) else {}),
        "methods": [exporter.method.name if exporter.method else None for exporter in exporters],
        "exports": [exporter.identity for exporter in exporters],
    }
