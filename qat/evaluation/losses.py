"""Losses by document: what every figure and every interval of a run is computed from."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from lightning_utilities import apply_to_collection
from torch import Tensor


@dataclass(frozen=True)
class Losses:
    """Summed losses of a batch, one entry a window.

    Attributes:
        nll: (windows,), float64; sum of the negative log-likelihood, in nats.
        correct: (windows,), float64; positions whose most likely class is the right one; NaN if unknown.
        tokens: (windows,), int64; positions with a label.
        document: (windows,), int64; the document each window is from, counted from 0.
    """

    nll: Tensor
    correct: Tensor
    tokens: Tensor
    document: Tensor


@dataclass(frozen=True)
class DocumentLosses:
    """Summed losses of a data set, one entry a document, in an order that every model shares.

    Attributes:
        nll, correct: (documents,), float64; nats and positions.
        tokens: (documents,), int64.
    """

    nll: np.ndarray
    correct: np.ndarray
    tokens: np.ndarray

    @property
    def loss(self) -> float:
        """Nats per token."""
        return float(self.nll.sum() / self.tokens.sum())

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return float(np.exp(self.loss))

    @property
    def accuracy(self) -> float:
        """Share of the tokens that were the most likely one; NaN if unknown."""
        return float(self.correct.sum() / self.tokens.sum())


LossFunction = Callable[[Any, Any], Losses]


def window_losses(module: Any, batch: Any) -> Losses:
    """The default loss function: the module's own `losses(batch)`."""
    return module.losses(batch)


@torch.no_grad()
def evaluate(
    module: torch.nn.Module,
    loader: Iterable[Any],
    losses: LossFunction = window_losses,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    progress: str | None = None,
) -> DocumentLosses:
    """Run `module` over `loader` in evaluation mode and sum its losses by document.

    Args:
        module: anything that `losses` understands; the training flags of all its parts are put back afterwards.
        loader: batches; their tensors are moved to the module's device (`to_device`).
        losses: (module, batch) -> Losses.
        context: entered around every batch (a precision plugin's forward context).
        progress: description of a progress bar, or None for none.

    Raises:
        ValueError: no token had a label, or a loss was not finite (named by document).
    """
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    parts: list[Losses] = []
    try:
        for batch in _tracked(loader, progress):
            with context():
                parts.append(losses(module, to_device(batch, module)))
    finally:
        for part, training in modes:
            part.training = training
    return by_document(parts)


def to_device(batch: Any, module: torch.nn.Module) -> Any:
    """`batch`, of any mappings and sequences, with its tensors on the device of `module`'s first tensor.

    That is a parameter, or a buffer where there is none: a packed network whose batch norms are folded is all buffers.
    """
    device = next((t.device for t in chain(module.parameters(), module.buffers())), torch.device("cpu"))
    return apply_to_collection(batch, Tensor, lambda tensor: tensor.to(device), allow_frozen=True)


def _tracked(loader: Iterable[Any], progress: str | None) -> Iterable[Any]:
    if progress is None:
        return loader
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(loader, progress, transient=True, console=console, disable=not console.is_terminal)


def by_document(parts: list[Losses]) -> DocumentLosses:
    """Sum the losses of all windows of each document.

    Raises:
        ValueError: as `evaluate`.
    """

    def joined(name: str) -> np.ndarray:
        return torch.cat([getattr(part, name) for part in parts]).cpu().numpy() if parts else np.zeros(0, np.int64)

    documents = joined("document")
    if len(documents) and documents.min() < 0:
        raise ValueError("a window of the evaluation data spans documents: losses are resampled by document")
    size = int(documents.max()) + 1 if len(documents) else 0
    nll, correct, tokens = (np.zeros(size, kind) for kind in (np.float64, np.float64, np.int64))
    np.add.at(nll, documents, joined("nll"))
    np.add.at(correct, documents, joined("correct"))
    np.add.at(tokens, documents, joined("tokens"))
    if not tokens.sum():
        raise ValueError("no token of the evaluation data has a label")
    if not np.isfinite(nll).all():
        raise ValueError(f"the loss of {int((~np.isfinite(nll)).sum())} of {size} documents is NaN or infinite")
    return DocumentLosses(nll, correct, tokens)
