"""Every measure against its definition, computed one value at a time in float64."""

import math
import warnings

import numpy as np
import pytest

from xent_quant.errors import ValidationError
from xent_quant.validation import measures, scoring


def draw(n: int, vocab: int, noise: float, seed: int = 0, spread: float = 2.0) -> tuple[np.ndarray, np.ndarray]:
    """Logits of a model and of a quantised one, float32 [n, vocab]."""
    random = np.random.default_rng(seed)
    logits = random.standard_normal((n, vocab)) * spread
    return logits.astype(np.float32), (logits + noise * random.standard_normal((n, vocab))).astype(np.float32)


def slow_log_softmax(row: np.ndarray) -> list[float]:
    total = math.fsum(math.exp(float(x) - float(row.max())) for x in row)
    return [float(x) - float(row.max()) - math.log(total) for x in row]


def slow_kl(p: np.ndarray, q: np.ndarray) -> float:
    return math.fsum(math.exp(a) * (a - b) for a, b in zip(slow_log_softmax(p), slow_log_softmax(q), strict=True))


def test_log_softmax_nll_perplexity_and_bits_per_byte() -> None:
    logits = np.concatenate([draw(5, 40, 0)[0], np.full((1, 40), 80, np.float32), np.eye(1, 40, 3, np.float32) * 3e4])
    targets = np.array([0, 39, 7, 7, 1, 2, 3])
    got = measures.nll(measures.log_softmax(logits), targets)
    wanted = [-slow_log_softmax(row)[target] for row, target in zip(logits, targets, strict=True)]
    np.testing.assert_allclose(got, wanted, rtol=1e-13, atol=1e-13)
    assert measures.perplexity(got) == pytest.approx(math.exp(math.fsum(wanted) / 7), rel=1e-13)
    assert measures.bits_per_byte(got, 11) == pytest.approx(math.fsum(wanted) / 11 / math.log(2), rel=1e-13)


def test_relative_errors_by_layer() -> None:
    exact = [np.array([[[3.0, 4]], [[1, 0]]], np.float32), np.array([[[0.0, 0]], [[0, 1]]], np.float32)]
    found = [np.array([[[3.0, 3]], [[1, 0]]], np.float32), np.array([[[0.0, 0]], [[0, -3e38]]], np.float32)]
    with warnings.catch_warnings(action="error"):
        assert measures.relative_errors(found, exact) == pytest.approx((1 / 5, 3e38 / 2**0.5), rel=1e-6)


def test_full_kl_divergence() -> None:
    p, q = draw(6, 50, 0.3)
    got = measures.kl_divergence(measures.log_softmax(p), measures.log_softmax(q))
    np.testing.assert_allclose(got, [slow_kl(*rows) for rows in zip(p, q, strict=True)], rtol=1e-12)


@pytest.mark.parametrize("noise", [0.01, 0.1, 0.5])
@pytest.mark.parametrize(("vocab", "spread"), [(4096, 1.0), (4096, 2.0), (4096, 4.0), (30_000, 2.0)])
def test_kl_from_summary_is_within_2_percent(noise: float, vocab: int, spread: float) -> None:
    """`spread` 1 is a nearly flat distribution, of which the top 128 of 4096 hold a seventh."""
    n = 3_000_000 // vocab
    p, q = (measures.log_softmax(x) for x in draw(n, vocab, noise, seed=int(spread), spread=spread))
    full = measures.kl_divergence(p, q)
    assert measures.kl_from_summary(measures.summarise(p), q).mean() == pytest.approx(full.mean(), rel=0.02)
    assert np.abs(measures.kl_from_summary(measures.summarise(p), p)).max() < 1e-6


def test_draws_are_needed_and_bound_from_below() -> None:
    p, q = (measures.log_softmax(x) for x in draw(500, 4096, 0.1, spread=1.5))
    full = measures.kl_divergence(p, q).mean()
    summary = measures.summarise(p)
    top = np.take_along_axis(q, summary.ids.astype(np.int64), 1)
    log_p = summary.log_p.astype(np.float64)
    lump = (np.exp(log_p) * (log_p - top)).sum(1) + summary.tail * np.log(summary.tail / (1 - np.exp(top).sum(1)))
    assert lump.mean() < 0.9 * full
    assert (measures.kl_from_summary(summary, q) >= lump - 1e-12).all()


def test_small_vocabulary_is_exact() -> None:
    p, q = (measures.log_softmax(x) for x in draw(7, 100, 0.4))
    got = measures.kl_from_summary(measures.summarise(p, top_k=128), q)
    np.testing.assert_allclose(got, measures.kl_divergence(p, q), rtol=1e-5)


def test_a_model_that_is_certain_of_what_never_comes_is_far_off_and_no_more() -> None:
    """A damaged one puts everything on a token of the tail: a finite number, without a warning."""
    p = np.full((1, 2000), -1500.0)
    p[0, :128] = -np.log(128)
    q = np.full((1, 2000), -1e30)
    q[0, measures.summarise(p, top_k=128).sample_ids[0, 0]] = 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert 1e20 < measures.kl_from_summary(measures.summarise(p, top_k=128), q)[0] < np.inf


