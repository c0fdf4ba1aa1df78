"""How much a layer's output owes to each routed expert, and which of them an export with fewer keeps.

Router-weighted saliency after REAP (Lasby et al., "REAP the Experts", Cerebras 2025): of an expert the mean of gate · ‖output‖₂
over the tokens that chose it, in the exact stream; 0 where none did.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from xent_quant.checkpoint.dropping import KeptExperts
from xent_quant.linalg import linear
from xent_quant.model.sizes import SALIENCY_TOKENS, Room
from xent_quant.model.stages import Stage, WeightSource
from xent_quant.model.streaming import StreamingModel
from xent_quant.progress import Progress
from xent_quant.storage.files import remove
from xent_quant.tensors import Role

if TYPE_CHECKING:
    from calibration.session import Session, Text
    from exporters.interface import Exporter
    from xent_quant.checkpoint.reader import Checkpoint


def saliency(
    source: WeightSource,
    windows: torch.Tensor,
    progress: Progress | None = None,
    folder: Path | None = None,
    dtype: torch.dtype = torch.float32,
    room: Room | None = None,
) -> NDArray[np.float64]:
    """[layers, experts] of token ids [n_windows, length]. Holds what `StreamingModel.run` holds."""
    model = source.architecture
    sums, counts = np.zeros((2, model.num_layers, model.num_experts))

    def observe(stage: Stage) -> None:
        down = stage.weights[0] if stage.weights else None
        if down is None or down.expert is None or down.role is not Role.DOWN or down.layer is None:
            return
        weight = stage.run.weight(down.name)
        for batch in stage.batches(0):
            assert batch.gates is not None
            norms = linear(batch.inputs, weight).double().norm(dim=1)
            sums[down.layer, down.expert] += float((batch.gates.double() * norms).sum())
            counts[down.layer, down.expert] += len(batch.tokens)

    StreamingModel(source, dtype, str(windows.device), room=room).run(windows, observe, progress, folder=folder)
    return sums / np.maximum(counts, 1)


def most_salient(found: NDArray[np.float64], count: int) -> list[list[int]]:
    """By layer the numbers of the `count` experts of most saliency [layers, experts], ascending; of equal ones the lower number
    stays."""
    return [sorted(np.argsort(-layer, kind="stable")[:count].tolist()) for layer in found]


@dataclass(frozen=True)
class Dropping:
    """Leaves experts out of an export: `count` of each layer stay. `session` has the whole checkpoint's text, `view` makes of the
    experts that stay what a run needs: the smaller checkpoint, exporters that were planned for it, and the text that is run
    along with it."""

    session: "Session"
    count: int
    view: "Callable[[KeptExperts], tuple[Checkpoint, Sequence[Exporter], Text | None]]"

    def measured(self, folder: Path, progress: Progress, room: Room | None = None) -> list[list[int]]:
        """The experts that stay, by layer; hidden states lie in `folder`, new and removed again."""
        session = self.session
        folder.mkdir()
        found = saliency(session.checkpoint, session.sample(SALIENCY_TOKENS), progress, folder, session.dtype, room)
        remove(folder)
        return most_salient(found, self.count)

    def applied(self, numbers: Sequence[Sequence[int]]) -> "tuple[Checkpoint, Sequence[Exporter], Text | None]":
        """What the run goes on with."""
        of = self.session.checkpoint.architecture.num_experts
        return self.view(KeptExperts(tuple(map(tuple, numbers)), of, ", ".join(self.session.text.names)))
