"""What is chosen for a stack of weights of one shape, as tensors on a device."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Generic, Self, TypeVar

import torch
from numpy.typing import NDArray
from torch import Tensor

from xent_quant.formats._gain import MOST
from xent_quant.formats._search import LARGEST
from xent_quant.formats.base import U8, QuantFormat

K = TypeVar("K", bound=QuantFormat)


class Stacked(ABC):
    """Tensors [stack, n, …, rows] whose second axis goes along the weights' columns: as many n to each block of a type."""

    @abstractmethod
    def parts(self) -> tuple[Tensor, ...]:
        """These tensors."""

    @abstractmethod
    def of(self, parts: Sequence[Tensor]) -> Self:
        """The same of others."""

    def columns(self, first: int, last: int, of: int) -> Self:
        """Views of columns first…last, whole blocks, of so many."""
        return self.of([part[:, first * part.shape[1] // of : last * part.shape[1] // of] for part in self.parts()])

    def put(self, block: int, rows: Tensor, found: Self) -> None:
        """The block of this number becomes `found` in the rows of the mask [stack, rows]."""
        for own, new in zip(self.parts(), found.parts(), strict=True):
            here = own[:, block * new.shape[1] : (block + 1) * new.shape[1]]
            here.copy_(torch.where(_for_all(rows, new), new, here))

    def where(self, rows: Tensor, other: Self) -> Self:
        """These in the rows of the mask [stack, rows], those of `other` elsewhere."""
        return self.of([torch.where(_for_all(rows, a), a, b) for a, b in zip(self.parts(), other.parts(), strict=True)])


S = TypeVar("S", bound=Stacked)


def joined(parts: Sequence[S]) -> S:
    """Of neighbouring columns."""
    return parts[0].of([torch.cat(each, 1) for each in zip(*(part.parts() for part in parts), strict=True)])


def _for_all(rows: Tensor, part: Tensor) -> Tensor:
    """A mask [stack, rows] for [stack, …, rows]."""
    return rows[(slice(None), *(None,) * (part.dim() - 2))]


class Chosen(Stacked, Generic[K]):
    """All that the bytes of some columns of a type hold."""

    kind: K

    @abstractmethod
    def values(self) -> Tensor:
        """What it stands for, [stack, columns, rows] float32."""

    @abstractmethod
    def stored(self) -> tuple[Tensor, ...]:
        """What is to be packed, the outermost scales last, in the shapes of `parts`."""

    @staticmethod
    @abstractmethod
    def pack(kind: K, stored: Sequence[NDArray[Any]], out: U8) -> None:
        """Fill out [rows, row_bytes] of what is `stored` for one weight, as arrays of rows first. On the CPU: what bytes mean is
        known to the format alone."""


def gains(weights: Tensor, weighting: Tensor, values: Tensor, block: int, group: int) -> Tensor:
    """See `formats._gain.gains`: of weights and values [stack, columns, rows] with weighting [stack, columns], [stack, blocks,
    rows]."""

    def apart(columns: Tensor) -> Tensor:
        """[stack, columns, …] to [group, stack, groups, …]."""
        return torch.unflatten(columns, 1, (-1, group)).movedim(2, 0)

    energy = kept = torch.zeros((), device=weights.device)
    for w, x, value in zip(apart(weighting[..., None]), apart(weights), apart(values), strict=True):
        weighted = w * x
        energy, kept = energy + weighted * x, kept + weighted * value
    energy, kept = folded(energy, block // group), folded(kept, block // group)
    return torch.where(kept > 0, (energy / kept).clamp(max=float(MOST)), 1.0)


def blocks(lanes: Tensor, groups: int) -> Tensor:
    """[stack, groups of a row, rows] to [stack, blocks, groups of a block, rows]."""
    return torch.unflatten(lanes, -2, (-1, groups))


def flat(lanes: Tensor) -> Tensor:
    """The inverse."""
    return lanes.flatten(-3, -2)


def spread(block: Tensor, groups: int) -> Tensor:
    """[stack, blocks, rows], the same in every group of a block."""
    return block.repeat_interleave(groups, -2)


def folded(lanes: Tensor, groups: int) -> Tensor:
    """Sums of each block's groups, in their order."""
    parts = blocks(lanes, groups).unbind(-2)
    total = torch.zeros_like(parts[0])
    for part in parts:
        total = total + part
    return total


def half(value: Tensor) -> Tensor:
    """Rounded to float16, zeros to +0."""
    rounded: Tensor = value.half().float() + 0.0
    return rounded


def stretched(scale: Tensor, gain: Tensor) -> Tensor:
    """scale · gain as float16 holds it; a scale that float16 does not hold as it is stays, to be refused."""
    most = float(LARGEST)
    return torch.where(scale.abs() <= most, half((scale * gain).clamp(-most, most)), scale)


def over(value: Tensor, by: float) -> Tensor:
    """value / by, rounded once: by a number of the CPU's, devices multiply with its inverse."""
    found: Tensor = value / torch.full((), by, dtype=value.dtype, device=value.device)
    return found


def inverted(scale: Tensor) -> Tensor:
    """1 / scale; 0 where that is not above 0."""
    return torch.where(scale > 0, 1 / scale, 0.0)


def inverted_signed(scale: Tensor) -> Tensor:
    """1 / scale of either sign; 0 where that is 0."""
    return torch.where(scale.abs() > 0, 1 / scale, 0.0)
