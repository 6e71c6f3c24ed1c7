import numpy as np
import pytest

import qat.evaluation.intervals as intervals
from qat.evaluation import DocumentLosses, difference, loss_interval, recovered


def losses(nll, tokens) -> DocumentLosses:
    tokens = np.asarray(tokens, np.int64)
    return DocumentLosses(np.asarray(nll, np.float64), np.zeros(len(tokens)), tokens)


def sample(generator, documents=80, effects=(0.0,)):
    """Models whose true losses differ by `effects`, nats per token, on documents that differ by far more."""
    tokens = generator.integers(20, 200, documents)
    base = generator.normal(3, 1, documents)
    return [
        losses(tokens * (base + effect + generator.normal(0, 0.05 if effect else 0, documents)), tokens)
        for effect in effects
    ]


@pytest.fixture
def fewer_resamples(monkeypatch):
    monkeypatch.setattr(intervals, "RESAMPLES", 400)


def test_a_model_does_not_differ_from_itself():
    (a,) = sample(np.random.default_rng(0))
    estimate = difference(a, losses(a.nll.copy(), a.tokens.copy()))
    assert (estimate.value, estimate.interval) == (0, [0, 0])


def test_a_difference_changes_sign_with_its_order():
    a, b = sample(np.random.default_rng(0), effects=(0, 0.1))
    forward, backward = difference(b, a), difference(a, b)
    assert forward.value == -backward.value
    # Percentiles interpolate between two of 4000 draws in either direction.
    assert forward.interval == pytest.approx([-backward.high, -backward.low], abs=1e-9)


def test_losses_are_weighted_by_tokens():
    a, b = losses([10, 90], [10, 30]), losses([5, 45], [10, 30])
    assert a.loss == 2.5
    assert difference(a, b).value == 1.25


def test_pairing_makes_the_interval_of_a_difference_far_smaller_than_that_of_a_loss():
    a, b = sample(np.random.default_rng(1), effects=(0, 0.02))
    low, high = loss_interval(a)
    estimate = difference(b, a)
    assert low < a.loss < high
    assert estimate.high - estimate.low < 0.1 * (high - low)
    assert estimate.low > 0


def test_intervals_are_reproducible():
    a, b = sample(np.random.default_rng(2), effects=(0, 0.1))
    assert difference(a, b) == difference(a, b)
    assert loss_interval(a) == loss_interval(a)


def test_the_interval_covers_the_truth_in_about_95_percent_of_repetitions(fewer_resamples):
    generator, truth, repetitions, covered = np.random.default_rng(3), 0.03, 300, 0
    for _ in range(repetitions):
        a, b = sample(generator, effects=(0, truth))
        estimate = difference(b, a)
        covered += estimate.low <= truth <= estimate.high
    # A percentile interval over 80 documents is a little narrow (about 94 %); binomial deviation 1.3 points.
    assert 0.89 <= covered / repetitions <= 0.99


def test_a_recovery_is_its_formula():
    worst, here, best = losses([30, 40], [10, 10]), losses([22, 31], [10, 10]), losses([20, 30], [10, 10])
    estimate = recovered(worst, here, best)
    assert estimate.value == pytest.approx((3.5 - 2.65) / (3.5 - 2.5), rel=1e-12)
    assert estimate.low <= estimate.value <= estimate.high
    assert estimate.reason is None


@pytest.mark.parametrize(("here", "value"), [("worst", 0), ("best", 1)])
def test_closing_none_or_all_of_a_gap_is_exact(here, value):
    best, worst = sample(np.random.default_rng(4), effects=(0, 0.1))
    estimate = recovered(worst, {"worst": worst, "best": best}[here], best)
    assert (estimate.value, estimate.low, estimate.high) == (value, value, value)


def test_a_model_better_than_float_recovers_more_than_all():
    best, worst = sample(np.random.default_rng(4), effects=(0, 0.1))
    assert recovered(worst, losses(best.nll - best.tokens, best.tokens), best).value > 1


@pytest.mark.parametrize("effect", [0.0, 1e-4, -0.1], ids=["none", "lost in noise", "reversed"])
def test_a_gap_that_is_not_resolved_has_no_ratio_but_a_reason(effect):
    generator = np.random.default_rng(5)
    tokens = generator.integers(20, 200, 40)
    best = losses(tokens * generator.normal(3, 1, 40), tokens)
    noise = generator.normal(0, 0.01, 40)
    worst = losses(best.nll + tokens * (effect + noise - np.average(noise, weights=tokens)), tokens)
    estimate = recovered(worst, best, best)
    assert estimate.value is None
    assert estimate.interval is None
    assert estimate.reason.startswith(f"gap not resolvable: {1e3 * effect:.2f} millinats, interval ")


@pytest.mark.parametrize("empty", [0, 2], ids=["alone", "beside empty ones"])
def test_a_single_document_has_no_interval_and_resolves_no_gap(empty):
    worst, best = (losses([0] * empty + [nll], [0] * empty + [10]) for nll in (30, 20))
    assert loss_interval(worst) is None
    gap = difference(worst, best)
    assert (gap.value, gap.interval) == (1, None)
    assert gap.reason == "no interval: only one document has tokens"
    share = recovered(worst, best, best)
    assert share.value is None
    assert share.reason == "gap not resolvable: only one document has tokens"


@pytest.mark.parametrize("tokens", [[10, 11], [10], [11, 10], [10, 10, 10]], ids=str)
def test_losses_of_different_documents_cannot_be_paired(tokens):
    a, b = losses([1, 2], [10, 10]), losses(np.ones(len(tokens)), tokens)
    with pytest.raises(ValueError, match="measured on different documents: they cannot be paired"):
        difference(a, b)
    c = losses([0, 0], [10, 10])
    with pytest.raises(ValueError, match="they cannot be paired"):
        recovered(losses([9, 9], [10, 10]), b, c)
    with pytest.raises(ValueError, match="they cannot be paired"):
        recovered(c, b, c)  # whether or not the gap is resolved


def test_documents_without_a_token_do_no_harm():
    a, b = losses([0, 10, 20], [0, 5, 5]), losses([0, 9, 18], [0, 5, 5])
    estimate = difference(a, b)
    assert estimate.value == pytest.approx(0.3)
    assert np.isfinite(estimate.interval).all()
