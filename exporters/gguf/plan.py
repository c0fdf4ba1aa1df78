"""What a GGUF export will write, tensor by tensor, decided from headers alone."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Literal

from xent_quant import formats
from xent_quant.checkpoint import architecture as names
from xent_quant.checkpoint.architecture import PROJECTIONS, Architecture
from xent_quant.errors import UnsupportedError
from xent_quant.recipes import Recipe, Role, fitting

SUPER_BLOCK = 256
Transform = Literal["none", "permute"]


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the file: `shape` row-major with padding, `sources` one checkpoint tensor per expert (or one).

    `source_rows` and `source_columns` are the unpadded extents; `heads` > 0 asks for the rotary row permutation.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    role: Role
    sources: tuple[str, ...]
    source_rows: int
    source_columns: int
    heads: int = 0

    @property
    def rows(self) -> int:
        """Rows of one source after padding."""
        return self.shape[-2] if len(self.shape) > 1 else 1

    @property
    def columns(self) -> int:
        return self.shape[-1]

    @property
    def n_weights(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.n_weights // self.columns * formats.get(self.type).row_bytes(self.columns)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.n_weights


@dataclass(frozen=True)
class GGUFPlan:
    """All tensors in file order. `expert_width` is the width written, `arch` llama.cpp's architecture."""

    arch: Literal["bailingmoe", "granitemoe", "xverse"]
    architecture: Architecture
    recipe: Recipe
    expert_width: int
    tensors: tuple[PlannedTensor, ...]
    notes: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def vram_bytes(self, context: int) -> int:
        """Weights, the float16 KV cache of `context` tokens, and about 300 MB that llama.cpp computes in.

        The embedding stays in RAM, so it is not counted.
        """
        model = self.architecture
        cache = 2 * 2 * context * model.num_layers * model.num_kv_heads * model.head_dim
        weights = sum(tensor.nbytes for tensor in self.tensors if tensor.role is not Role.EMBEDDING)
        return weights + cache + 300_000_000


def _wanted(model: Architecture, width: int) -> Iterator[tuple[str, Role, int, tuple[int, ...], tuple[str, ...], int, int, int]]:
    """(name, role, layer, shape, sources, source rows, source columns, heads) in llama.cpp's order."""
    hidden, layers = model.hidden_size, model.num_layers
    yield "token_embd.weight", Role.EMBEDDING, 0, (model.vocab_size, hidden), (names.EMBEDDING,), model.vocab_size, hidden, 0
    for layer in range(layers):
        block = f"blk.{layer}."
        yield block + "attn_norm.weight", Role.NORM, layer, (hidden,), (names.input_norm(layer),), 1, hidden, 0
        kv = model.num_kv_heads * model.head_dim
        yield (
            block + "attn_q.weight",
            Role.ATTENTION_Q,
            layer,
            (hidden, hidden),
            (names.attention(layer, "q"),),
            hidden,
            hidden,
            model.num_heads,
        )
        yield (
            block + "attn_k.weight",
            Role.ATTENTION_K,
            layer,
            (kv, hidden),
            (names.attention(layer, "k"),),
            kv,
            hidden,
            model.num_kv_heads,
        )
        yield block + "attn_v.weight", Role.ATTENTION_V, layer, (kv, hidden), (names.attention(layer, "v"),), kv, hidden, 0
        yield (
            block + "attn_output.weight",
            Role.ATTENTION_OUTPUT,
            layer,
            (hidden, hidden),
            (names.attention(layer, "o"),),
            hidden,
            hidden,
            0,
        )
        yield block + "ffn_norm.weight", Role.NORM, layer, (hidden,), (names.post_attention_norm(layer),), 1, hidden, 0
        if model.num_experts:
            shape = (model.num_experts, hidden)
            yield block + "ffn_gate_inp.weight", Role.ROUTER, layer, shape, (names.router(layer),), *shape, 0
        for projection in PROJECTIONS:
            role = {"gate": Role.GATE, "up": Role.UP, "down": Role.DOWN}[projection]

            def swiglu(
                suffix: str, sources: tuple[str, ...], own: int, padded: int, experts: tuple[int, ...] = ()
            ) -> tuple[str, Role, int, tuple[int, ...], tuple[str, ...], int, int, int]:
                down = projection == "down"  # noqa: B023  (called at once)
                shape = (hidden, padded) if down else (padded, hidden)
                rows, columns = (hidden, own) if down else (own, hidden)
                return f"{block}ffn_{projection}{suffix}.weight", role, layer, (*experts, *shape), sources, rows, columns, 0  # noqa: B023

            if not model.num_experts:
                yield swiglu("", (names.dense_mlp(layer, projection),), model.intermediate_size, width)
                continue
            experts = tuple(names.expert(layer, index, projection) for index in range(model.num_experts))
            yield swiglu("_exps", experts, model.intermediate_size, width, (model.num_experts,))
            if model.num_shared_experts:
                shared = (names.shared_expert(layer, projection),)
                yield swiglu("_shexp", shared, model.shared_size, width * model.num_shared_experts)
    yield "output_norm.weight", Role.NORM, layers, (hidden,), (names.FINAL_NORM,), 1, hidden, 0
    head = names.EMBEDDING if model.tie_word_embeddings else names.HEAD
    yield "output.weight", Role.HEAD, layers, (model.vocab_size, hidden), (head,), model.vocab_size, hidden, 0


