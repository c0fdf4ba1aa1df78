"""What a GGUF export will write, tensor by tensor, decided from headers alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import gguf

from exporters.interface import CONTEXT, Expected, Slot, kv_cache_bytes, usual_context
from xent_quant import formats
from xent_quant.checkpoint.architecture import Architecture
from xent_quant.checkpoint.families.interface import GGUF
from xent_quant.checkpoint.llama_names import HEAD, llama_name
from xent_quant.errors import ConfigError, UnsupportedError
from xent_quant.recipes import LAST_RESORT, Recipe, fitting, has_no_fallback
from xent_quant.tensors import KEPT_ROLES, Role, TensorSpec

SUPER_BLOCK = 256
"""Weights in a block of the K types; the expert width is padded to a multiple of it."""

ALIGNMENT = int(gguf.GGUF_DEFAULT_ALIGNMENT)
"""Bytes that a tensor's data begins at a multiple of."""

BATCH = 512
"""Tokens that llama.cpp computes at once by default (n_ubatch)."""

RUNTIME_BYTES = 300_000_000
"""What a GPU's driver context and llama.cpp's alignment take, about."""

CACHE_STEP = 256
"""llama.cpp rounds a context up to a multiple of so many tokens."""

SYSTEM_BYTES = 2_000_000_000
"""Of a computer's RAM what the operating system, llama.cpp's own buffers there and a few small programs take: an allowance."""

CACHE_FILL = 1 / 2
"""Share of the context that is there when the time of a token is counted."""

KV_ITEM = {"f16": 2.0, "q8_0": 34 / 32}
"""Bytes of a number in the KV cache, by llama.cpp's name of the cache's type."""

VRAM, RAM = 0, 1
"""The memories of a machine, as indices."""


@dataclass(frozen=True)
class Placement:
    """Where llama.cpp keeps a model: on a GPU but for the embedding and the routed experts of the first `cpu_layers` layers,
    which stay in RAM (`-ngl 99 --n-cpu-moe`); all of it in RAM where there is no `gpu`."""

    gpu: bool = True
    cpu_layers: int = 0


@dataclass(frozen=True)
class Needs:
    """What a model takes at work: bytes held in VRAM and in RAM, and of each the bytes that are read for a token."""

    held: tuple[int, int]
    read: tuple[float, float]

    def __add__(self, more: "Needs") -> "Needs":
        (vram, ram), (read_vram, read_ram) = more.held, more.read
        return Needs((self.held[VRAM] + vram, self.held[RAM] + ram), (self.read[VRAM] + read_vram, self.read[RAM] + read_ram))


