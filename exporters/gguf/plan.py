"""What a GGUF export will write, tensor by tensor, decided from headers alone."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from math import prod
from typing import Literal

from exporters.interface import kv_cache_bytes
from xent_quant import formats
from xent_quant.checkpoint import architecture as names
from xent_quant.checkpoint.architecture import PROJECTIONS, Architecture, Projection
from xent_quant.checkpoint.llama_names import llama_name
from xent_quant.errors import ConfigError, UnsupportedError
from xent_quant.recipes import Recipe, Role, fitting

SUPER_BLOCK = 256
"""Weights in a block of the K types; the expert width is padded to a multiple of it."""

PROJECTION_ROLES: dict[Projection, Role] = {"gate": Role.GATE, "up": Role.UP, "down": Role.DOWN}

BATCH = 512
"""Tokens that llama.cpp computes at once by default (n_ubatch)."""

RUNTIME_BYTES = 300_000_000
"""What a GPU's driver context and llama.cpp's alignment take, about."""


@dataclass(frozen=True, kw_only=True)
class Slot:
    """A tensor that llama.cpp's architecture wants, before its type is chosen.

    `shape` is row-major, padding included: [out, in], or [experts, out, in], or [n]. `sources` holds one checkpoint
    tensor per expert, or one. `source_rows` and `source_columns` are the extents of one source; `heads` > 0 asks for the
    rotary row permutation; `layer` is None outside of layers.
    """

    name: str
    role: Role
    layer: int | None
    shape: tuple[int, ...]
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
        """Weights written, padding included."""
        return prod(self.shape)

    @property
    def source_weights(self) -> int:
        """Weights of the checkpoint that this tensor holds."""
        return len(self.sources) * self.source_rows * self.source_columns


@dataclass(frozen=True, kw_only=True)
class PlannedTensor(Slot):
    """A slot with its type; `asked` is what the recipe asked for where rows do not divide into that type's blocks."""

    type: str
    asked: str

    @property
    def nbytes(self) -> int:
        return self.n_weights // self.columns * formats.get(self.type).row_bytes(self.columns)


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
        """Bytes of tensor data."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """Bits in the file per weight of the checkpoint: padding counts as cost, not as weights."""
        return 8 * self.nbytes / sum(tensor.source_weights for tensor in self.tensors)

    def vram_bytes(self, context: int) -> int:
        """What the model takes when it is on a GPU whole, with `context` tokens: an estimate.

        Weights without the embedding, which stays in RAM; the KV cache in float16; llama.cpp's compute buffer for BATCH tokens in
        float32, BATCH · 4 · (vocab + 8 · hidden + experts per token · (3 · width + hidden)), with flash attention; and
        RUNTIME_BYTES.
        """
        model = self.architecture
        weights = sum(tensor.nbytes for tensor in self.tensors if tensor.role is not Role.EMBEDDING)
        active = max(model.experts_per_token, 1) * (3 * self.expert_width + model.hidden_size)
        compute = BATCH * 4 * (model.vocab_size + 8 * model.hidden_size + active)
        return weights + kv_cache_bytes(model, context) + compute + RUNTIME_BYTES


def slots(model: Architecture, width: int) -> Iterator[Slot]:
    """Every tensor of the file in llama.cpp's order, for experts (or a dense MLP) of `width`."""
    hidden, kv = model.hidden_size, model.num_kv_heads * model.head_dim

    def slot(role: Role, layer: int | None, source: str, rows: int = 1, heads: int = 0) -> Slot:
        """A matrix of `rows` rows, or with the role of a norm a vector."""
        return Slot(
            name=llama_name(source)[0],
            role=role,
            layer=layer,
            shape=(hidden,) if role is Role.NORM else (rows, hidden),
            sources=(source,),
            source_rows=rows,
            source_columns=hidden,
            heads=heads,
        )

    def mlp(projection: Projection, layer: int, sources: Sequence[str], own: int, padded: int, stacked: bool = False) -> Slot:
        rows, columns = (hidden, own) if projection == "down" else (own, hidden)
        shape = (hidden, padded) if projection == "down" else (padded, hidden)
        return Slot(
            name=llama_name(sources[0])[0],
            role=PROJECTION_ROLES[projection],
            layer=layer,
            shape=(len(sources), *shape) if stacked else shape,
            sources=tuple(sources),
            source_rows=rows,
            source_columns=columns,
        )

    yield slot(Role.EMBEDDING, None, names.EMBEDDING, model.vocab_size)
    for layer in range(model.num_layers):
        yield slot(Role.NORM, layer, names.input_norm(layer))
        yield slot(Role.ATTENTION_Q, layer, names.attention(layer, "q"), hidden, model.num_heads)
        yield slot(Role.ATTENTION_K, layer, names.attention(layer, "k"), kv, model.num_kv_heads)
        yield slot(Role.ATTENTION_V, layer, names.attention(layer, "v"), kv)
        yield slot(Role.ATTENTION_OUTPUT, layer, names.attention(layer, "o"), hidden)
        yield slot(Role.NORM, layer, names.post_attention_norm(layer))
        if not model.num_experts:
            for projection in PROJECTIONS:
                yield mlp(projection, layer, (names.dense_mlp(layer, projection),), model.intermediate_size, width)
            continue
        yield slot(Role.ROUTER, layer, names.router(layer), model.num_experts)
        for projection in PROJECTIONS:
            experts = tuple(names.expert(layer, index, projection) for index in range(model.num_experts))
            yield mlp(projection, layer, experts, model.intermediate_size, width, stacked=True)
        if model.num_shared_experts:
            # llama.cpp takes the shared width to be expert width times count, so both are padded in step.
            for projection in PROJECTIONS:
                shared = (names.shared_expert(layer, projection),)
                yield mlp(projection, layer, shared, model.shared_size, width * model.num_shared_experts)
    yield slot(Role.NORM, None, names.FINAL_NORM)
    if model.tie_word_embeddings:
        # llama.cpp wants output.weight in these architectures even where the checkpoint ties it to the embedding.
        yield replace(slot(Role.HEAD, None, names.EMBEDDING, model.vocab_size), name=llama_name(names.HEAD)[0])
    else:
        yield slot(Role.HEAD, None, names.HEAD, model.vocab_size)


