"""What a model loses, tensor by tensor: for every place in it and every quant type, the KL divergence that is expected of it.

A *place* is what has one type in a plan: a projection of a layer, gate and up together (kernels that compute both at once want
them alike), of all routed experts or of the MLP that every token uses; the embedding; the head.

`xent_quant.walk.sensing` measures; what it found is kept in a small file, and a prior stands in where it never ran.
"""

import json
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from math import inf
from pathlib import Path

from xent_quant.checkpoint.architecture import Architecture
from xent_quant.checkpoint.fingerprint import model_hash
from xent_quant.checkpoint.llama_names import OUTSIDE, llama_name
from xent_quant.checkpoint.reader import Checkpoint
from xent_quant.errors import ConfigError
from xent_quant.plain import plain
from xent_quant.storage import replace_bytes
from xent_quant.tensors import Role, TensorSpec

FORMAT = "xent-quant sensitivity 1"
LARGEST = 1 << 24
"""Bytes of a file; that of a model of 1,000 layers has 4 million."""
EMBEDDING, HEAD = OUTSIDE[Role.EMBEDDING], OUTSIDE[Role.HEAD]

TYPES = (
    "Q8_0",
    "Q6_K",
    "Q5_1",
    "Q5_K",
    "Q5_0",
    "Q4_1",
    "Q4_K",
    "IQ4_NL",
    "Q4_0",
    "IQ4_XS",
    "Q3_K",
    "IQ3_S",
    "IQ3_XXS",
    "Q2_K",
    "IQ2_S",
    "IQ2_XS",
    "IQ2_XXS",
)
"""What a plan chooses from, most bits first: types that stock llama.cpp runs on any backend and that suit any weights. MXFP4 and
NVFP4 are made for hardware, TQ and Q1_0 for models trained so, and IQ1 loses more than fewer experts would."""


def place(tensor: TensorSpec, role: Role | None = None) -> str:
    """`blk.3.ffn_down_exps`; `role` is what the tensor does in the file, where a tied embedding is the head too."""
    if tensor.layer is None:
        return OUTSIDE[role or tensor.role]
    return re.sub(r"_(gate|up)(?=_|\.)", "_gate_up", llama_name(tensor)).removesuffix(".weight")


def part(place: str) -> str:
    """The place without its layer: `ffn_down_exps`."""
    return re.sub(r"^blk\.\d+\.", "", place)


_MEASURED = {
    "Q8_0": 0.77,
    "Q6_K": 0.65,
    "Q5_K": 0.67,
    "Q4_K": 0.61,
    "IQ4_XS": 0.57,
    "Q4_0": 0.56,
    "Q3_K": 0.58,
    "Q2_K": 0.56,
    "IQ3_S": 0.55,
    "IQ2_S": 0.55,
    "IQ2_XS": 0.55,
    "IQ2_XXS": 0.61,
}
_LIKE = {"Q5_1": "Q5_K", "Q5_0": "Q5_K", "Q4_1": "Q4_0", "IQ4_NL": "IQ4_XS", "IQ3_XXS": "IQ3_S"}
RECOVERY = {kind: _MEASURED[_LIKE.get(kind, kind)] for kind in TYPES}
"""What is left of a type's loss when GPTQ chooses the codes: KL divergence of whole files over that of the search alone on the
miniature (docs/calibration.md, `scripts/bench_quality.py`). Types that the table lacks have the share of a like one that it has.
`scripts/check_sensitivity.py --types … --methods imatrix gptq` measures each by itself."""

PRIOR = "the bundled miniature"
PRIOR_FILE = Path(str(resources.files("xent_quant") / "data" / "sensitivity-prior.json"))


