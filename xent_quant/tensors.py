"""Frozen records that travel between the parts."""

from dataclasses import dataclass
from enum import StrEnum
from math import prod
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from xent_quant.linalg import Curvature, believed
from xent_quant.parallel import once


class Role(StrEnum):
    """What a tensor does; decides its type together with its depth."""

    EMBEDDING = "embedding"
    HEAD = "head"
    NORM = "norm"
    ROUTER = "router"
    ATTENTION_Q = "attention q"
    ATTENTION_K = "attention k"
    ATTENTION_V = "attention v"
    ATTENTION_OUTPUT = "attention output"
    GATE = "gate"
    UP = "up"
    DOWN = "down"


ATTENTION_ROLES = frozenset({Role.ATTENTION_Q, Role.ATTENTION_K, Role.ATTENTION_V, Role.ATTENTION_OUTPUT})
KEPT_ROLES = frozenset({Role.NORM, Role.ROUTER})
"""Roles that no export rounds: they are few and everything depends on them."""


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of the model as data: what a checkpoint calls it, its row-major shape ([out, in], or [n]), what it does and where.

    `layer` is None outside of layers; `expert` counts a layer's routed experts from 0, None for all else; `shared` marks the
    shared experts' MLP, which every token uses. `normed` is what a layer's norm is for: the rows that go into its attention or
    its MLP, or its queries or keys.
    """

    name: str
    shape: tuple[int, ...]
    role: Role
    layer: int | None = None
    expert: int | None = None
    shared: bool = False
    normed: Literal["attention", "mlp", "q", "k"] | None = None

    @property
    def n_weights(self) -> int:
        return prod(self.shape)

    @property
    def measured(self) -> bool:
        """Whether calibration measures its inputs: rows of the embedding are looked up, norms and routers are kept."""
        return self.role not in KEPT_ROLES and self.role is not Role.EMBEDDING


_NAMES_BY_SIZE = {8: "F64 I64 U64", 4: "F32 I32 U32", 2: "F16 BF16 I16 U16", 1: "I8 U8 BOOL F8_E4M3 F8_E5M2 F8_E8M0"}
ITEM_SIZE = {name: size for size, names in _NAMES_BY_SIZE.items() for name in names.split()}
"""Bytes of one element, by safetensors' name of its type."""
CODE_BITS = {"INT2": 2, "INT4": 4, "INT8": 8}
"""Of weights that a checkpoint stores as codes with scales."""


@dataclass(frozen=True)
class TensorInfo:
    """What a checkpoint's header says of one tensor.

    `shape` is row-major as in torch, `dtype` one of ITEM_SIZE, or of CODE_BITS for a weight that is stored as codes.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def n_weights(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes as stored, scales aside."""
        return self.n_weights * CODE_BITS.get(self.dtype, 8 * ITEM_SIZE.get(self.dtype, 2)) // 8


@dataclass(frozen=True)
class InputStatistics:
    """What calibration knows of the inputs of one weight [out, in], ready for use: blended for rare experts, floored.

    `importance` [in] float32 is the mean x² of each input column; `hessian` [in, in] float32 is the mean x xᵀ (no factor
    2), or None where it was not asked for, or these are `padded`; `rows` counts the weight's own rows (tokens), 0 for an expert
    never reached. `held_out` [n, in] float32 are input rows that neither of them has seen, to judge a method by; None where there
    are none.
    """

    importance: NDArray[np.float32]
    hessian: NDArray[np.float32] | None
    rows: int
    held_out: NDArray[np.float32] | None = None
    inner: "InputStatistics | None" = None
    """Those of the inputs before the zeros, where these are `padded`; they have the Hessian."""

    @once
    def curvature(self) -> Curvature | None:
        """Of the Hessian, as far as so few rows are believed; None where there is none, or all of it is 0."""
        if self.inner is not None:
            return None if self.inner.curvature is None else self.inner.curvature.padded(len(self.importance))
        if self.hessian is None or not self.hessian.any():
            return None
        return Curvature(self.hessian, believed(self.rows, self.importance))

    @once
    def reaching(self) -> NDArray[np.float32]:
        """held_out (H + λ)⁻¹ [n, in]; there must be both."""
        assert self.held_out is not None
        assert self.curvature is not None
        if self.inner is not None:
            return np.pad(self.inner.reaching, ((0, 0), (0, len(self.importance) - len(self.inner.importance))))
        return self.curvature.solve(self.held_out)

    def padded(self, columns: int) -> "InputStatistics":
        """The statistics of inputs that are followed by zeros up to `columns`."""
        missing = columns - len(self.importance)
        if not missing:
            return self
        held_out = None if self.held_out is None else np.pad(self.held_out, ((0, 0), (0, missing)))
        return InputStatistics(np.pad(self.importance, (0, missing)), None, self.rows, held_out, self)


class StatisticsSource(Protocol):
    """Statistics that are there before a walk begins: a file of them."""

    def get(self, tensor: TensorSpec) -> InputStatistics | None:
        """Of one tensor, or None where nothing is known (norms, routers, tensors that a file lacks)."""
