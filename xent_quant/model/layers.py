"""The parts of a decoder layer as functions on tensors; shapes in brackets, T tokens, H hidden size.

Written from the modelling files of the families that are read: RMSNorm before attention and before the experts, in some families
of queries and keys too, rotary embedding in rotate_half layout over the whole head, router softmax in float32 over all experts.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from xent_quant.checkpoint.architecture import Architecture
from xent_quant.checkpoint.rope import frequencies
from xent_quant.linalg import linear


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """[..., H] to the same, computed in float32 at least and returned in x's dtype."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    return (wide * torch.rsqrt(norm.square() / wide.shape[-1] + eps)).to(x.dtype).mul_(weight)


def head_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm of queries or keys [n, heads·d], of each len(weight) columns alone: a head's, or all."""
    return rms_norm(x.view(len(x), -1, len(weight)), weight, eps).flatten(1)


def rotary_tables(length: int, model: Architecture, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of every position and dimension of a text of `length`, two [length, head_dim]."""
    found, factor = frequencies(model.rope_theta, model.rope_scaling, model.head_dim, length)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * torch.from_numpy(found)  # [length, head_dim / 2]
    angles = torch.cat([angles, angles], -1)
    return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of [..., length, head_dim], rotate_half layout."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def attention(q: Tensor, k: Tensor, v: Tensor, head_dim: int, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Causal attention of projected q [B, L, heads·d], k and v [B, L, kv_heads·d] to [B, L, heads·d]."""
    batch, length, _ = q.shape
    q, k, v = (x.view(batch, length, -1, head_dim).transpose(1, 2) for x in (q, k, v))
    mixed = F.scaled_dot_product_attention(rotate(q, *tables), rotate(k, *tables), v, is_causal=True, enable_gqa=True)
    return mixed.transpose(1, 2).reshape(batch, length, -1)


def route(logits: Tensor, top_k: int, renormalise: bool) -> tuple[Tensor, Tensor]:
    """Router logits [T, experts] to weights and expert indices, both [T, top_k]; of equal scores the lower index first."""
    probabilities = logits.softmax(-1)
    weights, indices = probabilities.sort(dim=-1, descending=True, stable=True)
    weights, indices = weights[:, :top_k], indices[:, :top_k]
    return (weights / weights.sum(-1, keepdim=True) if renormalise else weights), indices


def swiglu(h: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate · h) · (up · h): [T, H] to [T, width], the input of the down projection."""
    return F.silu(linear(h, gate)) * linear(h, up)
