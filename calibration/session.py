"""From a person's options to a pass that is ready to run: text, model, and enough windows for every expert."""

from collections.abc import Callable
from functools import cached_property
from math import ceil

import torch
from torch import Tensor

from calibration import text
from calibration.collect import collect
from calibration.coverage import Coverage
from calibration.imatrix import Imatrix
from calibration.moments import FEWEST_ROWS, fewest_rows
from calibration.running import RunningCalibration
from calibration.text import CalibrationText
from xent_quant.checkpoint import architecture as names
from xent_quant.checkpoint.llama_names import llama_name
from xent_quant.checkpoint.reader import Checkpoint
from xent_quant.checkpoint.tokenizer import load_tokenizer
from xent_quant.errors import ConfigError
from xent_quant.formats.base import F32
from xent_quant.model.streaming import Step, StreamingModel
from xent_quant.options import CalibrationOptions
from xent_quant.progress import Progress
from xent_quant.tensors import InputStatistics, StatisticsSource

SPARE = 3
"""Times `tokens` that are drawn beyond them, at most, to reach rare experts."""

PROBE = 8
"""One window in so many tells how rare the rarest expert is."""


class Session:
    """A checkpoint with its calibration text. Raises CalibrationError and ConfigError, before any weight is read."""

    def __init__(self, checkpoint: Checkpoint, settings: CalibrationOptions) -> None:
        longest = checkpoint.architecture.max_position_embeddings
        if settings.seqlen > longest:
            raise ConfigError(f"--seqlen {settings.seqlen}: the model's context is {longest}")
        self.checkpoint, self.settings = checkpoint, settings
        tokenizer = load_tokenizer(checkpoint.path)
        self.text: CalibrationText = text.load(
            text.sources(settings.calib, settings.calib_mix, text.is_chinese(tokenizer)),
            tokenizer,
            tokens=settings.n_tokens,
            length=settings.seqlen,
            seed=settings.seed,
            bos=checkpoint.architecture.bos_token_id,
            text_field=settings.text_field,
            spare=SPARE * settings.n_tokens if checkpoint.architecture.num_experts else 0,
        )
        device = _device(settings.device)
        self._drawn: dict[int, Tensor] = {}
        # bfloat16 is as fast as float32 or slower on CPUs without matrix units for it, and half as fine.
        self.model = StreamingModel(checkpoint, torch.bfloat16 if device == "cuda" else torch.float32, device)

    def windows(self, fewest: int, progress: Progress | None = None) -> Tensor:
        """Token ids [n, seqlen]: the text's windows, and as many spare ones as it takes until every expert is chosen by `fewest`
        tokens, or all. How often an expert is chosen is judged by one window in PROBE. With none to draw from, nothing
        is run for it."""
        chosen = torch.from_numpy(self.text.windows).to(self.model.device)
        spare = torch.from_numpy(self.text.spare).to(self.model.device)
        if not (fewest and len(spare)):
            return chosen
        coverage = Coverage(self.checkpoint.architecture.num_layers, self.checkpoint.architecture.num_experts, fewest)

        def observe(step: Step) -> None:
            if step.gates is not None and step.weights[0].endswith(".gate_proj.weight"):
                coverage.count(step.weights[0], len(step.inputs))

        probe = chosen[::PROBE]
        self.model.hidden_states(probe, observe, progress)
        # One standard error below what was counted, since the rarest of many experts is more often under- than overrated.
        sure = coverage.least - coverage.least**0.5
        needed = ceil(fewest * len(probe) / sure) if sure > 0 else len(chosen) + len(spare)
        return torch.cat([chosen, spare[: max(0, needed - len(chosen))]])

    def running(self, hessian: bool, progress: Progress | None = None) -> "LazyCalibration":
        """Statistics for one export during a walk over the checkpoint."""
        return LazyCalibration(lambda: self._run(hessian, progress))

    def _run(self, hessian: bool, progress: Progress | None) -> RunningCalibration:
        architecture = self.checkpoint.architecture
        fewest = fewest_rows(max(architecture.hidden_size, architecture.intermediate_size), hessian)
        if fewest not in self._drawn:
            self._drawn[fewest] = self.windows(fewest, progress)
        return RunningCalibration(self.model, self._drawn[fewest], hessian=hessian, follow=hessian)

    def imatrix(self, progress: Progress | None = None) -> tuple[Imatrix, Coverage]:
        """Statistics for a file."""
        return collect(self.model, self.windows(FEWEST_ROWS, progress), self.text.names, progress)

    def keys(self) -> dict[str, str | int]:
        """What a GGUF file says of the statistics that it was made with."""
        measured = {
            llama_name(name)[0]
            for name, shape in self.checkpoint.architecture.tensors().items()
            if len(shape) == 2 and name != names.EMBEDDING and not name.endswith(".router.weight")
        }
        return {
            "quantize.imatrix.dataset": ", ".join(self.text.names),
            "quantize.imatrix.entries_count": len(measured),
            "quantize.imatrix.chunks_count": len(self.text.windows),
        }


class LazyCalibration(StatisticsSource):
    """A StatisticsSource that begins when it is first asked: after every exporter has checked its target, since looking for
    rare experts takes a pass over the whole model."""

    def __init__(self, begin: Callable[[], RunningCalibration]) -> None:
        self._begin = begin

    @cached_property
    def _running(self) -> RunningCalibration:
        return self._begin()

    def get(self, name: str) -> InputStatistics | None:
        """See `StatisticsSource`."""
        return self._running.get(name)

    def target(self, name: str, start: int, weights: F32) -> F32:
        """See `StatisticsSource`."""
        return self._running.target(name, start, weights)

    def quantized(self, name: str, start: int, weights: Callable[[], F32]) -> None:
        """See `StatisticsSource`."""
        self._running.quantized(name, start, weights)

    @property
    def coverage(self) -> Coverage:
        return self._running.coverage


def _device(name: str) -> str:
    cuda = torch.cuda.is_available()
    if name == "cuda" and not cuda:
        raise ConfigError("--device cuda: PyTorch sees no CUDA device; use --device cpu")
    return ("cuda" if cuda else "cpu") if name == "auto" else name