def _tensors(model: Architecture, recipe: Recipe, width: int) -> tuple[PlannedTensor, ...]:
    return tuple(
        PlannedTensor(
            name,
            shape,
            fitting(recipe.type_of(name, role, layer, model.num_layers), shape[-1]),
            role,
            sources,
            rows,
            columns,
            heads,
        )
        for name, role, layer, shape, sources, rows, columns, heads in _wanted(model, width)
    )


def plan(model: Architecture, recipe: Recipe, pad: str = "auto") -> GGUFPlan:
    """Choose types and the expert width. Padding is taken where the whole file becomes smaller than with llama-quantize's
    fallback types, so it is never larger than that one's. Raises UnsupportedError for what no architecture of llama.cpp
    expresses.
    """
    arch: Literal["bailingmoe", "granitemoe", "xverse"]
    arch = "xverse" if not model.num_experts else "bailingmoe" if model.num_shared_experts else "granitemoe"
    if model.num_experts == 8:
        raise UnsupportedError("num_experts is 8: llama.cpp would quantise and report it as Mixtral; this toolkit refuses it")
    if arch == "granitemoe" and not model.norm_topk_prob:
        raise UnsupportedError("norm_topk_prob false without shared experts: llama.cpp has no architecture for it")
    notes: list[str] = []
    width = model.intermediate_size
    tensors = _tensors(model, recipe, width)
    padded = -(-width // SUPER_BLOCK) * SUPER_BLOCK
    if pad == "auto" and padded != width:
        wider = _tensors(model, recipe, padded)
        saved = _saved(tensors, wider)
        if saved > 0:
            tensors, width = wider, padded
            notes.append(
                f"Expert width {model.intermediate_size} padded with zeros to {padded}: the same function, "
                f"{saved / 1e6:.1f} MB less than the fallback types that rows of that width need."
            )
    fallbacks = sorted({(want, t.type) for t, want in zip(tensors, _asked(model, recipe, width), strict=True) if want != t.type})
    notes.extend(f"{want} does not divide some rows: {got} there, as llama-quantize does." for want, got in fallbacks)
    return GGUFPlan(arch, model, recipe, width, tensors, tuple(notes))


def _saved(plain: tuple[PlannedTensor, ...], padded: tuple[PlannedTensor, ...]) -> int:
    return sum(tensor.nbytes for tensor in plain) - sum(tensor.nbytes for tensor in padded)


def _asked(model: Architecture, recipe: Recipe, width: int) -> list[str]:
    return [recipe.type_of(name, role, layer, model.num_layers) for name, role, layer, *_ in _wanted(model, width)]
