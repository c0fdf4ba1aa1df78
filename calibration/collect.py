"""A whole calibration pass into an importance matrix: what `xent-quant calibrate` keeps in a file."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calibration.coverage import Coverage
from calibration.imatrix import Entry, Imatrix
from calibration.moments import FEWEST_ROWS
from xent_quant.checkpoint import architecture as names
from xent_quant.checkpoint.llama_names import llama_name
from xent_quant.model.streaming import Step, StreamingModel
from xent_quant.progress import Progress


def collect(
    model: StreamingModel, windows: Tensor, datasets: Sequence[str] = (), progress: Progress | None = None
) -> tuple[Imatrix, Coverage]:
    """Σx² and row counts of every weight with inputs [n_windows, length] of token ids, raw, as llama-imatrix keeps them, and
    of experts Σ(g·x)² and Σg².

    The head is included, which llama-imatrix does with --process-output only; the router is not. See
    `StreamingModel.steps` for what is held and raised.
    """
    architecture = model.architecture
    coverage = Coverage(architecture.num_layers, architecture.num_experts, FEWEST_ROWS)
    found: dict[str, tuple[np.ndarray[Any, np.dtype[np.float64]], ...]] = {}

    def observe(step: Step) -> None:
        inputs = step.inputs.float()
        parts = [inputs.square().sum(0), torch.tensor(len(inputs))]
        if step.gates is not None:
            coverage.count(step.weights[0], len(inputs) if step.weights[0].endswith(".gate_proj.weight") else 0)
            parts += [(inputs * step.gates[:, None].float()).square().sum(0), step.gates.square().sum()]
        for name in step.weights:
            if name.endswith(".router.weight"):
                continue
            tensor, expert = llama_name(names.HEAD if name == names.EMBEDDING else name)
            experts = architecture.num_experts if step.gates is not None else 1
            sums = found.setdefault(tensor, tuple(np.zeros((experts, *part.shape)) for part in parts))
            for own, part in zip(sums, parts, strict=True):
                own[expert] += part.double().cpu().numpy()

    model.hidden_states(windows, observe, progress)
    entries = {name: Entry(*(part.astype(np.float32) for part in parts)) for name, parts in found.items()}
    return Imatrix(entries, tuple(datasets), len(windows), windows.shape[1]), coverage