@dataclass(frozen=True)
class Sensitivity:
    """`losses`: by place and type the KL divergence (nats per token) that the type adds there alone, everything else being exact;
    quantised by the weighted search, without GPTQ. `source` says where it is from, without a path: cards of exports say it."""

    losses: Mapping[str, Mapping[str, float]]
    source: str

    def loss(self, place: str, kind: str, *, gptq: bool) -> float:
        """Of a type at a place; `gptq` lowers it everywhere but in the embedding, which is never multiplied with."""
        found = self.losses[place][kind]
        return found * RECOVERY[kind] if gptq and place != EMBEDDING else found


def save(sensitivity: Sensitivity, checkpoint: Checkpoint, path: Path) -> None:
    """Write the file; it replaces another one whole. Raises OSError."""
    told = {"format": FORMAT, "model": model_hash(checkpoint), "losses": sensitivity.losses}
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_bytes(path, json.dumps(told, indent=1).encode())


def kept(checkpoint: Checkpoint) -> Path:
    """Where a model's own is kept, whichever copy of it was measured."""
    return Path.home() / ".cache" / "xent-quant" / "sensitivity" / f"{model_hash(checkpoint)}.json"


def of(checkpoint: Checkpoint, file: Path | None = None) -> Sensitivity:
    """What is known of a checkpoint: what the `file` says, else its own where that was measured, else the prior. Raises
    ConfigError, naming the file, where it is damaged or another model's."""
    path = file or kept(checkpoint)
    if file is None and not path.is_file():
        return prior(checkpoint.architecture)
    model, losses = _read(path)
    if model != model_hash(checkpoint):
        raise ConfigError(f"{path}: was measured on another model; measure this one with xent-quant sensitivity")
    if missing := [name for name in places(checkpoint.architecture) if not set(TYPES) <= set(losses.get(name, ()))]:
        raise ConfigError(f"{path}: says nothing of {missing[0]} in every type; measure again with xent-quant sensitivity")
    return Sensitivity(losses, f"measured on this model ({path.name})" if file is None else f"from {plain(path.name)}")


def places(model: Architecture) -> list[str]:
    """All of a model's, in the order of its tensors."""
    inside = [place(tensor) for layer in range(model.num_layers) for tensor in model.layer(layer).tensors() if tensor.measured]
    return list(dict.fromkeys([EMBEDDING, *inside, HEAD]))


def _read(path: Path) -> tuple[str, dict[str, dict[str, float]]]:
    """What the losses were measured on, and they."""
    facts = path.stat()
    try:
        if not stat.S_ISREG(facts.st_mode) or facts.st_size > LARGEST:
            raise ValueError
        told = json.loads(path.read_bytes())
        if told["format"] != FORMAT:
            raise ValueError
        losses = {str(name): {str(kind): float(loss) for kind, loss in by.items()} for name, by in told["losses"].items()}
        model = str(told["model"])
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        raise ConfigError(f"{path}: not a file of xent-quant sensitivity, or damaged; measure again") from None
    if not all(0 <= loss < inf for by in losses.values() for loss in by.values()):
        raise ConfigError(f"{path}: holds losses that are negative or no numbers; measure again")
    return model, losses


def prior(model: Architecture) -> Sensitivity:
    """For a model that was never measured: the bundled miniature's losses by what a tensor does, each the sum over its layers,
    spread evenly over the layers there are. A dense model's MLP counts as the miniature's experts and shared experts together."""
    _, measured = _read(PRIOR_FILE)
    sums: dict[str, dict[str, float]] = {}
    for name, losses in measured.items():
        names = [part(name)]
        names += [re.sub("_(exps|shexp)$", "", names[0])] if "exp" in names[0] else []
        for each in names:
            by = sums.setdefault(each, dict.fromkeys(TYPES, 0.0))
            for kind in TYPES:
                by[kind] += losses[kind]
    found = {
        name: {kind: loss / (model.num_layers if name.startswith("blk.") else 1) for kind, loss in sums[part(name)].items()}
        for name in places(model)
    }
    return Sensitivity(found, f"a prior, measured on {PRIOR} and not on this model; xent-quant sensitivity measures it")
