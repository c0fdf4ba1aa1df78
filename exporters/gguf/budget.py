"""Which type for which tensor of a GGUF file, so that it loses least within a budget: from sensitivity to a plan.

    Sensitivity (a place's loss by type) ──┐
    layout (tensors, their bytes by type) ─┼─► problems ─► xent_quant.planning ─► types ─► Recipe ─► plan ─► the exporter
    machine (memories, bandwidths) ────────┘

Everything but routers and norms, which stay F32, has one of `sensitivities.TYPES`, whose blocks divide its rows, or F16 where
none does; where experts have a width that needs padding for most types, both the padded and the plain one are planned, and the
better is taken. For a GPU beside RAM there is a problem for each number of layers whose experts stay in RAM, too.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import floor, inf

from exporters import budgets
from exporters.budgets import NEIGHBOURS, corners, too_small, unreachable
from exporters.gguf.plan import (
    KV_ITEM,
    RAM,
    SUPER_BLOCK,
    VRAM,
    GGUFPlan,
    Needs,
    Placement,
    PlannedTensor,
    beside_weights,
    check_rope,
    heads_too,
    layout,
    memories,
    needs_of,
    plan,
    share,
)
from exporters.interface import Alternative, AtWork, Expected
from xent_quant import formats
from xent_quant.checkpoint.architecture import Architecture
from xent_quant.errors import ConfigError, ExportError
from xent_quant.machine import Machine
from xent_quant.planning import (
    Choice,
    Chosen,
    Group,
    Infeasible,
    Part,
    Problem,
    frontier,
    least_bytes,
    least_loss,
    least_product,
)
from xent_quant.recipes import LAST_RESORT, planned_recipe, recipe
from xent_quant.sensitivities import EMBEDDING, HEAD, TYPES, Sensitivity, place
from xent_quant.tensors import KEPT_ROLES
from xent_quant.units import human_bytes

PACES = (2.0, 1.4, 0.7, 0.5)
"""Speeds that are planned for comparison, as shares of the plan's."""
NAMED = ("Q8_0", "XENT6", "Q6_K", "XENT5", "Q5_K_M", "XENT4", "Q4_K_M", "IQ4_XS", "XENT3", "Q3_K_M", "XENT2", "Q2_K")
"""Mixes that are shown for comparison."""

Place = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Goal(budgets.Goal):
    """In place of `vram` there is a `machine`, whose memories hold the weights, the KV cache in type `kv`, and buffers; `speed`
    is the least number of tokens per second that its bandwidths must allow."""

    machine: Machine | None = None
    speed: float | None = None
    kv: str = "f16"

    def check(self, model: Architecture) -> None:
        """Raise ConfigError for what llama.cpp would refuse."""
        super().check(model)
        if KV_ITEM[self.kv] < 2 and model.head_dim % 32:
            raise ConfigError(
                f"--kv {self.kv}: llama.cpp takes that for heads of a multiple of 32 dimensions, and this model's have "
                f"{model.head_dim}; use --kv f16"
            )


def places(tensor: PlannedTensor, model: Architecture) -> Place:
    """Where in the model a tensor of the file is; a tied embedding that has no copy as head is in both places."""
    return (EMBEDDING, HEAD) if heads_too(tensor.role, model) else (place(tensor.sources[0], tensor.role),)


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
    def together(self) -> dict[Place, list[PlannedTensor]]:
        """By place the tensors that are quantised."""
        found: dict[Place, list[PlannedTensor]] = {}
        for tensor in self.tensors:
            if tensor.role not in KEPT_ROLES:
                found.setdefault(places(tensor, self.model), []).append(tensor)
        return found

    @cached_property
    def groups(self) -> dict[Place, Group]:
        """By place its choices."""
        return {where: Group(" ".join(where), tuple(self._choices(where, some))) for where, some in self.together.items()}

    def _choices(self, where: Place, tensors: Sequence[PlannedTensor]) -> Iterator[Choice]:
        some = [kind for kind in TYPES if all(each.columns % formats.get(kind).block_size == 0 for each in tensors)]
        for kind in some or [LAST_RESORT]:
            nbytes = sum(replace(tensor, type=kind).aligned_bytes for tensor in tensors)
            yield Choice(kind, nbytes, self.loss(where, kind) if some else 0.0)

    @cached_property
    def kept(self) -> list[PlannedTensor]:
        """Tensors that no type is chosen for."""
        return [tensor for tensor in self.tensors if tensor.role in KEPT_ROLES]

    @cached_property
    def largest(self) -> int:
        """Bytes of the largest tensor of routed experts that there may be."""
        return max((replace(tensor, type=TYPES[0]).nbytes for tensor in self.tensors if tensor.routed), default=0)

    def beside(self, goal: Goal, placement: Placement) -> Needs:
        """What is needed at work whatever the types."""
        largest = self.largest if placement.cpu_layers else 0
        fixed = beside_weights(self.model, self.width, goal.context, goal.kv, placement, largest)
        return sum((needs_of(tensor, self.model, placement) for tensor in self.kept), fixed)

    def loss(self, where: Place, kind: str) -> float:
        """Expected KL divergence of a type at places; by a method without statistics that of a search with them."""
        return sum(self.sensitivity.loss(each, kind, gptq=self.method == "gptq") for each in where)


