"""From a person's options to token ids: text, and enough windows of it for every expert."""

import hashlib
from collections.abc import Mapping
from copy import copy
from functools import partial
from math import ceil
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from calibration import text
from calibration.chat import ChatTemplate
from calibration.coverage import Coverage
from calibration.supplement import supplemented
from xent_quant.checkpoint.llama_names import llama_name
from xent_quant.checkpoint.reader import Checkpoint
from xent_quant.checkpoint.tokenizer import load_tokenizer
from xent_quant.device.choice import ON_CPU, choose
from xent_quant.errors import ConfigError
from xent_quant.linalg import multiplies_bfloat16
from xent_quant.model.sizes import Room
from xent_quant.model.stages import Stage
from xent_quant.model.streaming import StreamingModel
from xent_quant.options import CalibrationOptions
from xent_quant.progress import Progress
from xent_quant.storage.files import remove
from xent_quant.tensors import Role

SPARE = 3
"""Times `tokens` that are drawn beyond them, at most, to reach rare experts."""

ROWS_PER_COLUMN = 4
"""Of an expert; where there are fewer, the person is told."""

PROBE = 8
"""One window in so many tells how rare the rarest expert is."""


class Text(Protocol):
    """Token ids that run through a model; `Session` makes them of a person's options."""

    @property
    def dtype(self) -> torch.dtype:
        """What the model runs in."""

    @property
    def narrow(self) -> torch.dtype:
        """What its rows may be multiplied in where nothing but the sums of their squares is asked for."""

    @property
    def identity(self) -> Mapping[str, str]: ...

    @property
    def length(self) -> int:
        """Tokens of a window."""

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """The device where methods compute, and the windows are, and others that share its experts; none: by the CPU's
        kernels."""

    def windows(
        self, fewest: int, progress: Progress | None = None, folder: Path | None = None, room: Room | None = None
    ) -> Tensor:
        """[n, length] int64 on the device that the model runs on; enough, if there are, for `fewest` tokens at every expert.
        Hidden states that it takes to know lie in `folder`, new and removed again, where one is given; `room` is what may be
        held."""

    def first(self, count: int) -> Tensor:
        """The first so many of the windows that there are."""


class Windows:
    """A Text of given windows [n, length] int64."""

    dtype = narrow = torch.float32
    devices: tuple[torch.device, ...] = ()

    def __init__(self, windows: Tensor) -> None:
        self._windows, self.length = windows, windows.shape[1]
        self.identity = {"text": hashlib.sha256(windows.numpy().tobytes()).hexdigest()}

    def windows(
        self, fewest: int, progress: Progress | None = None, folder: Path | None = None, room: Room | None = None
    ) -> Tensor:
        """See `Text.windows`."""
        return self._windows

    def first(self, count: int) -> Tensor:
        """See `Text.first`."""
        return self._windows[:count]


