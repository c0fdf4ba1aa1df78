"""A whole calibration pass into an importance matrix: what `xent-quant calibrate` keeps in a file."""

from collections.abc import Sequence

import numpy as np
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
    """Σx² and row counts of every weight with inputs [n_windows, length] of token ids, raw, as llama-imatrix keeps them.

    The head is included, which llama-imatrix does with --process-output only; the router is not. See
    `StreamingModel.steps` for what is held and raised.
    """
    architecture = model.architecture
    coverage = Coverage(architecture.num_layers, architecture.num_experts, FEWEST_ROWS)
    sums: dict[str, np.ndarray[tuple[int, int], np.dtype[np.float64]]] = {}
    counts: dict[str, np.ndarray[tuple[int], np.dtype[np.float64]]] = {}

    def observe(step: Step) -> None:
        squares = step.inputs.float().square().sum(0).double().cpu().numpy()
        if step.gates is not None:
            coverage.count(step.weights[0], len(step.inputs) if step.weights[0].endswith(".gate_proj.weight") else 0)
        for name in step.weights:
            if name.endswith(".router.weight"):
                continue
            tensor, expert = llama_name(names.HEAD if name == names.EMBEDDING else name)
            experts = architecture.num_experts if step.gates is not None else 1
            sums.setdefault(tensor, np.zeros((experts, len(squares))))[expert] += squares
            counts.setdefault(tensor, np.zeros(experts))[expert] += len(step.inputs)

    model.hidden_states(windows, observe, progress)
    entries = {name: Entry(sums[name].astype(np.float32), counts[name].astype(np.float32)) for name in sums}
    return Imatrix(entries, tuple(datasets), len(windows), windows.shape[1]), coverage