def layouts(model: Architecture, sensitivity: Sensitivity, *, method: str, pad: str) -> list[Layout]:
    """With experts of the model's width and, unless `pad` is "never", of padded ones."""
    width = model.intermediate_size
    padded = -(-width // SUPER_BLOCK) * SUPER_BLOCK
    widths = dict.fromkeys([width, padded] if pad == "auto" else [width])
    return [Layout(model, each, sensitivity, method) for each in widths]


@dataclass(frozen=True)
class Candidate:
    """A problem of the planner: the places of a layout, in the `order` of the problem's groups, placed so."""

    layout: Layout
    placement: Placement
    order: tuple[Place, ...]
    problem: Problem

    def plan(self, goal: Goal, chosen: Chosen) -> GGUFPlan:
        """As any other recipe's."""
        of = self.layout
        by_place = zip(self.order, chosen.choices, strict=True)
        chosen_types = [(tensor, choice.type) for where, choice in by_place for tensor in of.together[where]]
        types = {tensor.name: kind for tensor, kind in chosen_types}
        chosen_recipe = planned_recipe(goal.name, types, {tensor.name: tensor.n_weights for tensor, _ in chosen_types})
        tensors = layout(of.model, chosen_recipe, of.width)
        llama = of.model.family.gguf(of.model, of.width)
        return GGUFPlan(
            llama, of.model, chosen_recipe, of.width, tensors, (), context=goal.context, kv=goal.kv, placement=self.placement
        )


def _file(of: Layout, header: int, limit: float) -> Candidate:
    """Of a file of at most `limit` bytes, `header` of which are no tensor's."""
    kept = sum(tensor.aligned_bytes for tensor in of.kept)
    return Candidate(of, Placement(), tuple(of.groups), Problem((Part(tuple(of.groups.values())),), (limit - header - kept,)))


def _placed(of: Layout, goal: Goal, machine: Machine, placement: Placement) -> Candidate:
    """At work on a machine, whose memories limit it, and the goal's speed."""
    together: dict[tuple[tuple[int, ...], float], list[Place]] = {}
    for where, (tensor, *_) in of.together.items():
        key = memories(tensor, of.model, placement), share(tensor, of.model)
        together.setdefault(key, []).append(where)
    parts = [
        Part(tuple(of.groups[where] for where in some), there, read / machine.bandwidths[there[0]])
        for (there, read), some in together.items()
    ]
    beside = of.beside(goal, placement)
    left = [inf if limit is None else limit - held for limit, held in zip(machine.memory, beside.held, strict=True)]
    problem = Problem(tuple(parts), tuple(left), 1 / goal.speed if goal.speed else inf, machine.seconds(beside.read))
    return Candidate(of, placement, tuple(where for some in together.values() for where in some), problem)


def _candidates(of: Sequence[Layout], goal: Goal, header: int) -> list[Candidate]:
    """All that a goal with a limit on bytes allows."""
    machine = goal.machine
    if machine is None:
        assert goal.size is not None
        return [_file(each, header, goal.size) for each in of]
    return [_placed(each, goal, machine, placement) for each in of for placement in _placements(each.model, machine)]


def _placements(model: Architecture, machine: Machine) -> list[Placement]:
    """What there is on such a machine: where only VRAM is limited, all is there."""
    if machine.vram is None:
        return [Placement(gpu=False)]
    layers = model.num_layers if model.num_experts and machine.ram is not None else 0
    return [Placement(cpu_layers=number) for number in range(layers + 1)]


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
    """The plan of least expected loss within the goal's limits, or of fewest bytes within its loss; for a machine with RAM and no
    speed that is wanted, of least loss · time. `header` bytes of the file are no tensor's. With `compare` it says what else
    there would be.

    Raises ExportError that says what would be possible where the goal is not, UnsupportedError as `plan` does, and what
    `Goal.check` raises.
    """
    check_rope(model)
    goal.check(model)
    of = layouts(model, sensitivity, method=method, pad=pad)
    candidate, chosen = _smallest(of, goal, header) if goal.max_kl is not None else _best(of, goal, header)
    made = candidate.plan(goal, chosen)
    nbytes = _file_bytes(made, header)
    beside: list[Alternative] = []
    if compare:
        beside = [*_neighbours(of, goal, header, made, nbytes), *named_mixes(candidate.layout, header, pad, goal)]
        beside.sort(key=lambda row: -row.nbytes)
    notes = [*budgets.notes(goal.name, chosen.loss, sensitivity.source, method)]
    if made.expert_width != model.intermediate_size:
        notes.append(f"Expert width {model.intermediate_size} padded with zeros to {made.expert_width}: the same function.")
    at_work = None
    if goal.machine is not None:
        notes += _of_machine(made, goal.machine)
        needs = made.needs()
        at_work = AtWork(*needs.held, made.placement.cpu_layers, 1 / goal.machine.seconds(needs.read))
    best = _frontier(of, header) if compare else ()
    expected = Expected(chosen.loss, nbytes, sensitivity.source, tuple(beside), at_work, best)
    return replace(made, notes=tuple(notes), expected=expected)


def _of_machine(made: GGUFPlan, machine: Machine) -> Iterator[str]:
    """What is to be said of its memories and its speed."""
    needs, of_weights = made.needs(), made.needs_of_weights()
    rest = [human_bytes(held - own) for held, own in zip(needs.held, of_weights.held, strict=True)]
    cache = f"KV cache of {made.context:,} tokens in {made.kv}, llama.cpp's buffers"
    if machine.vram is not None:
        yield (
            f"{human_bytes(needs.held[VRAM])} of {human_bytes(machine.vram)} of VRAM: "
            f"weights {human_bytes(of_weights.held[VRAM])}; {cache} and the driver's {rest[VRAM]}."
        )
    if machine.ram is not None:
        layers = made.placement.cpu_layers
        what, beside = "the embedding", "the system and llama.cpp"
        if layers:
            what = f"the embedding and the experts of the first {layers} layers"
        elif not made.placement.gpu:
            what, beside = "weights", f"{cache} and the system"
        yield (
            f"{human_bytes(needs.held[RAM])} of {human_bytes(machine.ram)} of RAM: {what} {human_bytes(of_weights.held[RAM])}; "
            f"{beside} {rest[RAM]}."
        )
    read = [
        f"{human_bytes(nbytes)} of {name} with {bandwidth / 1e9:g} GB/s"
        for nbytes, name, bandwidth in zip(needs.read, ("VRAM", "RAM"), machine.bandwidths, strict=True)
        if nbytes > 2**20
    ]
    yield (
        f"At most {1 / machine.seconds(needs.read):.1f} tokens per second, by bandwidth alone: each reads {' and '.join(read)}, "
        "half of the cache being full. How much of that is reached was not measured."
    )


def _frontier(of: Sequence[Layout], header: int) -> tuple[tuple[int, float], ...]:
    """Bytes of the file and expected loss of the best plans."""
    found: list[tuple[int, float]] = []
    for each in of:
        kept = header + sum(tensor.aligned_bytes for tensor in each.kept)
        found += [(kept + int(nbytes), float(loss)) for nbytes, loss in frontier(tuple(each.groups.values()))]
    return corners(found)


def _file_bytes(plan: GGUFPlan, header: int) -> int:
    return header + sum(tensor.aligned_bytes for tensor in plan.tensors)


def _best(of: Sequence[Layout], goal: Goal, header: int) -> tuple[Candidate, Chosen]:
    """Of all layouts and placements the best plan within the goal's limits. Raises ExportError."""
    candidates = _candidates(of, goal, header)
    problems = [each.problem for each in candidates]
    by_product = goal.machine is not None and goal.machine.ram is not None and not goal.speed
    chosen = least_product(problems) if by_product else least_loss(problems)
    if chosen is None:
        raise _too_little(candidates, goal, header)
    return candidates[chosen.problem], chosen


def _too_little(candidates: Sequence[Candidate], goal: Goal, header: int) -> ExportError:
    """Which limit is too narrow, by how much, and what would do."""
    machine, left = goal.machine, [(each, *each.problem.least) for each in candidates]
    if machine is None:
        assert goal.size is not None
        return too_small("size", goal.size, min(nbytes[0] - each.problem.memory[0] for each, nbytes, _ in left), "takes")
    alone = machine.vram is None or machine.ram is None
    experts = bool(candidates[0].layout.model.num_experts)
    remedy = "; with --ram experts may stay in RAM" if machine.ram is None and experts else ""
    if not alone and not experts:
        remedy = "; without experts all of it lies on the GPU: give --ram alone, or less --context"
    for option, limit, memory, what in (
        ("fit", machine.vram, VRAM, "needs" if alone or not experts else "with all experts in RAM needs"),
        ("ram", machine.ram, RAM, "needs" if alone else "beside that VRAM needs"),
    ):
        over = [nbytes[memory] - each.problem.memory[memory] for each, nbytes, _ in left]
        if limit is not None and min(over) > 0:
            return too_small(option, limit, min(over), what, remedy)
        left = [each for each, much in zip(left, over, strict=True) if much <= 0]
    fastest = 1 / min(seconds for *_, seconds in left)
    return ExportError(
        f"--speed {goal.speed:g}: bandwidth allows the smallest plan of this model {floor(10 * fastest) / 10} tokens per second; "
        "give less, or a machine with more VRAM or faster memory"
    )


def _smallest(of: Sequence[Layout], goal: Goal, header: int) -> tuple[Candidate, Chosen]:
    """Of all layouts the plan of fewest bytes within the goal's loss. Raises ExportError."""
    assert goal.max_kl is not None
    found: list[tuple[int, Candidate, Chosen]] = []
    least: list[float] = []
    for each in of:
        candidate = _file(each, header, inf)
        try:
            chosen = least_bytes(tuple(each.groups.values()), goal.max_kl)
            found.append((_file_bytes(candidate.plan(goal, chosen), header), candidate, chosen))
        except Infeasible as none:
            least.append(none.least)
    if not found:
        raise unreachable(goal.max_kl, min(least), "--type BF16")
    return min(found, key=lambda each: each[0])[1:]


def _neighbours(of: Sequence[Layout], goal: Goal, header: int, made: GGUFPlan, nbytes: int) -> Iterator[Alternative]:
    """Plans for other speeds where RAM is limited, else for other shares of the goal's bytes, or of the `nbytes` that a plan
    for a loss has; where they differ from it and from each other."""
    machine = goal.machine
    if machine is not None and machine.ram is not None:
        reached = 1 / machine.seconds(made.needs().read)
        speeds = [float(f"{reached * pace:.2g}") for pace in PACES]
        others = {f"--speed {speed:g}": replace(goal, speed=speed) for speed in speeds}
    elif machine is not None and machine.vram is not None:
        vram = machine.vram
        others = {title: replace(goal, machine=replace(machine, vram=int(vram * share))) for title, share in NEIGHBOURS.items()}
    else:
        size = nbytes if goal.size is None else goal.size
        others = {title: replace(goal, size=int(size * share), max_kl=None) for title, share in NEIGHBOURS.items()}
    seen = {nbytes}
    for title, other in others.items():
        try:
            candidate, chosen = _best(of, other, header)
        except ExportError:  # there is none
            continue
        planned = candidate.plan(other, chosen)
        if (size := _file_bytes(planned, header)) not in seen:
            seen.add(size)
            speed = 1 / machine.seconds(planned.needs().read) if machine else None
            yield Alternative(title, size, chosen.loss, speed)


def named_mixes(of: Layout, header: int, pad: str = "auto", goal: Goal | None = None) -> Iterator[Alternative]:
    """The mixes by name whose types are all among those that are planned with, by the sensitivity and the method of a layout;
    and how fast they are on the goal's machine, with as many experts in its VRAM as fit."""
    for mix in NAMED:
        named = plan(of.model, recipe(type=mix, imatrix=of.method != "rtn"), pad=pad)
        types = {places(tensor, of.model): tensor.type for tensor in named.tensors if tensor.role not in KEPT_ROLES}
        if all(kind in TYPES for kind in types.values()):
            loss = sum(of.loss(where, kind) for where, kind in types.items())
            machine = goal.machine if goal else None
            speed = _speed(replace(named, context=goal.context, kv=goal.kv), machine) if goal and machine else None
            yield Alternative(mix, _file_bytes(named, header), loss, speed)


def _speed(made: GGUFPlan, machine: Machine) -> float | None:
    """Tokens per second that bandwidth allows where it lies best; None where a machine has no room for it."""
    for placement in _placements(made.architecture, machine):
        needs = made.needs(placement)
        if all(limit is None or held <= limit for held, limit in zip(needs.held, machine.memory, strict=True)):
            return 1 / machine.seconds(needs.read)
    return None