def test_summary_by_hand() -> None:
    """Ties go to the lower id, the tail is what is left, and draws come only from it, in proportion."""
    probabilities = np.array([[0.1, 0.3, 0.05, 0.3, 0.25]])
    summary = measures.summarise(np.log(probabilities), top_k=2, samples=4000)
    assert summary.ids.tolist() == [[1, 3]]
    assert summary.tail[0] == pytest.approx(0.4)
    shares = np.bincount(summary.sample_ids[0], minlength=5) / 4000
    np.testing.assert_allclose(shares, [0.25, 0, 0.125, 0, 0.625], atol=1e-3)
    np.testing.assert_allclose(np.exp(summary.sample_log_p[0]), probabilities[0, summary.sample_ids[0]], rtol=1e-6)


def test_summary_is_deterministic_and_certain_rows_are_finite() -> None:
    logits = np.zeros((2, 300), np.float32)
    logits[:, 17] = 500  # the tail's mass is exactly 0
    p = measures.log_softmax(logits)
    one, two = measures.summarise(p), measures.summarise(p)
    for field in ("ids", "log_p", "tail", "sample_ids", "sample_log_p"):
        np.testing.assert_array_equal(getattr(one, field), getattr(two, field))
    np.testing.assert_allclose(measures.kl_from_summary(one, p), 0, atol=1e-9)


def test_summary_keeps_nothing_of_the_logits_alive() -> None:
    """What a summary holds on to, views' owners included, is 1.5 KB a position and not 8 bytes a token of the vocabulary."""
    summary = measures.summarise(measures.log_softmax(draw(10, 20_000, 0)[0]))
    held = 0
    for values in vars(summary).values():
        owner = values
        while isinstance(owner.base, np.ndarray):
            owner = owner.base
        held += owner.nbytes
    assert held < 10 * 2000


def test_top1_agreement_by_hand() -> None:
    p = measures.summarise(np.log(np.array([[0.2, 0.5, 0.3], [0.4, 0.4, 0.2], [0.6, 0.3, 0.1]])), top_k=1)
    q = np.log(np.array([[0.3, 0.4, 0.3], [0.2, 0.6, 0.2], [0.5, 0.5, 0.0 + 1e-9]]))
    assert measures.top1_agreement(p, q).tolist() == [True, False, True]


def test_windows_are_llama_perplexitys() -> None:
    ids = list(range(100, 121))
    assert measures.windows(ids, 8).tolist() == [ids[:8], ids[8:16]]
    assert measures.windows(ids, 8, bos=1).tolist() == [[1, *ids[1:8]], [1, *ids[9:16]]]
    positions, targets = measures.scored(8)
    assert list(range(8))[positions] == [4, 5, 6]
    assert list(range(8))[targets] == [5, 6, 7]
    with pytest.raises(ValidationError, match="fewer than one window of 32"):
        measures.windows(ids, 32)
    with pytest.raises(ValidationError, match="even length"):
        measures.windows(ids, 7)


def test_standard_errors_by_hand() -> None:
    values = np.array([[1.0, 3.0], [2.0, 6.0], [0.0, 0.0]])
    flat = values.ravel().tolist()
    mean = math.fsum(flat) / 6
    deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in flat) / 5)
    assert measures.token_mean(values.ravel()) == measures.Estimate(pytest.approx(mean), pytest.approx(deviation / math.sqrt(6)))
    # window means 2, 4, 0
    assert measures.window_mean(values) == measures.Estimate(pytest.approx(2.0), pytest.approx(2 / math.sqrt(3)))
    assert measures.window_mean(values[:1]).error == math.inf


def test_a_model_that_is_damaged_has_a_perplexity() -> None:
    hopeless = np.full((2, 3), 1e4)
    assert measures.perplexity(hopeless) == math.exp(700)
    ratio = measures.perplexity_ratio(hopeless, np.ones((2, 3)))
    assert (ratio.value, ratio.error) == (math.exp(700), 0)


def test_paired_error_of_a_ratio_covers_the_truth() -> None:
    """Repeated draws of 12 windows: the ratio is the truth within two standard errors about 19 times in 20, and the pairing
    makes the error far smaller than that of either perplexity."""
    random = np.random.default_rng(5)
    hits, rounds = 0, 400
    for _ in range(rounds):
        topic = random.standard_normal((12, 1))
        reference = 4 + topic + random.standard_normal((12, 64))
        quantised = reference + 0.02 + 0.01 * random.standard_normal((12, 1)) + 0.1 * random.standard_normal((12, 64))
        ratio = measures.perplexity_ratio(quantised, reference)
        hits += abs(ratio.value - math.exp(0.02)) < 2 * ratio.error
    assert 0.89 < hits / rounds < 0.98
    assert ratio.error < 0.05 * measures.window_mean(reference).error


def test_tokenizers_that_differ_are_compared_in_parts() -> None:
    ours = [index % 50 for index in range(20_000)]
    assert scoring.agreement(ours, ours) == 1
    inserted = ours[:1000] + [99] * 7 + ours[1000:9000] + [98] + ours[9000:]
    assert scoring.agreement(ours, inserted) == pytest.approx(20_000 / 20_008, abs=1e-4)
    replaced = [99 if index % 10 == 0 else token for index, token in enumerate(ours)]
    assert scoring.agreement(ours, replaced) == pytest.approx(0.9, abs=1e-3)
    assert scoring.agreement(ours, [token + 1000 for token in ours]) == 0
    assert scoring.agreement(ours, ours[:15_000]) == pytest.approx(0.75, abs=1e-3)
    assert scoring.agreement(ours, []) == 0
