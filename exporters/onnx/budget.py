"""Which operators of an ONNX graph have 4 bits and which 8, so that it loses least within a budget.

What has one number of bits is an operator: a layer's q, k and v are one, and so are all its routed experts, up and down. A budget
can therefore be met to within the experts of one layer.
"""

from collections.abc import Sequence
from dataclasses import replace

from exporters import budgets
from exporters.budgets import Goal, Layout
from exporters.interface import kv_cache_bytes
from exporters.onnx.plan import ALIGNMENT, RUNTIME_BYTES, ONNXPlan, Settings, Weight, node, of_experts, plan
from xent_quant.checkpoint.architecture import Architecture
from xent_quant.planning import Choice, Group
from xent_quant.sensitivities import HEAD, Sensitivity, place
from xent_quant.tensors import KEPT_ROLES

LIKE = {(4, True): "Q4_0", (4, False): "Q4_1", (8, True): "Q8_0", (8, False): "Q8_0"}
"""By bits and symmetry the type of sensitivities whose codes lie on the same grid."""
ERROR = {
    (4, True): {32: 1.0, 64: 1.233, 128: 1.426},
    (4, False): {32: 1.242, 64: 1.597, 128: 1.915},
    (8, True): {32: 0.922, 64: 1.185, 128: 1.452},
    (8, False): {32: 0.761, 64: 1.004, 128: 1.249},
}
"""And by block size the squared error of Gaussian weights, over that type's: see `tests/exporters/test_onnx_budget.py`."""
MIXES = {
    "INT8": (8, 8),
    "INT4": (4, 8),
    "INT4-active4": (4, 4),
}
"""What there is without a plan: bits of the experts (see `of_experts`), and of all else."""


def planned(
    model: Architecture, sensitivity: Sensitivity, goal: Goal, settings: Settings, *, header: int = 0, method: str = "gptq"
) -> ONNXPlan:
    """The plan of least expected loss within the goal's bytes, or of fewest bytes within its loss; `header` bytes of the files
    are not in the data file. Raises what `plan` and `Goal.check` raise, and ExportError that says what would be possible."""
    goal.check(model)
    layout = _layout(model, sensitivity, goal, settings, header, method)
    chosen = layout.best(goal)
    bits = {label: int(choice.type) for label, choice in zip(layout.groups, chosen.choices, strict=True)}
    made = plan(model, settings, bits)
    notes = budgets.notes(goal.name, chosen.loss, sensitivity.source, method)
    expected = layout.expected(goal, chosen, sensitivity.source)
    return replace(made, notes=(*notes, *made.notes), name=goal.name, expected=expected, context=goal.context)


def _layout(model: Architecture, sensitivity: Sensitivity, goal: Goal, settings: Settings, header: int, method: str) -> Layout:
    uniform = {bits: plan(model, replace(settings, bits=bits, active_bits=bits)) for bits in (4, 8)}
    groups: dict[str, Group] = {}
    sizes = {bits: _together(each) for bits, each in uniform.items()}
    for label, weights in sizes[4].items():
        places = {place(piece.source) for weight in weights for piece in weight.pieces}
        if label == "embedding" and model.tie_word_embeddings:
            places.add(HEAD)
        choices = []
        for bits in (4, 8):
            grid = bits, settings.symmetric
            loss = sum(sensitivity.loss(each, LIKE[grid], gptq=method == "gptq") for each in sorted(places))
            nbytes = sum(map(_aligned, sizes[bits][label]))
            choices.append(Choice(str(bits), nbytes, loss * ERROR[grid][settings.block_size]))
        groups[label] = Group(label, tuple(choices))
    kept = uniform[4].data_bytes - sum(group.choices[0].nbytes for group in groups.values()) + header
    item = 4 if settings.onnx_dtype == "fp32" else 2
    at_work = kv_cache_bytes(model, goal.context, item) + RUNTIME_BYTES
    mixes: dict[str, dict[str, str]] = {}
    for name, of in MIXES.items():
        kinds = {label: str(of[not of_experts(model, label)]) for label in groups}
        mixes[name] = kinds
    return Layout(groups, kept, at_work - header, mixes)


def _together(of: ONNXPlan) -> dict[str, Sequence[Weight]]:
    """By operator the weights that are quantised."""
    found: dict[str, list[Weight]] = {}
    for weight in of.weights.values():
        if weight.pieces and weight.pieces[0].source.role not in KEPT_ROLES:
            found.setdefault(node(weight.name), []).append(weight)
    return dict(found)


def _aligned(weight: Weight) -> int:
    """Bytes of the data file."""
    return sum(-(-part.nbytes // ALIGNMENT) * ALIGNMENT for part in weight.parts)
