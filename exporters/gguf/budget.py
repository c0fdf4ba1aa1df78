"""Which type for which tensor of a GGUF file, so that it loses least within a budget: from sensitivity to a plan.

    Sensitivity (a place's loss by type) ──┐
    layout (tensors, their bytes by type) ─┴─► groups ─► xent_quant.planning ─► types ─► Recipe ─► plan ─► the exporter, as ever

Everything but routers and norms, which stay F32, has one of `sensitivities.TYPES`, whose blocks divide its rows; where experts
have a width that needs padding for most types, both the padded and the plain one are planned, and the better is taken.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from exporters.gguf.plan import KV_ITEM, SUPER_BLOCK, GGUFPlan, PlannedTensor, beside_weights, check_rope, layout, plan
from exporters.interface import CONTEXT, Alternative, Expected
from xent_quant import formats
from xent_quant.checkpoint.architecture import Architecture
from xent_quant.errors import ConfigError, ExportError
from xent_quant.planning import Choice, Chosen, Group, Infeasible, least_bytes, least_loss
from xent_quant.recipes import planned_recipe, recipe
from xent_quant.sensitivities import EMBEDDING, HEAD, TYPES, Sensitivity, place
from xent_quant.tensors import KEPT_ROLES, Role
from xent_quant.units import human_bytes

NEIGHBOURS = {"an eighth smaller": 7 / 8, "an eighth larger": 9 / 8}
"""Budgets that are planned for comparison, as shares of the plan's."""
NAMED = ("Q8_0", "XENT6", "Q6_K", "XENT5", "Q5_K_M", "XENT4", "Q4_K_M", "IQ4_XS", "XENT3", "Q3_K_M", "XENT2", "Q2_K")
"""Mixes that are shown for comparison."""


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What a plan is for, by one of three: `size` bytes of file, an expected loss of at most `max_kl` nats a token, or a GPU with
    `fit` bytes, which weights (but the embedding, which stays in RAM), the KV cache of `context` tokens in type `kv`, and buffers
    share. `name` is the plan's, in files' names."""

    name: str
    size: int | None = None
    max_kl: float | None = None
    fit: int | None = None
    context: int = CONTEXT
    kv: str = "f16"

    @property
    def limit(self) -> int | None:
        """Bytes that bound the plan."""
        return self.fit if self.fit is not None else self.size

    def check(self, model: Architecture) -> None:
        """Raise ConfigError for what llama.cpp would refuse."""
        if self.context > model.max_position_embeddings:
            raise ConfigError(f"--context {self.context}: the model's is {model.max_position_embeddings}")
        if KV_ITEM[self.kv] < 2 and model.head_dim % 32:
            raise ConfigError(
                f"--kv {self.kv}: llama.cpp takes that for heads of a multiple of 32 dimensions, and this model's have "
                f"{model.head_dim}; use --kv f16"
            )


def places(tensor: PlannedTensor, model: Architecture) -> tuple[str, ...]:
    """Where in the model a tensor of the file is; a tied embedding that has no copy as head is in both places."""
    if tensor.role is Role.EMBEDDING and model.tie_word_embeddings and not model.family.gguf(model, 1).own_head:
        return EMBEDDING, HEAD
    return (place(tensor.sources[0], tensor.role),)


@dataclass(frozen=True)
class Layout:
    """The tensors of a file with experts of `width`, in groups that have one type, for a method of `METHODS`: what is planned."""

    model: Architecture
    width: int
    sensitivity: Sensitivity
    method: str

    @cached_property
    def tensors(self) -> tuple[PlannedTensor, ...]:
        return layout(self.model, recipe(type="F32"), self.width)

    @cached_property
    def together(self) -> dict[tuple[str, ...], list[PlannedTensor]]:
        """By place the tensors that are quantised."""
        found: dict[tuple[str, ...], list[PlannedTensor]] = {}
        for tensor in self.tensors:
            if tensor.role not in KEPT_ROLES:
                found.setdefault(places(tensor, self.model), []).append(tensor)
        return found

    def fixed(self, goal: Goal, header: int) -> int:
        """Bytes that count and that no type changes: of the file with `header` bytes that are no tensor's, or on the GPU."""
        kept = sum(tensor.aligned_bytes for tensor in self.tensors if tensor.role in KEPT_ROLES)
        return kept + (header if goal.fit is None else beside_weights(self.model, self.width, goal.context, goal.kv))

    def groups(self, goal: Goal) -> list[Group]:
        """One for each place, in the order of `together`."""
        return [Group(" ".join(where), tuple(self._choices(where, some, goal))) for where, some in self.together.items()]

    def _choices(self, where: tuple[str, ...], tensors: Sequence[PlannedTensor], goal: Goal) -> Iterator[Choice]:
        counts = goal.fit is None or where != (EMBEDDING,)
        for kind in TYPES:
            if all(tensor.columns % formats.get(kind).block_size == 0 for tensor in tensors):
                nbytes = sum(replace(tensor, type=kind).aligned_bytes for tensor in tensors)
                yield Choice(kind, nbytes if counts else 0, self.loss(where, kind))

    def loss(self, where: Sequence[str], kind: str) -> float:
        """Expected KL divergence of a type at places; by a method without statistics that of a search with them."""
        return sum(self.sensitivity.loss(each, kind, gptq=self.method == "gptq") for each in where)

    def plan(self, chosen: Chosen, goal: Goal) -> GGUFPlan:
        """As any other recipe's."""
        by_place = zip(self.together.values(), chosen.choices, strict=True)
        chosen_recipe = planned_recipe(goal.name, {tensor.name: choice.type for some, choice in by_place for tensor in some})
        tensors = layout(self.model, chosen_recipe, self.width)
        llama = self.model.family.gguf(self.model, self.width)
        return GGUFPlan(llama, self.model, chosen_recipe, self.width, tensors, (), context=goal.context, kv=goal.kv)


