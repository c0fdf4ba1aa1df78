"""One walk over a checkpoint that feeds any number of exporters."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack

from exporters.interface import Exported, Exporter
from xent_quant.checkpoint.reader import Checkpoint
from xent_quant.progress import Progress, Silent
from xent_quant.tensors import StatisticsSource


def export(
    checkpoint: Checkpoint,
    exporters: Sequence[Exporter],
    statistics: StatisticsSource | None = None,
    progress: Progress | None = None,
    provenance: Mapping[str, str | int] | None = None,
) -> list[Exported]:
    """Read every tensor once and hand it to every exporter; `provenance` is what files say of `statistics`. All exports appear,
    or none does.

    Holds one slice of a tensor, and what the sinks and the statistics hold. Raises what they raise.
    """
    report = progress or Silent()
    with ExitStack() as stack:
        sinks = [stack.enter_context(exporter.open(provenance or {})) for exporter in exporters]
        if statistics:
            statistics.get(
                next(iter(checkpoint.infos))
            )  # a calibration pass begins here: targets are checked, no bar is drawn yet
        report.start("Quantising", checkpoint.n_weights)
        stack.callback(report.finish)
        for name in checkpoint.infos:
            known = statistics.get(name) if statistics else None
            for start, weights in checkpoint.slices(name):
                for sink in sinks:
                    sink.put(name, start, weights, known)
                report.advance(weights.size)
        return [sink.finish() for sink in sinks]
