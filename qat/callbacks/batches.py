"""How a callback works on a module it knows nothing about: its batches, its losses, its methods."""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from qat.evaluation.losses import Losses


def forward_batch(module: Any, batch: Any) -> Any:
    """Run one batch: `module.losses(batch)` if there is one, else forward of the batch or its first element."""
    if hasattr(module, "losses"):
        return module.losses(batch)
    return module(batch[0] if isinstance(batch, (list, tuple)) else batch)


@contextmanager
def muted(module: Any) -> Iterator[None]:
    """Within, `module.log` and `log_dict` do nothing: they fail outside Lightning's own loops."""
    for name in ("log", "log_dict"):
        setattr(module, name, lambda *args, **kwargs: None)
    try:
        yield
    finally:
        for name in ("log", "log_dict"):
            module.__dict__.pop(name, None)


def step_losses(output: Any, batch: Any, batch_idx: int) -> Losses:
    """What a `validation_step` returned, as `Losses`.

    A step may return `Losses` (documents are resampled), or a mean loss as a tensor or under the key
    `loss` (then a batch counts as one document, weighted by its size: the length of its first tensor).

    Raises:
        ValueError: it returned something else, or a mean loss of a batch without a tensor that has a length.
    """
    if isinstance(output, Losses):
        return output
    loss = output.get("loss") if isinstance(output, dict) else output
    if not isinstance(loss, Tensor):
        raise ValueError(
            f"validation_step returned {type(output).__name__}: to measure recovery it must return the batch's mean "
            "loss (a tensor, or a dict with 'loss'), or qat.evaluation.Losses"
        )
    size = next((len(tensor) for _, tensor in tensors(batch) if tensor.ndim), None)
    if size is None:
        raise ValueError(
            "the validation batch holds no tensor whose length could weight its mean loss: return "
            "qat.evaluation.Losses from validation_step"
        )
    count = torch.tensor([size])
    nll = (loss.detach().double().cpu() * size).reshape(1)
    return Losses(nll, torch.full((1,), torch.nan, dtype=torch.float64), count, torch.tensor([batch_idx]))


def tensors(batch: Any, prefix: str = "batch") -> list[tuple[str, Tensor]]:
    """The tensors in a batch of any mappings and sequences, in order, each with the expression that reaches it."""
    if isinstance(batch, Tensor):
        return [(prefix, batch)]
    if isinstance(batch, Mapping):
        return [found for key, value in batch.items() for found in tensors(value, f"{prefix}[{key!r}]")]
    if isinstance(batch, (list, tuple)):
        return [found for i, value in enumerate(batch) for found in tensors(value, f"{prefix}[{i}]")]
    return []


def after(owner: Any, name: str, then: Callable[[Any], None]) -> None:
    """Make the method `name` of the object `owner` call `then` with its result before returning it."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        then(result)
        return result

    setattr(owner, name, wrapped)


def restore(owner: Any, *names: str) -> None:
    """Give the object `owner` the methods `names` of its class again: after a fit, and after one that did not end."""
    for name in names:
        owner.__dict__.pop(name, None)