def layout(model: Architecture, recipe: Recipe, width: int) -> tuple[PlannedTensor, ...]:
    """`slots` with the recipe's types, or their fallbacks where rows ask for one."""

    def typed(slot: Slot) -> PlannedTensor:
        asked = recipe.type_of(slot.name, slot.role, slot.layer or 0, model)
        head = slot.role is Role.HEAD and asked == recipe.mix.head
        return PlannedTensor(**{**asdict(slot), "role": slot.role}, asked=asked, type=fitting(asked, slot.columns, head))

    return tuple(typed(slot) for slot in slots(model, width))


def plan(model: Architecture, recipe: Recipe, pad: str = "auto") -> GGUFPlan:
    """Choose types and the expert width, without reading weights.

    `pad` "auto" widens the experts with zeros to a multiple of 256 where the whole file becomes smaller than with
    llama-quantize's fallback types, so it is never larger than that one's; "never" keeps the width. Raises UnsupportedError
    for what no architecture of llama.cpp expresses, ConfigError for an override that matches nothing.
    """
    arch: Literal["bailingmoe", "granitemoe", "xverse"]
    arch = "xverse" if not model.num_experts else "bailingmoe" if model.num_shared_experts else "granitemoe"
    if arch == "granitemoe" and not model.norm_topk_prob:
        raise UnsupportedError("norm_topk_prob is false and there are no shared experts: llama.cpp has no architecture for that")
    width = model.intermediate_size
    tensors = layout(model, recipe, width)
    for pattern, kind in recipe.overrides:
        if not any(pattern.search(tensor.name) for tensor in tensors):
            raise ConfigError(f"--tensor-type '{pattern.pattern}={kind}': matches no tensor; --dry-run lists their names")
    notes: list[str] = []
    padded = -(-width // SUPER_BLOCK) * SUPER_BLOCK
    if pad == "auto" and padded != width:
        wider = layout(model, recipe, padded)
        saved = _saved(tensors, wider)
        if saved > 0:
            tensors, width = wider, padded
            notes.append(
                f"Expert width {model.intermediate_size} padded with zeros to {padded}: the same function, "
                f"{saved / 1e6:.1f} MB less than with the fallback types that rows of that width need."
            )
    for asked, got in sorted({(tensor.asked, tensor.type) for tensor in tensors if tensor.asked != tensor.type}):
        notes.append(f"{asked} does not divide some rows: {got} there, as llama-quantize does.")
    return GGUFPlan(arch, model, recipe, width, tensors, tuple(notes))


def _saved(plain: tuple[PlannedTensor, ...], padded: tuple[PlannedTensor, ...]) -> int:
    """Bytes that padding saves."""
    return sum(tensor.nbytes for tensor in plain) - sum(tensor.nbytes for tensor in padded)
