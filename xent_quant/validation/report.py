"""What a validation found, as frozen records, and as JSON: `report.schema.json` beside this file describes it."""

import re
from dataclasses import asdict, dataclass
from typing import Any

from xent_quant.validation.gates import Tier, Verdict, worst
from xent_quant.validation.measures import Estimate
from xent_quant.validation.scoring import CrossCheck
from xent_quant.validation.weights import TensorError

SCHEMA, VERSION = "xent-quant/validation", 1


@dataclass(frozen=True)
class Finding:
    """A measure against its bound."""

    value: Estimate
    bound: float
    verdict: Verdict


@dataclass(frozen=True)
class SuiteResult:
    """One suite, or the average of several. KL divergences and `nll` in nats per token; `kl_99` and `kl_max` over its tokens;
    `kl_histogram` counts tokens by the decade edges of `KL_EDGES`. `tokenizer` is the share of token ids that the export's own
    tokenizer agrees on, None where it was not asked. Averages have the verdict None: every suite is gated on its own."""

    name: str
    tokens: int
    windows: int
    perplexity: Estimate
    reference_perplexity: float
    nll: float
    bits_per_byte: float
    reference_bits_per_byte: float
    ratio: Finding
    kl: Finding
    kl_99: float
    kl_max: float
    top1: Finding
    tokenizer: float | None
    kl_histogram: tuple[int, ...]

    @property
    def verdict(self) -> Verdict:
        return worst([self.ratio.verdict, self.kl.verdict, self.top1.verdict])


KL_EDGES = tuple(10 ** (exponent / 2) for exponent in range(-12, 3))
"""Edges of the histogram's bins, half a decade each; the first bin is below, the last above."""


@dataclass(frozen=True)
class Suspicion:
    """A tensor whose bytes are not what its type allows, and why."""

    tensor: TensorError
    reason: str


@dataclass(frozen=True)
class Report:
    """Everything that a person or a program may want to know of one validation.

    `layer_errors` are ‖x − reference‖ / ‖reference‖ of the residual stream behind each layer, all before it quantised too;
    `coverage` counts the validation tokens of each layer's experts, [layer][expert], on the first windows.
    """

    exported: str
    reference: str
    kind: str
    runtime: str
    runtime_version: str
    tier: Tier
    context: int
    suites: tuple[SuiteResult, ...]
    averages: tuple[SuiteResult, ...]
    tensors: tuple[TensorError, ...]
    suspicions: tuple[Suspicion, ...]
    cross_check: CrossCheck | None
    cross_verdict: Verdict
    layer_errors: tuple[float, ...]
    coverage: tuple[tuple[int, ...], ...]
    nbytes: int
    reference_bytes: int
    n_weights: int
    seconds: float
    command: str
    versions: dict[str, str]
    notes: tuple[str, ...]

    @property
    def weights_verdict(self) -> Verdict:
        return "out" if self.suspicions else "within"

    @property
    def damage(self) -> list[str]:
        """One sentence for every damaged tensor, worst first; experts of a layer that share their damage share one."""
        groups: dict[str, list[Suspicion]] = {}
        for suspicion in self.suspicions:
            groups.setdefault(re.sub(r"\.experts\.\d+\.", ".experts.", suspicion.tensor.name), []).append(suspicion)
        return [
            f"{first.tensor.name}: {first.reason}" + (f"; likewise {len(others)} more of its layer's experts" if others else "")
            for first, *others in groups.values()
        ]

    @property
    def verdict(self) -> Verdict:
        return worst([*(suite.verdict for suite in self.suites), self.weights_verdict, self.cross_verdict])

    @property
    def bits_per_weight(self) -> float:
        """Bits on disk per weight of the checkpoint."""
        return 8 * self.nbytes / self.n_weights

    def to_json(self) -> dict[str, Any]:
        def suite(result: SuiteResult, gated: bool) -> dict[str, Any]:
            return {**_plain(asdict(result)), "verdict": result.verdict if gated else None}

        facts = {key: value for key, value in vars(self).items() if key not in ("suites", "averages", "tensors", "suspicions")}
        return {
            "schema": SCHEMA,
            "version": VERSION,
            "verdict": self.verdict,
            **{key: _plain(asdict(value) if hasattr(value, "__dataclass_fields__") else value) for key, value in facts.items()},
            "bits_per_weight": self.bits_per_weight,
            "suites": [suite(result, True) for result in self.suites],
            "averages": [suite(result, False) for result in self.averages],
            "suspicions": [{"tensor": s.tensor.name, "reason": s.reason} for s in self.suspicions],
            "tensors": [_plain(asdict(tensor)) for tensor in self.tensors],
        }


def _plain(value: Any) -> Any:
    """JSON has no infinity: an error that one window cannot give is null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and value in (float("inf"), float("-inf")) else value
