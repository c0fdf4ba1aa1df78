"""`validate` beside llama-perplexity on the same text, windows and files."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.stock.programs import EXACT, THREADS, Programs
from xent_quant.checkpoint.hub import miniature
from xent_quant.checkpoint.reader import Checkpoint
from xent_quant.validation.report import SuiteResult
from xent_quant.validation.suites import Suite, bundled
from xent_quant.validation.validate import validate

pytestmark = pytest.mark.stock

WINDOW = 512
LANGUAGES = ["XfictionEN", "XconversationZH"]


@pytest.fixture(scope="module", params=LANGUAGES)
def text(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 8 windows."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(bundled(request.param).text[:10000].strip())
    return path


def validated(file: Path, text: Path, cache: Path) -> SuiteResult:
    found = validate(file, Checkpoint.open(miniature()), [Suite("text", text.read_text())], cache=cache, threads=1)
    return found.suites[0]


def printed(said: str, label: str) -> tuple[float, float]:
    """A figure that llama-perplexity printed, and half a unit of its last digit, all that it can be off by rounding."""
    found = re.search(re.escape(label) + r"\s*[:=]\s*(-?\d+\.(\d+))", said)
    assert found, f"{label} is not in:\n{said}"
    return float(found[1]), 0.5 * 10.0 ** -len(found[2])


def test_perplexity_is_llama_perplexitys(stock: Programs, export: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    """Of the checkpoint, in our float32 and in llama.cpp's."""
    said = stock.run("perplexity", "-m", export("F32"), "-f", text, "-c", str(WINDOW), "--no-escape", *THREADS, *EXACT)
    figure, rounding = printed(said, "PPL")
    assert validated(export("F32"), text, tmp_path).reference_perplexity == pytest.approx(figure, abs=rounding + 1e-6 * figure)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K_M", "Q2_K"])
def test_kl_divergence_is_llama_perplexitys(
    stock: Programs, export: Callable[..., Path], text: Path, tmp_path: Path, kind: str
) -> None:
    """Of an export from the checkpoint, the checkpoint's own logits coming from its F32 file."""
    base = tmp_path / "base.kld"
    options = ("-c", str(WINDOW), "--no-escape", *THREADS)
    stock.run("perplexity", "-m", export("F32"), "-f", text, "--kl-divergence-base", base, *options, *EXACT)
    said = stock.run("perplexity", "-m", export(kind), "--kl-divergence-base", base, "--kl-divergence", *options)
    found = validated(export(kind), text, tmp_path)
    for label, value in (
        ("Mean PPL(Q)", found.perplexity.value),
        ("Mean PPL(base)", found.reference_perplexity),
        ("Mean PPL(Q)/PPL(base)", found.ratio.value.value),
        ("Mean    KLD", found.kl.value.value),
        ("99.0%   KLD", found.kl_99),
        ("Same top p", 100 * found.top1.value.value),
    ):
        figure, rounding = printed(said, label)
        print(label, figure, value)
        assert value == pytest.approx(figure, abs=rounding), label
