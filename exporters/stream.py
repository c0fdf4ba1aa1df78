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
    statistics: Sequence[StatisticsSource | None] = (),
    progress: Progress | None = None,
    provenance: Mapping[str, str | int] | None = None,
) -> list[Exported]:
    """Read every tensor once and hand it to every exporter, each with its own `statistics`, of which files say `provenance`.
    All exports appear, or none does.

    Holds one slice of a tensor, and what the sinks and the statistics hold. Raises what they raise.
    """
    report = progress or Silent()
    with ExitStack() as stack:
        sinks = [stack.enter_context(exporter.open(provenance or {})) for exporter in exporters]
        sources = statistics or [None] * len(sinks)
        for source in sources:
            if source:  # a calibration pass begins here: targets are checked, no bar is drawn yet
                source.get(next(iter(checkpoint.infos)))
        report.start("Quantising", checkpoint.n_weights)
        stack.callback(report.finish)
        for name in checkpoint.infos:
            known = [source.get(name) if source else None for source in sources]
            for start, weights in checkpoint.slices(name):
                for sink, source, found in zip(sinks, sources, known, strict=True):
                    if source:
                        written = sink.put(name, start, source.target(name, start, weights), found)
                        source.quantized(name, start, written)
                    else:
                        sink.put(name, start, weights, None)
                report.advance(weights.size)
        return [sink.finish() for sink in sinks]
