"""Methods whose work is done on a device: the same choices as those of `methods`, for several weights at a time."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xent_quant import parallel
from xent_quant.device import codebooks
from xent_quant.device.curvature import Curvature
from xent_quant.device.found import Chosen
from xent_quant.device.rounding import CodedRows, Rows, VectorRows
from xent_quant.device.search import Coded, encode, search, searches, unshrunk
from xent_quant.device.statistics import DeviceStatistics
from xent_quant.errors import QuantizationError
from xent_quant.formats._chunks import LIMIT, NOT_FINITE, TOO_LARGE
from xent_quant.formats._codes import SearchedFormat
from xent_quant.formats._search import LARGEST
from xent_quant.formats._vectors import VectorFormat
from xent_quant.formats.base import F32, U8, Effort, Encoding, weighting
from xent_quant.formats.prescaled import InMemory, Prescaled, Scaled
from xent_quant.linalg import row_chunks
from xent_quant.methods.gptq import EFFORTS, GPTQ
from xent_quant.methods.interface import Method
from xent_quant.methods.rtn import RoundToNearest
from xent_quant.methods.search import Search
from xent_quant.tensors import InputStatistics

Here = SearchedFormat | VectorFormat | InMemory
"""What is rounded on a device."""


@dataclass(frozen=True)
class Job:
    """A weight [rows, columns] float32 to quantise, with what `Method.quantize` is told of it; tensors on the method's device."""

    name: str
    weights: Tensor
    statistics: DeviceStatistics | InputStatistics | None = None
    pull: Tensor | None = None


@dataclass(frozen=True)
class Made:
    """A weight's bytes [rows, row_bytes], and on the device what they stand for, [rows, columns] float32."""

    packed: U8
    values: Tensor


