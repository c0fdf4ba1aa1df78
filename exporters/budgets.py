"""Plans for a budget of bytes, whatever the format: what is common to all, and all of it where a format has few kinds of weights.

    Sensitivity (a place's loss by type) ──┐
    Layout (groups of weights, their bytes and losses by kind) ─► best ─► xent_quant.planning ─► a kind for each group

GGUF's, of many types and several memories, is in `exporters.gguf.budget`.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf

from exporters.interface import CONTEXT, Alternative, Expected
from xent_quant.checkpoint.architecture import Architecture
from xent_quant.errors import ConfigError, ExportError
from xent_quant.planning import Chosen, Group, Infeasible, Part, Problem, frontier, least_bytes, least_loss
from xent_quant.units import human_bytes

NEIGHBOURS = {"an eighth smaller": 7 / 8, "an eighth larger": 9 / 8}
"""Budgets that are planned for comparison, as shares of the plan's."""
CORNERS = 60
"""Of the curve of all sizes, about."""
ROUNDING = 1e-12
"""Of the largest loss."""
TEXT_BYTES = 8192
"""By how much texts beside an export grow at most with what a plan says and what the calibration text is called."""


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What a plan is for, by one of three: `size` bytes of files, an expected loss of at most `max_kl` nats a token, or `vram`
    bytes of a GPU that hold the weights, the KV cache of `context` tokens and buffers. `name` is what the plan is called."""

    name: str
    size: int | None = None
    max_kl: float | None = None
    vram: int | None = None
    context: int = CONTEXT

    def check(self, model: Architecture) -> None:
        """Raise ConfigError for what no runtime could do."""
        if self.context > model.max_position_embeddings:
            raise ConfigError(f"--context {self.context}: the model's is {model.max_position_embeddings}")


@dataclass(frozen=True)
class Layout:
    """`groups` of weights that have one kind each, by label; `kept` bytes of the files that are none of theirs; `beside`, in
    bytes, what a GPU holds besides the files (KV cache and buffers) less what it does not hold of them. `mixes` by name are what
    there would be without a plan: a kind for each group."""

    groups: Mapping[str, Group]
    kept: int
    beside: int
    mixes: Mapping[str, Mapping[str, str]]

    def nbytes(self, chosen: Chosen) -> int:
        """Of the files."""
        return self.kept + chosen.nbytes

    def _limit(self, goal: Goal) -> float:
        """Bytes of the files, at most."""
        return inf if goal.max_kl is not None else goal.size if goal.size is not None else (goal.vram or 0) - self.beside

    def best(self, goal: Goal) -> Chosen:
        """The kinds of least loss within the goal's bytes, or of fewest bytes within its loss. Raises ExportError that says what
        would be possible."""
        groups = tuple(self.groups.values())
        if goal.max_kl is not None:
            try:
                return least_bytes(groups, goal.max_kl)
            except Infeasible as none:
                raise unreachable(goal.max_kl, none.least, "--bits 16") from None
        problem = Problem((Part(groups),), (self._limit(goal) - self.kept,))
        chosen = least_loss([problem])
        if chosen is None:
            option, asked = ("size", goal.size) if goal.size is not None else ("fit", goal.vram)
            assert asked is not None
            raise too_small(option, asked, problem.least[0][0] - problem.memory[0], "takes" if option == "size" else "needs")
        return chosen

    def expected(self, goal: Goal, chosen: Chosen, source: str) -> Expected:
        """What is expected of it, and what else there would be."""
        nbytes = self.nbytes(chosen)
        beside = [*self._neighbours(goal, nbytes), *self._by_name()]
        beside.sort(key=lambda row: -row.nbytes)
        curve = corners((self.kept + int(size), float(loss)) for size, loss in frontier(tuple(self.groups.values())))
        return Expected(chosen.loss, nbytes, source, tuple(beside), None, curve)

    def _neighbours(self, goal: Goal, nbytes: int) -> Iterator[Alternative]:
        """Plans of other sizes, where they differ from the plan's `nbytes` and from each other."""
        limit = self._limit(goal)
        seen = {nbytes}
        for title, share in NEIGHBOURS.items():
            try:
                chosen = self.best(Goal(name=title, size=int(share * (nbytes if limit == inf else limit))))
            except ExportError:  # there is none
                continue
            if (size := self.nbytes(chosen)) not in seen:
                seen.add(size)
                yield Alternative(title, size, chosen.loss)

    def _by_name(self) -> Iterator[Alternative]:
        for name, kinds in self.mixes.items():
            of = {label: {choice.type: choice for choice in group.choices} for label, group in self.groups.items()}
            taken = Chosen(tuple(of[label][kind] for label, kind in kinds.items()))
            yield Alternative(name, self.nbytes(taken), taken.loss)


def corners(found: Iterable[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    """Of bytes and expected loss those that no others beat, fewest bytes first; some CORNERS of them, the smallest and the best
    among them. What is left of a sum by rounding is no loss."""
    every = sorted(found)
    least = ROUNDING * max(loss for _, loss in every)
    best: list[tuple[int, float]] = []
    for corner in ((nbytes, loss if loss > least else 0.0) for nbytes, loss in every):
        if not best or corner[1] < best[-1][1]:
            best.append(corner)
    return tuple(best[index] for index in sorted({round(part * (len(best) - 1) / CORNERS) for part in range(CORNERS + 1)}))


def notes(name: str, loss: float, source: str, method: str = "") -> Sequence[str]:
    """What is to be said of a plan; by a `method` of `METHODS`, or one that the plan knows of."""
    said = [f"Planned for {name}: expected KL divergence {loss:.2g} nats per token; sensitivity: {source}."]
    if method == "rtn":
        said.append("That is expected of --method imatrix; what --method rtn loses was not measured.")
    return said


def unreachable(max_kl: float, least: float, remedy: str) -> ExportError:
    """No kinds lose as little as `max_kl`; `least` is what those of most bits lose, `remedy` asks for floats."""
    return ExportError(
        f"--max-kl {max_kl:g}: the least that is expected with types of up to 8 bits is {least:.2g}; give as much or more, "
        f"or {remedy}"
    )


def too_small(option: str, limit: int, over: float, what: str, remedy: str = "") -> ExportError:
    """A budget that the smallest plan is `over` by."""
    needed = int(limit + over)
    return ExportError(
        f"--{option} {human_bytes(limit)}: too small by {human_bytes(over)}; the smallest plan of this model {what} "
        f"{human_bytes(needed)} ({needed} bytes){remedy}"
    )
