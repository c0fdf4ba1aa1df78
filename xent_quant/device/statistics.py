"""What calibration knows of a weight's inputs, on the device where it was measured."""

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from xent_quant.device.curvature import Curvature
from xent_quant.formats.base import F32
from xent_quant.linalg import believed
from xent_quant.parallel import once
from xent_quant.tensors import InputStatistics


@dataclass(frozen=True)
class DeviceStatistics:
    """See `tensors.InputStatistics`: `importance` [in] float32 is numpy's, `hessian` [in, in] and `held_out` [n, in] float32 lie
    on one device."""

    importance: F32
    hessian: Tensor
    rows: int
    held_out: Tensor | None = None

    @once
    def curvature(self) -> Curvature | None:
        """Of the Hessian, as far as so few rows are believed; None where all of it is 0."""
        if not bool(self.hessian.any()):
            return None
        return Curvature(self.hessian[None], believed(self.rows, self.importance))

    @once
    def reaching(self) -> Tensor:
        """held_out (H + λ)⁻¹ [n, in]; there must be both."""
        assert self.held_out is not None
        assert self.curvature is not None
        return self.curvature.solve(self.held_out)

    def padded(self, columns: int) -> "DeviceStatistics":
        """The statistics of inputs that are followed by zeros up to `columns`; these where there are as many."""
        missing = columns - len(self.importance)
        if not missing:
            return self
        return replace(
            self,
            importance=np.pad(self.importance, (0, missing)),
            hessian=F.pad(self.hessian, (0, missing, 0, missing)),
            held_out=None if self.held_out is None else F.pad(self.held_out, (0, missing)),
        )

    @classmethod
    def of(cls, known: InputStatistics, device: torch.device) -> "DeviceStatistics | None":
        """The same there; None without a Hessian."""
        if known.inner is not None:
            inner = cls.of(known.inner, device)
            return None if inner is None else inner.padded(len(known.importance))
        if known.hessian is None:
            return None
        held_out = None if known.held_out is None else torch.from_numpy(known.held_out).to(device)
        return cls(known.importance, torch.from_numpy(known.hessian).to(device), known.rows, held_out)

    def on_cpu(self) -> InputStatistics:
        """The same for kernels that run there."""
        held_out = None if self.held_out is None else self.held_out.cpu().numpy()
        return InputStatistics(self.importance, self.hessian.cpu().numpy(), self.rows, held_out)
