"""Tiers, verdicts and what counts as a damaged tensor."""

import math
from dataclasses import replace

import pytest

from xent_quant.errors import ConfigError
from xent_quant.validation import gates
from xent_quant.validation.measures import Estimate
from xent_quant.validation.weights import TensorError


@pytest.mark.parametrize(
    ("value", "error", "verdict"),
    [
        (1.02, 0.004, "within"),
        (1.02, 0.006, "undecided"),
        (1.04, 0.006, "undecided"),
        (1.04, 0.004, "out"),
        (9.0, math.inf, "undecided"),
    ],
)
def test_a_verdict_needs_two_standard_errors(value: float, error: float, verdict: str) -> None:
    assert gates.judge(Estimate(value, error), 1.03) == verdict
    assert gates.judge(Estimate(-value, error), -1.03, at_most=False) == verdict


def test_exact_agreement_is_within() -> None:
    assert gates.judge(Estimate(1.0, 0.0), 1.0) == "within"
    assert gates.judge(Estimate(1.1, 0.0), 1.0) == "out"


def test_the_worst_verdict_wins() -> None:
    assert gates.worst(["within", "undecided", "within"]) == "undecided"
    assert gates.worst(["undecided", "out"]) == "out"
    assert gates.worst([]) == "within"


@pytest.mark.parametrize(
    ("mix", "bits", "name"),
    [("Q4_K_M", 5.3, "4bit"), ("IQ4_XS", 4.4, "4bit"), ("Q8_0", 8.5, "8bit"), ("BF16", 16.0, "8bit"), ("ALL_F32", 32.0, "8bit"),
     ("Q3_K_M", 4.0, "3bit"), (None, 4.6, "4bit"), (None, 8.5, "8bit"), (None, 1.6, "2bit"), (None, 5.99, "5bit"),
     ("IQ1_S", 1.9, "2bit"), ("TQ1_0", 1.8, "2bit"), ("Q1_0", 1.2, "2bit"), ("IQ2_XXS", 2.3, "2bit"), ("MXFP4_MOE", 4.6, "4bit")],
)  # fmt: skip
def test_tier_of_a_file(mix: str | None, bits: float, name: str) -> None:
    assert gates.tier(mix, bits).name == name


@pytest.mark.parametrize(
    ("kind", "bits"),
    [("Q4_K", 4), ("IQ4_NL", 4), ("NF4", 4), ("MXFP4", 4), ("NVFP4", 4), ("INT8", 8), ("F16", 16), ("Q6_K", 6), ("IQ2_XXS", 2),
     ("TQ2_0", 1), ("TQ1_0", 1), ("IQ1_M", 1), ("Q1_0", 1)],
)  # fmt: skip
def test_bits_of_a_type(kind: str, bits: int) -> None:
    assert gates.bits_of(kind) == bits


def test_tolerance_option() -> None:
    default = gates.TIERS["4bit"]
    assert gates.parse("6bit", default) is gates.TIERS["6bit"]
    own = gates.parse("kld=0.5, top1=0.8", default)
    assert (own.ppl, own.kld, own.top1) == (default.ppl, 0.5, 0.8)
    for wrong in ("", "7bit", "ppl", "ppl=x", "ppl=1.1;kld=2", "acc=1"):
        with pytest.raises(ConfigError, match="--tolerance"):
            gates.parse(wrong, default)


def test_suspicious_tensors() -> None:
    fine = TensorError("w", "Q4_K", 100, 0.08, 0.12, 0, 0, 0.0)
    assert gates.suspicious(fine, 4) is None
    assert gates.severity(fine, 4) < 1
    for change, words in (
        ({"error": 1.0}, "100.0% of its norm"),
        ({"worst": 1.1, "row": 7, "column": 64}, "row 7, columns 64 to 95"),
        ({"padding": 0.5}, "padding"),
        ({"error": math.nan}, "differs"),
    ):
        broken = TensorError(**{**vars(fine), **change})
        assert words in str(gates.suspicious(broken, 4))
    # A weight may have been moved to make up for coarser ones; what is never moved is judged by its own type.
    moved = TensorError("model.layers.0.self_attn.o_proj.weight", "Q6_K", 100, 0.2, 0.5, 0, 0, 0.0)
    assert gates.coarsest([fine, moved]) == 4
    assert gates.suspicious(moved, 4) is None
    assert gates.suspicious(moved, 6)
    assert gates.suspicious(replace(moved, name="model.embed_tokens.weight"), 4)
    assert gates.suspicious(replace(moved, name="model.layers.0.input_layernorm.weight", type="F32"), 4)
    # A router moves, by less, and is not rounded: one of zeros, or another layer's, is seen at any type.
    router = TensorError("model.layers.0.mlp.router.weight", "F32", 100, 0.14, 0.4, 0, 0, 0.0)
    assert gates.suspicious(router, 4) is None
    assert gates.suspicious(replace(router, error=0.16), 4)
    assert gates.suspicious(replace(router, worst=0.5), 4)
    for bits in (16, 8, 4, 2, 1):
        assert gates.suspicious(replace(router, error=1.0), bits)
    assert gates.suspicious(router, 8)
