"""Paired bootstrap intervals over documents.

Tokens of one document are not independent, so documents are what is drawn (with replacement).  The same
draws serve every model of a run, which makes all differences and ratios paired: the spread between
documents, a hundred times the effect of INT4, cancels.
"""

from dataclasses import dataclass

import numpy as np

from qat.evaluation.losses import DocumentLosses

RESAMPLES = 4000
COVERAGE = 0.95
_ALONE = "only one document has tokens"
_DRAWS_AT_ONCE = 1 << 20  # bounds the memory of a bootstrap over many documents


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval, or None with the reason why it has no value.

    Attributes:
        value, low, high: the figure and its interval, or None.
        reason: why `value`, or its interval, is None.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    reason: str | None = None

    @property
    def interval(self) -> list[float] | None:
        """[low, high], or None."""
        return None if self.low is None or self.high is None else [self.low, self.high]


def _resampled(losses: DocumentLosses) -> np.ndarray:
    """Loss (nats per token) of each bootstrap resample, (RESAMPLES,); equal draws for equal counts of documents."""
    documents, random = len(losses.nll), np.random.default_rng(0)
    rows = max(1, _DRAWS_AT_ONCE // documents)
    resampled = []
    for start in range(0, RESAMPLES, rows):
        drawn = random.integers(documents, size=(min(rows, RESAMPLES - start), documents))
        # A resample without a single labelled token has no loss; only tiny sets of documents can produce one.
        with np.errstate(invalid="ignore"):
            resampled.append(losses.nll[drawn].sum(1) / losses.tokens[drawn].sum(1))
    return np.concatenate(resampled)


def _percentiles(samples: np.ndarray) -> tuple[float, float]:
    tail = (1 - COVERAGE) / 2 * 100
    low, high = np.nanpercentile(samples, [tail, 100 - tail])
    return float(low), float(high)


def _one_document(losses: DocumentLosses) -> bool:
    """Whether there is nothing to resample: every draw that has a token would be the same one."""
    return int((losses.tokens > 0).sum()) < 2


def loss_interval(losses: DocumentLosses) -> tuple[float, float] | None:
    """The 95 % interval of the loss itself, in nats per token; None where only one document has tokens."""
    return None if _one_document(losses) else _percentiles(_resampled(losses))


def difference(a: DocumentLosses, b: DocumentLosses) -> Estimate:
    """Loss of `a` minus loss of `b`, in nats per token, with its paired interval.

    Returns:
        An estimate without an interval, and with a reason, where only one document has tokens.

    Raises:
        ValueError: they were not measured on the same documents.
    """
    _check_paired(a, b)
    if _one_document(a):
        return Estimate(a.loss - b.loss, reason=f"no interval: {_ALONE}")
    return Estimate(a.loss - b.loss, *_percentiles(_resampled(a) - _resampled(b)))


def recovered(worst: DocumentLosses, here: DocumentLosses, best: DocumentLosses) -> Estimate:
    """The share of the gap between `worst` and `best` that `here` closes: (worst - here) / (worst - best).

    Recovery is recovered(PTQ, QAT, float); recovery over control is
    recovered(PTQ of the control, QAT, control).

    Returns:
        An estimate with value None where the interval of the gap includes 0, or where only one document has tokens.

    Raises:
        ValueError: they were not measured on the same documents.
    """
    _check_paired(worst, here)
    gap = difference(worst, best)
    if gap.low is None:
        return Estimate(None, reason=f"gap not resolvable: {_ALONE}")
    assert gap.value is not None and gap.high is not None
    if gap.low <= 0:
        return Estimate(
            None,
            reason=f"gap not resolvable: {1e3 * gap.value:.2f} millinats, "
            f"interval {1e3 * gap.low:.2f} to {1e3 * gap.high:.2f}",
        )
    top = _resampled(worst) - _resampled(here)
    bottom = _resampled(worst) - _resampled(best)
    value = (worst.loss - here.loss) / gap.value
    return Estimate(value, *_percentiles(top / bottom))


def _check_paired(a: DocumentLosses, b: DocumentLosses) -> None:
    if not np.array_equal(a.tokens, b.tokens):
        raise ValueError("the two losses were measured on different documents: they cannot be paired")
