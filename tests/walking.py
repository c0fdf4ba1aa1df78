"""Walks without files, for tests: what a stage shows and what is measured there, and exports of given exporters."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calibration.correction import Measured
from calibration.measuring import Measuring
from calibration.session import Windows
from exporters.interface import Exported, Exporter
from xent_quant.checkpoint.reader import Checkpoint
from xent_quant.model.sizes import state_files
from xent_quant.model.stages import Pass, Stage, Stream, WeightSource
from xent_quant.model.states import InMemory
from xent_quant.tensors import StatisticsSource
from xent_quant.walk.job import run


def export(
    checkpoint: Checkpoint,
    exporters: Sequence[Exporter],
    output: Path,
    statistics: StatisticsSource | None = None,
    windows: Tensor | None = None,
    provenance: Mapping[str, str | int] | None = None,
    **options: Any,
) -> list[Exported]:
    text = None if windows is None else Windows(windows)
    done = run(checkpoint, exporters, output, statistics=statistics, text=text, provenance=provenance, **options)
    return list(done.exported)


def stages(
    source: WeightSource, windows: Tensor, dtype: torch.dtype, follower: WeightSource | None = None, *, inner: bool = False
) -> Iterator[Stage]:
    """Every stage in turn, advanced with the model's weights and, in a second stream, with those of `follower`. Rows inside the
    shared MLP are kept with `inner`."""
    sides = [source, *([follower] if follower else [])]
    widths = state_files(source.architecture, inner)
    states = [{file: InMemory(torch.empty(windows.numel(), width, dtype=dtype)) for file, width in widths.items()} for _ in sides]
    pass_ = Pass(source, windows, [Stream.of(each) for each in states], dtype)
    for number, side in enumerate(sides):
        pass_.embed(number, 0, torch.from_numpy(side.read(source.architecture.embedding.name)))
    for layer in range(source.architecture.num_layers):
        for stage in pass_.layer(layer):
            yield stage
            stage.advance(
                [{spec.name: torch.from_numpy(side.read(spec.name)).to(dtype) for spec in stage.weights} for side in sides]
            )
    yield pass_.head()


@torch.no_grad()
def measured(
    source: WeightSource,
    windows: Tensor,
    *,
    hessian: bool,
    gated: bool = False,
    follower: WeightSource | None = None,
    counts: list[list[int]] | None = None,
) -> dict[str, Measured]:
    """By name what is measured for every weight, of the follower's stream where there is one; `counts` gets tokens per expert."""
    measuring = Measuring(1 if follower else 0, windows, hessian=hessian, gated=gated)
    found: dict[str, Measured] = {}
    for stage in stages(source, windows, torch.float32, follower):
        if stage.weights:
            known = measuring.measure(stage)
            found |= {spec.name: known for spec in stage.weights}
            if counts is not None and stage.weights[0].expert == 0 and len(stage.weights) == 2:
                counts.append(stage.run.expert_tokens(0))
    return found