class Session:
    """A checkpoint with its calibration text, and `spare` text for rare experts. Raises CalibrationError and ConfigError, before
    any weight is read."""

    def __init__(self, checkpoint: Checkpoint, settings: CalibrationOptions, *, spare: bool = True) -> None:
        longest = checkpoint.architecture.max_position_embeddings
        if settings.seqlen > longest:
            raise ConfigError(f"--seqlen {settings.seqlen}: the model's context is {longest}")
        self.devices = choose(settings.device)
        if settings.vram is not None and not self.devices:
            raise ConfigError(
                f"--vram {settings.vram}: has no effect, since --device {settings.device} finds no GPU; drop it, or use --memory"
            )
        self.checkpoint = checkpoint
        tokenizer = load_tokenizer(checkpoint.path)
        chinese, tokens = text.is_chinese(tokenizer), settings.n_tokens
        room = SPARE * tokens if spare and checkpoint.architecture.num_experts else 0
        load = partial(
            text.load, tokenizer=tokenizer, length=settings.seqlen, seed=settings.seed, bos=checkpoint.architecture.bos_token_id
        )
        named = text.sources(settings.calib, settings.calib_mix, chinese, settings.seed)
        chat = ChatTemplate(checkpoint.path)
        own = load(named, tokens=tokens, spare=room, text_field=settings.text_field, chat=chat)
        self.text = supplemented(own, tokenizer, load, mix=settings.calib_mix, tokens=tokens, spare=room, chinese=chinese)
        self.device = self.devices[0] if self.devices else torch.device("cpu")
        # What a quantised stream lacks of the exact one is less than bfloat16 rounds off, at eight bits a weight.
        self.dtype = self.narrow = torch.float32
        if not self.devices and multiplies_bfloat16() and stored_in_bfloat16(checkpoint):
            self.narrow = torch.bfloat16  # as llama.cpp multiplies such weights
        self.length = settings.seqlen

    @property
    def notes(self) -> tuple[str, ...]:
        """What a person should know of the text before it is run."""
        model, said = self.checkpoint.architecture, self.text.notes
        if not model.num_experts:
            return said
        columns = max(model.hidden_size, model.intermediate_size)
        rows = self.text.windows.size * model.experts_per_token // model.num_experts
        if rows >= ROWS_PER_COLUMN * columns:
            return said
        return (
            *said,
            f"{self.text.windows.size:,} tokens are about {rows:,} for each of {model.num_experts} experts, "
            f"{rows / columns:.1f} for each of {columns:,} columns; with {ROWS_PER_COLUMN} and more an expert is calibrated "
            f"better: raise --tokens, or give more text ({text.more_text(self.text.names)}).",
        )

    def windows(
        self, fewest: int, progress: Progress | None = None, folder: Path | None = None, room: Room | None = None
    ) -> Tensor:
        """Token ids [n, seqlen]: the text's windows, and as many spare ones as it takes until every expert is chosen by `fewest`
        tokens, or all. How often an expert is chosen is judged by one window in PROBE. With none to draw from, nothing
        is run for it."""
        chosen = torch.from_numpy(self.text.windows).to(self.device)
        spare = torch.from_numpy(self.text.spare).to(self.device)
        if not (fewest and len(spare)):
            return chosen
        model = self.checkpoint.architecture
        coverage = Coverage(model.num_layers, model.num_experts, fewest)

        def observe(stage: Stage) -> None:
            first = stage.weights[0] if stage.weights else None
            if first and first.expert == 0 and first.role is Role.GATE and first.layer is not None:
                coverage.count(first.layer, stage.run.expert_tokens(0))

        probe = chosen[::PROBE]
        if folder:
            folder.mkdir()
        running = StreamingModel(self.checkpoint, self.dtype, str(self.device), self.narrow, room)
        running.run(probe, observe, progress, folder=folder)
        if folder:
            remove(folder)
        # One standard error below what was counted, since the rarest of many experts is more often under- than overrated.
        sure = coverage.least - coverage.least**0.5
        needed = ceil(fewest * len(probe) / sure) if sure > 0 else len(chosen) + len(spare)
        return torch.cat([chosen, spare[: max(0, needed - len(chosen))]])

    def first(self, count: int) -> Tensor:
        """As many of the text's windows, spare ones behind the others: what `windows` once chose."""
        every = np.concatenate([self.text.windows, self.text.spare])
        return torch.from_numpy(every[:count]).to(self.device)

    def sample(self, tokens: int) -> Tensor:
        """Evenly spaced windows [n, seqlen] of the text, of so many tokens at most, one window at least."""
        every = self.text.windows
        return torch.from_numpy(every[:: -(-len(every) // max(1, tokens // self.length))]).to(self.device)

    def of(self, checkpoint: Checkpoint) -> "Session":
        """The same text for a view of the checkpoint."""
        found = copy(self)
        found.checkpoint = checkpoint
        return found

    @property
    def identity(self) -> dict[str, str]:
        """What statistics of this text depend on besides the model."""
        digest = hashlib.sha256(str(self.text.windows.shape).encode())
        for part in (self.text.windows, self.text.spare):
            digest.update(part.astype("<i8").tobytes())
        return {"text (--calib, --tokens, --seqlen, --seed)": digest.hexdigest(), "--device": self._computed_by}

    @property
    def _computed_by(self) -> str:
        if not self.devices:
            return "cpu"
        return ON_CPU if self.device.type == "cpu" else self.device.type

    def keys(self, hessian: bool) -> dict[str, str | int]:
        """What a GGUF file says of the statistics that it was made with. Of how many windows where only Hessians are, since for
        an importance more may be run."""
        measured = {llama_name(spec) for spec in self.checkpoint.architecture.tensors().values() if spec.measured}
        return {
            "quantize.imatrix.dataset": ", ".join(self.text.names),
            "quantize.imatrix.entries_count": len(measured),
            **({"quantize.imatrix.chunks_count": len(self.text.windows)} if hessian or not len(self.text.spare) else {}),
        }


def stored_in_bfloat16(checkpoint: Checkpoint) -> bool:
    """Whether bfloat16 holds all that rows are multiplied by."""
    return all(info.dtype == "BF16" for info in checkpoint.infos.values() if len(info.shape) > 1)
