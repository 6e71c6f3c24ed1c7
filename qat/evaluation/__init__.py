"""Losses by document, and what can be said about their differences."""

from qat.evaluation.intervals import Estimate, difference, loss_interval, recovered
from qat.evaluation.losses import DocumentLosses, Losses, evaluate

__all__ = ["DocumentLosses", "Estimate", "Losses", "difference", "evaluate", "loss_interval", "recovered"]