def layouts(model: Architecture, sensitivity: Sensitivity, *, method: str, pad: str) -> list[Layout]:
    """With experts of the model's width and, unless `pad` is "never", of padded ones."""
    width = model.intermediate_size
    padded = -(-width // SUPER_BLOCK) * SUPER_BLOCK
    widths = dict.fromkeys([width, padded] if pad == "auto" else [width])
    return [Layout(model, each, sensitivity, method) for each in widths]


def planned(
    model: Architecture,
    sensitivity: Sensitivity,
    goal: Goal,
    *,
    header: int = 0,
    method: str = "gptq",
    pad: str = "auto",
    compare: bool = True,
) -> GGUFPlan:
    """The plan of least expected loss within the goal's bytes, or of fewest bytes within its loss; `header` bytes of the file are
    no tensor's. With `compare` it says what else there would be.

    Raises ExportError that says what would be possible where the goal is not, UnsupportedError as `plan` does, and what
    `Goal.check` raises.
    """
    check_rope(model)
    goal.check(model)
    candidates = layouts(model, sensitivity, method=method, pad=pad)
    best, chosen = _smallest(candidates, goal, header) if goal.limit is None else _best(candidates, goal, header)
    made = best.plan(chosen, goal)
    nbytes = _file_bytes(made, header)
    beside: list[Alternative] = []
    if compare:
        beside = [*_neighbours(candidates, goal, header, nbytes), *named_mixes(best, header, pad)]
        beside.sort(key=lambda row: -row.nbytes)
    expected = Expected(chosen.loss, nbytes, sensitivity.source, tuple(beside))
    notes = [
        f"Planned for {goal.name}: expected KL divergence {chosen.loss:.2g} nats per token; sensitivity: {sensitivity.source}."
    ]
    if method == "rtn":
        notes.append("That is expected of --method imatrix; what --method rtn loses was not measured.")
    if best.width != model.intermediate_size:
        notes.append(f"Expert width {model.intermediate_size} padded with zeros to {best.width}: the same function.")
    if goal.fit is not None:
        rest = beside_weights(model, best.width, goal.context, goal.kv)
        total = best.fixed(goal, header) + chosen.nbytes
        notes.append(
            f"{human_bytes(total)} of {human_bytes(goal.fit)} of VRAM: weights {human_bytes(total - rest)}; KV cache of "
            f"{goal.context:,} tokens in {goal.kv}, llama.cpp's buffers and the driver's {human_bytes(rest)}."
        )
    return replace(made, notes=tuple(notes), expected=expected)


def _file_bytes(plan: GGUFPlan, header: int) -> int:
    return header + sum(tensor.aligned_bytes for tensor in plan.tensors)


def _best(candidates: Sequence[Layout], goal: Goal, header: int, share: float = 1.0) -> tuple[Layout, Chosen]:
    """Of all layouts the plan of least loss within a share of the goal's bytes; of equal ones the smaller. Raises ExportError."""
    assert goal.limit is not None
    limit = int(goal.limit * share)
    found: list[tuple[float, int, Layout, Chosen]] = []
    least: list[int] = []
    for each in candidates:
        fixed = each.fixed(goal, header)
        try:
            chosen = least_loss(each.groups(goal), limit - fixed)
            found.append((chosen.loss, fixed + chosen.nbytes, each, chosen))
        except Infeasible as none:
            least.append(fixed + int(none.least))
    if not found:
        option, what = ("fit", "needs") if goal.fit is not None else ("size", "takes")
        raise ExportError(
            f"--{option} {human_bytes(limit)}: too small by {human_bytes(min(least) - limit)}; the smallest plan of this model "
            f"{what} {human_bytes(min(least))} ({min(least)} bytes)"
        )
    return min(found, key=lambda each: each[:2])[2:]


def _smallest(candidates: Sequence[Layout], goal: Goal, header: int) -> tuple[Layout, Chosen]:
    """Of all layouts the plan of fewest bytes within the goal's loss. Raises ExportError."""
    assert goal.max_kl is not None
    found: list[tuple[int, Layout, Chosen]] = []
    least: list[float] = []
    for each in candidates:
        try:
            chosen = least_bytes(each.groups(goal), goal.max_kl)
            found.append((each.fixed(goal, header) + chosen.nbytes, each, chosen))
        except Infeasible as none:
            least.append(none.least)
    if not found:
        raise ExportError(
            f"--max-kl {goal.max_kl:g}: the least that is expected with types of up to 8 bits is {min(least):.2g}; give as much "
            "or more, or --bits 16"
        )
    return min(found, key=lambda each: each[0])[1:]


def _neighbours(candidates: Sequence[Layout], goal: Goal, header: int, nbytes: int) -> Iterator[Alternative]:
    """Plans for other shares of the goal's bytes, or of the `nbytes` that a plan for a loss has, where they differ from it."""
    bounded = goal if goal.limit is not None else replace(goal, size=nbytes, max_kl=None)
    for title, share in NEIGHBOURS.items():
        try:
            each, chosen = _best(candidates, bounded, header, share)
        except ExportError:  # there is no smaller one
            continue
        other = _file_bytes(each.plan(chosen, goal), header)
        if other != nbytes:
            yield Alternative(title, other, chosen.loss)


def named_mixes(of: Layout, header: int, pad: str = "auto") -> Iterator[Alternative]:
    """The mixes by name whose types are all among those that are planned with, by the sensitivity and the method of a layout."""
    for mix in NAMED:
        named = plan(of.model, recipe(type=mix, imatrix=of.method != "rtn"), pad=pad)
        types = {places(tensor, of.model): tensor.type for tensor in named.tensors if tensor.role not in KEPT_ROLES}
        if all(kind in TYPES for kind in types.values()):
            yield Alternative(mix, _file_bytes(named, header), sum(of.loss(where, kind) for where, kind in types.items()))