class OnDevice:
    """A method of `methods`, on a device. Types that are not searched for there (`here`) are left to the CPU's kernels."""

    def __init__(self, method: Method, device: torch.device) -> None:
        self.device, self._method = device, method
        self._effort: Effort = method.effort if isinstance(method, GPTQ | Search) else "fast"

    def on(self, device: torch.device) -> "OnDevice":
        """The same method on another device."""
        return OnDevice(self._method, device)

    @staticmethod
    def here(kind: Encoding) -> bool:
        """Whether codes of this type are chosen on the device."""
        return searches(kind) or codebooks.searches(kind) or isinstance(kind, Prescaled)

    def quantize(
        self, weights: F32, kind: Encoding, statistics: InputStatistics | None, *, name: str, pull: F32 | None = None
    ) -> U8:
        """See `Method.quantize`; of one weight [rows, columns] float32 in memory. Raises as `quantize_together`."""
        there = None if pull is None else torch.from_numpy(pull).to(self.device)
        known = (statistics and DeviceStatistics.of(statistics, self.device)) or statistics
        (made,) = self.quantize_together([Job(name, torch.from_numpy(weights).to(self.device), known, there)], kind)
        return made.packed

    def quantize_together(self, jobs: Sequence[Job], kind: Encoding) -> list[Made]:
        """Weights of as many columns; what is made of them, in the order given. Those of the same statistics are rows of one
        weight here, those of others are stacked where they have as many rows.

        Holds on the device about COPIES times the weights and HESSIANS times the Hessians (`device/rounding.py`). Raises
        QuantizationError naming the tensor where weights, scales or Hessians are NaN, infinite or too large, or rows are not
        whole blocks.
        """
        if not jobs:
            return []
        if not self.here(kind):
            return [self._elsewhere(job, kind) for job in jobs]
        if isinstance(kind, Prescaled):
            return self._prescaled(jobs, kind)
        assert isinstance(kind, SearchedFormat | VectorFormat)
        for job in jobs:
            self._check(job, kind)
        return self._stacked(jobs, kind)

    def _stacked(self, jobs: Sequence[Job], kind: Here, scaled: "dict[int, U8] | None" = None) -> list[Made]:
        """See `quantize_together`; of InMemory rows that are `scaled` already, by the jobs' identity."""
        stacks: dict[int, list[Job]] = {}
        for job in jobs:
            stacks.setdefault(id(job.statistics) if job.statistics is not None else id(job), []).append(job)
        made: dict[int, Made] = {}
        together: dict[tuple[int, bool], list[list[Job]]] = {}
        for same in stacks.values():
            together.setdefault((sum(len(job.weights) for job in same), self._feeds_back(same[0])), []).append(same)
        for (_, feeds_back), group in together.items():
            found = self._gptq(group, kind, scaled) if feeds_back else self._searched(group, kind)
            for same, each in zip(group, found, strict=True):
                start = 0
                for job in same:
                    stop = start + len(job.weights)
                    made[id(job)] = Made(each.packed[start:stop], each.values[start:stop])
                    start = stop
        return [made[id(job)] for job in jobs]

    def _prescaled(self, jobs: Sequence[Job], kind: Encoding) -> list[Made]:
        """Codes by GPTQ within the scales that an encoding makes of a whole weight; without feedback it makes all of it."""
        assert isinstance(kind, Prescaled)
        scales: dict[int, Scaled] = {}
        for job in jobs:
            if self._feeds_back(job):
                _check_hessian(job)
                scaled = kind.scaled(np.ascontiguousarray(_wanted([job]).cpu()), name=job.name)
                scales |= {} if scaled is None else {id(job): scaled}
        inside = [job for job in jobs if id(job) in scales]
        found: dict[int, Made] = {}
        if inside:
            rows = self._stacked(inside, next(iter(scales.values())).kind, {key: each.packed for key, each in scales.items()})
            found = {
                id(job): self._as_read(job, kind, scales[id(job)].finish(made.packed))
                for job, made in zip(inside, rows, strict=True)
            }
        return [found[id(job)] if id(job) in found else self._elsewhere(job, kind) for job in jobs]

    def _feeds_back(self, job: Job) -> bool:
        known = job.statistics
        if not isinstance(self._method, GPTQ) or not isinstance(known, DeviceStatistics):
            return False
        return known.held_out is not None and known.curvature is not None

    def _check(self, job: Job, kind: Here) -> None:
        """What `QuantFormat.quantize` refuses."""
        try:
            kind.row_bytes(job.weights.shape[1])
        except QuantizationError as error:
            raise QuantizationError(f"{job.name}: {error}") from None
        _check_range(job.name, job.weights, kind)
        _check_hessian(job)

    def _elsewhere(self, job: Job, kind: Encoding) -> Made:
        """By the CPU's kernels."""
        known = job.statistics.on_cpu() if isinstance(job.statistics, DeviceStatistics) else job.statistics
        pull = None if job.pull is None else job.pull.cpu().numpy()
        return self._as_read(job, kind, self._method.quantize(job.weights.cpu().numpy(), kind, known, name=job.name, pull=pull))

    def _as_read(self, job: Job, kind: Encoding, packed: U8) -> Made:
        read = kind.read(packed, (job.weights.shape[0], job.weights.shape[1]))
        return Made(packed, torch.from_numpy(read).to(self.device))

    def _weighting(self, group: Sequence[Sequence[Job]], step: int) -> Tensor:
        """[stack, columns] float32, of each `step` columns alone."""
        columns = group[0][0].weights.shape[1]
        rows = np.ones((len(group), columns), np.float32)
        for row, (job, *_) in zip(rows, group, strict=True):
            if job.statistics is None or isinstance(self._method, RoundToNearest):
                continue
            for start in range(0, columns, step):
                found = weighting(job.statistics.importance[start : start + step])
                if found is not None:
                    row[start : start + step] = found
        return torch.from_numpy(rows).to(self.device)

    def _search(self, weights: Tensor, kind: Here, weighting: Tensor) -> Chosen[Any]:
        """See `methods.search.Search`."""
        if isinstance(kind, VectorFormat):
            return codebooks.search(kind, weights, weighting, self._effort)
        scales = search(kind, weights, weighting, self._effort)
        codes = encode(kind, weights, scales)
        return Coded(kind, codes, unshrunk(kind, weights, weighting, scales, codes))

    def _searched(self, group: Sequence[Sequence[Job]], kind: Here) -> list[Made]:
        """The weighted search for what a pull makes of the weights."""
        wanted = []
        for same in group:
            rows = _wanted(same)
            for job, part in zip(same, torch.split(rows, [len(job.weights) for job in same]), strict=True):
                if job.pull is not None:  # without, they are what was checked
                    _check_range(job.name, part, kind)
            wanted.append(rows.mT)
        weights = torch.stack(wanted).contiguous()
        return self._made(group, kind, self._search(weights, kind, self._weighting(group, weights.shape[1])))

    def _gptq(self, group: Sequence[Sequence[Job]], kind: Here, scaled: "dict[int, U8] | None") -> list[Made]:
        """See `methods.gptq.GPTQ`."""
        known = [same[0].statistics for same in group]
        weights = torch.stack([torch.cat([job.weights for job in same]).mT for same in group]).contiguous()
        pull = _pulls(group)
        curvature = Curvature.stacked([each.curvature for each in known if isinstance(each, DeviceStatistics) and each.curvature])
        rows, plain = self._begun(group, kind, scaled, weights, curvature, pull)
        rows.feed()
        sweeps, *rounds = EFFORTS[self._effort]
        for _ in range(sweeps):
            rows.sweep(rounds[isinstance(kind, VectorFormat)])
        inputs = _inputs([each.held_out for each in known if isinstance(each, DeviceStatistics) and each.held_out is not None])
        reaching = None if pull is None else curvature.solve_columns(inputs)
        ours, theirs = (_held_out_error(errors, inputs, pull, reaching) for errors in (rows.errors, weights - plain.values()))
        chosen = plain.where(ours > theirs, rows.chosen)
        del rows, plain, weights, pull, reaching, inputs, curvature
        return self._made(group, kind, chosen)

    def _begun(
        self,
        group: Sequence[Sequence[Job]],
        kind: Here,
        scaled: "dict[int, U8] | None",
        weights: Tensor,
        curvature: Curvature,
        pull: Tensor | None,
    ) -> tuple[Rows[Any], Any]:
        """Rows to round, and what those of them keep that are no better off for it."""
        blockwise = self._weighting(group, kind.block_size), self._effort, pull
        if isinstance(kind, InMemory):
            assert scaled is not None
            read = Coded.read(kind, [np.concatenate([scaled[id(job)] for job in same]) for same in group], self.device)
            return CodedRows(weights, kind, curvature, *blockwise, scales=read.scales), read
        plain = self._search(weights, kind, self._weighting(group, weights.shape[1]))
        if isinstance(kind, VectorFormat):
            return VectorRows(weights, kind, curvature, *blockwise), plain
        return CodedRows(weights, kind, curvature, *blockwise), plain

    def _made(self, group: Sequence[Sequence[Job]], kind: Here, chosen: Chosen[Any]) -> list[Made]:
        """What was chosen as bytes, packed by the CPU."""
        read = chosen.values().mT
        # Rows first, as they are packed: turned on the device, and fetched once.
        stored = [each.movedim(-1, 1).contiguous().cpu().numpy() for each in chosen.stored()]
        largest, too_large = (kind.largest_scale, kind.too_large) if isinstance(kind, SearchedFormat) else (LARGEST, TOO_LARGE)
        found = []
        for number, same in enumerate(group):
            own = [each[number] for each in stored]
            out = np.empty((read.shape[1], kind.row_bytes(read.shape[2])), np.uint8)
            refused = ~(np.abs(own[-1].reshape(len(out), -1)) <= largest).all(1)
            if refused.any():
                owners = np.repeat([job.name for job in same], [len(job.weights) for job in same])
                raise QuantizationError(f"{owners[refused.argmax()]}: {too_large}")
            work = partial(_pack, chosen, kind, own, out)
            parallel.run([partial(work, part) for part in row_chunks(len(out))])
            found.append(Made(out, read[number]))
        return found


