"""`validate` beside llama-perplexity on the same text, windows and files."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from tests.stock.programs import EXACT, THREADS, Programs
from xent_quant.checkpoint.hub import miniature
from xent_quant.checkpoint.reader import Checkpoint
from xent_quant.validation import measures
from xent_quant.validation.llama_cpp import LlamaCpp
from xent_quant.validation.reference import tokenize
from xent_quant.validation.report import SuiteResult
from xent_quant.validation.suites import Suite, bundled
from xent_quant.validation.validate import validate

pytestmark = pytest.mark.stock

WINDOW = 512
SAME = ("-c", str(WINDOW), "-b", str(WINDOW), "--no-repack", "--no-escape", *THREADS)
"""Window after window, with the kernels that `validate` asks for: others round activations in another order."""
CHARACTERS = {"XfictionEN": 8000, "XconversationZH": 4000}


@dataclass(frozen=True)
class Text:
    """A text of some windows, and what the checkpoint, as an F32 file, says of it: llama-perplexity's file."""

    file: Path
    base: Path
    said: str

    @property
    def suite(self) -> Suite:
        return Suite("text", self.file.read_text("utf-8"))


@pytest.fixture(scope="module", params=CHARACTERS)
def text(
    request: pytest.FixtureRequest, stock: Programs, export: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Text:
    folder = tmp_path_factory.mktemp("text")
    file, base = folder / "text.txt", folder / "base.kld"
    file.write_text(bundled(request.param).text[: CHARACTERS[request.param]].strip(), "utf-8")
    said = stock.run(
        "perplexity", "-m", export("F32"), "-f", file, "--kl-divergence-base", base, *SAME, *EXACT, last="Final estimate"
    )
    return Text(file, base, said)


def validated(file: Path, text: Text, cache: Path) -> SuiteResult:
    (found,) = validate(file, Checkpoint.open(miniature()), [text.suite], cache=cache, threads=1).suites
    return found


def printed(said: str, label: str) -> tuple[float, float]:
    """A figure that llama-perplexity printed, and half a unit of its last digit."""
    found = re.search(re.escape(label) + r"\s*[:=]\s*(-?\d+\.(\d+))", said)
    assert found, f"{label} is not in:\n{said}"
    return float(found[1]), 0.5 * 10.0 ** -len(found[2])


def test_perplexity_is_llama_perplexitys(export: Callable[..., Path], text: Text, tmp_path: Path) -> None:
    """Of the checkpoint, by our forward pass and by llama.cpp's, both in float32, to every digit that is printed."""
    figure, rounding = printed(text.said, "Final estimate: PPL")
    assert validated(export("F32"), text, tmp_path).reference_perplexity == pytest.approx(figure, rel=1e-6, abs=rounding)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K_M", "Q2_K"])
def test_kl_divergence_is_llama_perplexitys(
    stock: Programs, export: Callable[..., Path], text: Text, tmp_path: Path, kind: str
) -> None:
    """Of an export. Perplexity agrees to every digit. llama-perplexity keeps the reference's log-probabilities in 16 bits, we
    keep a sample of each distribution's tail: KL over whole float32 logits says how far each is off."""
    said = stock.run(
        "perplexity", "-m", export(kind), "--kl-divergence-base", text.base, "--kl-divergence", *SAME, last="Same top p:"
    )
    found = validated(export(kind), text, tmp_path)
    figure, rounding = printed(said, "Mean PPL(Q)")
    assert found.perplexity.value == pytest.approx(figure, rel=1e-7, abs=rounding)

    whole = divergences(export("F32"), export(kind), text)
    figure, rounding = printed(said, "Mean    KLD")
    assert whole.mean() == pytest.approx(figure, rel=1e-3, abs=2 * rounding)
    assert found.kl.value.value == pytest.approx(figure, rel=5e-3, abs=rounding)
    assert found.kl_99 == pytest.approx(printed(said, "99.0%   KLD")[0], rel=0.05)
    one = 100 / found.tokens  # whose two likeliest tokens are as likely, in 16 bits
    assert 100 * found.top1.value.value == pytest.approx(printed(said, "Same top p")[0], abs=one + 0.0005)


def divergences(reference: Path, export: Path, text: Text) -> np.ndarray:
    """KL(reference ‖ export) of every scored position, in nats, from all logits."""
    (tokens,) = tokenize(Checkpoint.open(miniature()), [text.suite], WINDOW, None)
    logs = []
    for file, exact in ((reference, True), (export, False)):
        with LlamaCpp(file, WINDOW, exact=exact) as model:
            rows = [model.logits(window.tolist(), WINDOW // 2)[:-1] for window in tokens.windows]
        logs.append(measures.log_softmax(np.concatenate(rows)))
    return (np.exp(logs[0]) * (logs[0] - logs[1])).sum(1)