@dataclass(frozen=True, kw_only=True)
class PlannedTensor:
    """A tensor of the file. `asked` is the type that the recipe asked for where rows do not divide into its blocks.

    `shape` is row-major, padding included: [out, in], or [experts, out, in], or [n]. `sources` holds one checkpoint
    tensor per expert, or one. `heads` > 0 asks for the rotary row permutation; `layer` is None outside of layers.
    """

    name: str
    role: Role
    shape: tuple[int, ...]
    sources: tuple[TensorSpec, ...]
    heads: int
    type: str
    asked: str

    @property
    def layer(self) -> int | None:
        return self.sources[0].layer

    @property
    def routed(self) -> bool:
        """Whether it holds a layer's routed experts."""
        return self.sources[0].expert is not None

    @property
    def shared(self) -> bool:
        return self.sources[0].shared

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
        return sum(source.n_weights for source in self.sources)

    @property
    def nbytes(self) -> int:
        return self.n_weights // self.columns * formats.get(self.type).row_bytes(self.columns)

    @property
    def aligned_bytes(self) -> int:
        """With what follows it until the next one's."""
        return -(-self.nbytes // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class GGUFSlot(Slot):
    """`matrix` is the index of the tensor's matrix in `planned`."""

    planned: PlannedTensor
    matrix: int

    @property
    def label(self) -> str:
        return self.planned.name


@dataclass(frozen=True)
class GGUFPlan:
    """All tensors in file order. `expert_width` is the width written, `llama` what llama.cpp calls the model; `expected` as of
    `PlanSummary`. `context` tokens, a KV cache of type `kv` and a placement are what it is meant to run with."""

    llama: GGUF
    architecture: Architecture
    recipe: Recipe
    expert_width: int
    tensors: tuple[PlannedTensor, ...]
    notes: tuple[str, ...]
    expected: Expected | None = None
    context: int = CONTEXT
    kv: str = "f16"
    placement: Placement = Placement()

    @property
    def arch(self) -> str:
        """llama.cpp's architecture."""
        return self.llama.arch

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def slots(self) -> dict[str, list[GGUFSlot]]:
        """By the checkpoint's name of the tensor."""
        found: dict[str, list[GGUFSlot]] = {}
        for planned in self.tensors:
            for matrix, source in enumerate(planned.sources):
                slot = GGUFSlot(source, planned.role, formats.get(planned.type), planned.rows, planned.columns, planned, matrix)
                found.setdefault(source.name, []).append(slot)
        return found

    @property
    def bits_per_weight(self) -> float:
        """Bits in the file per weight of the checkpoint: padding counts as cost, not as weights."""
        return 8 * self.nbytes / sum(tensor.source_weights for tensor in self.tensors)

    def needs_of_weights(self, placement: Placement | None = None) -> Needs:
        """What its tensors take, placed so; by default as it is meant to run."""
        nothing = Needs((0, 0), (0.0, 0.0))
        return sum((needs_of(tensor, self.architecture, placement or self.placement) for tensor in self.tensors), nothing)

    def needs(self, placement: Placement | None = None, context: int | None = None) -> Needs:
        """What it takes with `context` tokens, placed so; by default as it is meant to run."""
        placed, tokens = placement or self.placement, self.context if context is None else context
        largest = max((tensor.nbytes for tensor in self.tensors if moved(tensor, placed)), default=0)
        beside = beside_weights(self.architecture, self.expert_width, tokens, self.kv, placed, largest)
        return self.needs_of_weights(placed) + beside

    def vram_bytes(self, context: int | None = None) -> int:
        """What it takes on a GPU whole."""
        return self.needs(Placement(), context).held[VRAM]

    def least_cpu_layers(self, vram: int) -> int | None:
        """The fewest layers whose experts must stay in RAM for the rest to fit into `vram` bytes; None where it does not with
        all of them there."""
        layers = range(self.architecture.num_layers + 1 if self.architecture.num_experts else 1)
        return next((each for each in layers if self.needs(Placement(cpu_layers=each)).held[VRAM] <= vram), None)


def cache_tokens(context: int) -> int:
    """Tokens that llama.cpp has room for, of a context of so many."""
    return -(-context // CACHE_STEP) * CACHE_STEP


def compute_bytes(model: Architecture, width: int, context: int) -> int:
    """llama.cpp's compute buffer for BATCH tokens of `context`, with flash attention and experts of `width`: the mask in float16,
    and in float32 what is there at once in the stage that needs most: logits, or the experts' outputs before and after their
    gates, or attention. Read off what stock llama.cpp reports, for it follows from how its allocator reuses memory."""
    rows = 4 * BATCH
    hidden = rows * model.hidden_size
    head = rows * model.vocab_size + 5 * hidden
    experts = model.experts_per_token * (2 * hidden + rows * width) + 3 * hidden // 2
    attention = 9 * rows * max(model.hidden_size, model.attention_size)
    return 2 * BATCH * context + max(head, experts, attention)


def beside_weights(model: Architecture, width: int, context: int, kv: str, placement: Placement, largest: int = 0) -> Needs:
    """What is needed besides weights: the KV cache in a type of KV_ITEM, of which a token reads CACHE_FILL, the compute buffer,
    and the allowances. Of experts in RAM llama.cpp uploads one tensor at a time where it computes a prompt: the `largest` of
    them has its place in VRAM too."""
    context = cache_tokens(context)
    cache = kv_cache_bytes(model, context, KV_ITEM[kv])
    held = cache + compute_bytes(model, width, context)
    if not placement.gpu:
        return Needs((0, held + SYSTEM_BYTES), (0.0, CACHE_FILL * cache))
    return Needs((held + RUNTIME_BYTES + largest, SYSTEM_BYTES), (CACHE_FILL * cache, 0.0))


def heads_too(role: Role, model: Architecture) -> bool:
    """Whether a tensor of that role is a tied embedding that the file has no copy of as head."""
    return role is Role.EMBEDDING and model.tie_word_embeddings and not model.family.gguf(model, 1).own_head


def moved(tensor: PlannedTensor, placement: Placement) -> bool:
    """Whether `--n-cpu-moe` keeps it in RAM."""
    return tensor.routed and (tensor.layer or 0) < placement.cpu_layers


def memories(tensor: PlannedTensor, model: Architecture, placement: Placement) -> tuple[int, ...]:
    """Where it lies; it is read from the first of these. A GPU has a copy of its own of an embedding that is the head too."""
    if not placement.gpu or moved(tensor, placement):
        return (RAM,)
    if tensor.role is Role.EMBEDDING:
        return (VRAM, RAM) if heads_too(tensor.role, model) else (RAM,)
    return (VRAM,)


def share(tensor: PlannedTensor, model: Architecture) -> float:
    """How much of it is read for a token: of routed experts those that it is routed to, of an embedding one row."""
    if tensor.routed:
        return model.experts_per_token / model.num_experts
    return 1 / tensor.rows if tensor.role is Role.EMBEDDING and not heads_too(tensor.role, model) else 1.0


def needs_of(tensor: PlannedTensor, model: Architecture, placement: Placement) -> Needs:
    """What a tensor takes."""
    there, nbytes, read = memories(tensor, model, placement), tensor.nbytes, share(tensor, model) * tensor.nbytes
    return Needs((nbytes * (VRAM in there), nbytes * (RAM in there)), (read * (there[0] == VRAM), read * (there[0] == RAM)))


def layout(model: Architecture, recipe: Recipe, width: int) -> tuple[PlannedTensor, ...]:
    """Every tensor of the file in llama.cpp's order, for experts (or a dense MLP) of `width`, with the recipe's types, or their
    fallbacks where rows ask for one."""
    found: dict[str, list[TensorSpec]] = {}
    for source in model.tensors().values():
        found.setdefault(llama_name(source), []).append(source)
    llama = model.family.gguf(model, width)
    tensors = [_planned(name, tuple(sources), sources[0].role, model, recipe, width, llama) for name, sources in found.items()]
    if model.tie_word_embeddings and llama.own_head:
        tensors.append(_planned(HEAD, (model.embedding,), Role.HEAD, model, recipe, width, llama))
    return tuple(tensors)


def _planned(
    name: str,
    sources: tuple[TensorSpec, ...],
    role: Role,
    model: Architecture,
    recipe: Recipe,
    width: int,
    llama: GGUF,
) -> PlannedTensor:
    first = sources[0]
    # A tied embedding that is the only one is multiplied with too, and gets the type that the head would have.
    decisive = Role.HEAD if heads_too(role, model) else role
    shape = first.shape
    if role in (Role.GATE, Role.UP, Role.DOWN):
        # llama.cpp takes the shared width to be expert width times count, so both are padded in step.
        padded = width * (model.num_shared_experts if first.shared else 1)
        shape = (shape[0], padded) if role is Role.DOWN else (padded, shape[1])
    if first.expert is not None:
        shape = (len(sources), *shape)
    asked = recipe.type_of(name, decisive, first.layer or 0, model)
    heads = {Role.ATTENTION_Q: model.num_heads, Role.ATTENTION_K: model.num_kv_heads} if llama.interleaved else {}
    return PlannedTensor(
        name=name,
        role=role,
        shape=shape,
        sources=sources,
        heads=heads.get(role, 0),
        type=fitting(asked, shape[-1], decisive is Role.HEAD and asked == recipe.mix.head),
        asked=asked,
    )


def plan(model: Architecture, recipe: Recipe, pad: str = "auto") -> GGUFPlan:
    """Choose types and the expert width, without reading weights.

    `pad` "auto" widens the experts with zeros to a multiple of 256 where the whole file becomes smaller than with
    llama-quantize's fallback types, so it is never larger than that one's; "never" keeps the width. Raises UnsupportedError
    for what no architecture of llama.cpp expresses, ConfigError for an override that matches nothing.
    """
    check_rope(model)
    width = model.intermediate_size
    tensors = layout(model, recipe, width)
    _check_overrides(tensors, recipe)
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
        stock = "where llama-quantize stops" if got == LAST_RESORT and has_no_fallback(asked) else "as llama-quantize does"
        notes.append(f"{asked} does not divide some rows: {got} there, {stock}.")
    llama, context = model.family.gguf(model, width), usual_context(model)
    return GGUFPlan(llama, model, recipe, width, tensors, tuple(notes), context=context)


def _check_overrides(tensors: Sequence[PlannedTensor], recipe: Recipe) -> None:
    """Raise ConfigError for an override that decides no tensor's type."""
    undecided = {tensor.name for tensor in tensors if tensor.role not in KEPT_ROLES}
    for pattern, kind in recipe.overrides:
        matching = {tensor.name for tensor in tensors if pattern.search(tensor.name)}
        if not matching & undecided:
            why = (
                "has no effect, since routers and norms stay F32 and the first rule that matches a tensor counts; drop it"
                if matching
                else "matches no tensor; --dry-run lists their names"
            )
            raise ConfigError(f"--tensor-type '{pattern.pattern}={kind}': {why}")
        undecided -= matching


def check_rope(model: Architecture) -> None:
    """Raise UnsupportedError for a rope scaling that these architectures of llama.cpp do not compute."""
    scaling = model.rope_scaling
    if scaling is None or scaling.kind == "linear":
        return
    if scaling.kind == "dynamic":
        raise UnsupportedError(
            "rope_scaling of type 'dynamic': llama.cpp has no dynamic NTK; remove it from config.json to use the native context, "
            "or use --format onnx or bnb"
        )
    odd = [
        f"{key} {value:g}"
        for key, value, fixed in (("beta_fast", scaling.beta_fast, 32), ("beta_slow", scaling.beta_slow, 1))
        if value != fixed
    ]
    odd += [] if scaling.truncate else ["truncate false"]
    if odd:
        raise UnsupportedError(
            f"rope_scaling of type 'yarn' with {', '.join(odd)}: llama.cpp computes these models with beta_fast 32, beta_slow 1 "
            "and whole dimensions only; use --format onnx or bnb"
        )


def _saved(plain: tuple[PlannedTensor, ...], padded: tuple[PlannedTensor, ...]) -> int:
    """Bytes that padding saves."""
    return sum(tensor.nbytes for tensor in plain) - sum(tensor.nbytes for tensor in padded)
