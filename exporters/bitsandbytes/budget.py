"""Which modules bitsandbytes quantises and which stay bfloat16, so that a model loses least within a budget.

transformers takes one quantised kind for a model, and a list of modules that are not: all routed experts of a layer are one, gate
and up of what every token uses another, and so on.
"""

from dataclasses import replace
from math import prod

from exporters import budgets
from exporters.bitsandbytes.plan import BnbPlan, PlannedTensor, module, plan
from exporters.budgets import Goal, Layout
from exporters.interface import Alternative
from xent_quant.checkpoint.architecture import Architecture
from xent_quant.planning import Choice, Group
from xent_quant.sensitivities import Sensitivity, place

LIKE = {"NF4": ("Q4_0", 1.289), "FP4": ("Q4_0", 2.267), "INT8": ("Q8_0", 2.797)}
"""By kind a type of sensitivities, and the squared error of Gaussian weights, rows of 4,096, over that type's: see
`tests/exporters/test_bnb_budget.py`."""
WHOLE = "BF16"
QUOTES = 12
"""Bytes of a name in a list of config.json, besides its own."""


def planned(
    model: Architecture,
    sensitivity: Sensitivity,
    goal: Goal,
    *,
    bits: int,
    bnb_type: str,
    pad: str = "auto",
    header: int = 0,
    gptq: bool = False,
) -> BnbPlan:
    """The plan of least expected loss within the goal's bytes, or of fewest bytes within its loss; `header` bytes of the files
    are no weight's. Raises what `plan` and `Goal.check` raise, and ExportError that says what would be possible."""
    goal.check(model)
    quantised = plan(model, bits=bits, bnb_type=bnb_type, pad=pad)
    kind, (like, error) = quantised.type, LIKE[quantised.type]
    together: dict[str, list[PlannedTensor]] = {}
    for tensor in quantised.tensors:
        if tensor.encoding.name == kind:
            of = tensor.tensor
            together.setdefault(module(of) if of.expert is not None else place(of), []).append(tensor)
    modules = {label: tuple(dict.fromkeys(module(tensor.tensor) for tensor in some)) for label, some in together.items()}
    groups = {}
    for label, some in together.items():
        places = sorted({place(tensor.tensor) for tensor in some})
        loss = error * sum(sensitivity.loss(each, like, gptq=gptq) for each in places)
        names = sum(len(name) + QUOTES for name in modules[label])
        whole = Choice(WHOLE, sum(2 * prod(tensor.shape) for tensor in some) + names, 0.0)
        groups[label] = Group(label, (Choice(kind, sum(tensor.nbytes for tensor in some), loss), whole))
    kept = quantised.nbytes - sum(group.choices[0].nbytes for group in groups.values()) + header
    layout = Layout(groups, kept, quantised.beside_weights(goal.context) - header, {kind: dict.fromkeys(groups, kind)})
    chosen = layout.best(goal)
    kinds = zip(groups, chosen.choices, strict=True)
    left = [name for label, choice in kinds if choice.type == WHOLE for name in modules[label]]
    plain = plan(model, bits=16, pad=pad)
    quantise = any(choice.type == kind for choice in chosen.choices)
    made = plan(model, bits=bits, bnb_type=bnb_type, pad=pad, whole=left) if quantise else plain
    expected = layout.expected(goal, chosen, sensitivity.source)
    beside = (Alternative(WHOLE, plain.nbytes + header, 0.0), *expected.beside)
    expected = replace(expected, nbytes=made.nbytes + header if not quantise else expected.nbytes, beside=beside)
    notes = budgets.notes(goal.name, chosen.loss, sensitivity.source)
    return replace(made, notes=(*notes, *made.notes), name=goal.name, expected=expected, context=goal.context)