def _wanted(same: Sequence[Job]) -> Tensor:
    """Rows of all of them, with what a pull makes of them."""
    rows, known, pull = torch.cat([job.weights for job in same]), same[0].statistics, _pulls([same])
    if isinstance(known, DeviceStatistics) and known.curvature is not None and pull is not None:
        rows = rows + known.curvature.solve_columns(pull)[0].mT
    return rows


def _check_hessian(job: Job) -> None:
    known = job.statistics
    if isinstance(known, DeviceStatistics) and not bool(torch.isfinite(known.hessian).all()):
        raise QuantizationError(f"{job.name}: the Hessian holds NaN or infinities; calibrate again")


def _check_range(name: str, weights: Tensor, kind: Here) -> None:
    low, high = (float(edge) for edge in weights.aminmax()) if weights.numel() else (0.0, 0.0)
    if not (low > -LIMIT and high < LIMIT):
        raise QuantizationError(f"{name}: {TOO_LARGE if np.isfinite(low) and np.isfinite(high) else NOT_FINITE}")
    if isinstance(kind, SearchedFormat) and max(-low, high) > kind.largest_weight:
        raise QuantizationError(f"{name}: {kind.too_large}")


def _pack(chosen: Chosen[Any], kind: Here, stored: Sequence[F32], out: U8, part: slice) -> None:
    """Fill rows of `out` [rows, row_bytes] from what is stored for all rows."""
    chosen.pack(kind, [each[part] for each in stored], out[part])


def _pulls(group: Sequence[Sequence[Job]]) -> Tensor | None:
    """[stack, columns, rows]; None where no weight has one."""
    if not any(job.pull is not None for same in group for job in same):
        return None
    every = [torch.cat([torch.zeros_like(job.weights) if job.pull is None else job.pull for job in same]).mT for same in group]
    return torch.stack(every).contiguous()


def _inputs(held_out: Sequence[Tensor]) -> Tensor:
    """Rows [n, columns] of each as columns, [stack, columns, most rows]; rows of zeros stand for those that are missing."""
    found = torch.zeros(len(held_out), held_out[0].shape[1], max(map(len, held_out)), device=held_out[0].device)
    for own, rows in zip(found, held_out, strict=True):
        own[:, : len(rows)] = rows.mT
    return found


def _held_out_error(errors: Tensor, inputs: Tensor, pull: Tensor | None, reaching: Tensor | None) -> Tensor:
    """See `methods.gptq.held_out_error`: [stack, rows]. `reaching` are (H + λ)⁻¹ inputs."""
    outputs = inputs.mT @ errors
    if pull is not None and reaching is not None:
        outputs += reaching.mT @ pull
    return outputs.square_().sum(1)
