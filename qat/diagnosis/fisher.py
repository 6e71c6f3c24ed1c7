"""The trace of each weight's Fisher information: a cheap stand-in for its Hessian's.

For the negative log-likelihood of a softmax, the Fisher information F is the (generalized) Gauss-Newton part of the
Hessian (Martens, arXiv 1412.1193), and positive semidefinite.  With labels y_t *drawn from the model itself* the
gradients of different tokens are independent with mean 0, so that

    E || sum over t of grad log p(y_t) ||^2 = sum over t of E || grad log p(y_t) ||^2 = sum over t of Tr F_t

and one backward pass over a whole batch is an unbiased estimate.  Data's own labels would give the "empirical Fisher",
which has no such tie to the Hessian (arXiv 1905.12558).
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORE = -100  # cross_entropy's own mark of a position without a label


def fisher_traces(
    weights: Mapping[str, torch.nn.Parameter],
    batches: Iterable[Any],
    forward: Callable[[Any], Tensor],
    seed: int = 0,
) -> dict[str, float]:
    """Tr F of each weight, in nats per token and per squared unit of weight.

    Args:
        weights: by name.
        batches: mappings with `labels` (batch, tokens); only where they are not -100 is a token counted.
        forward: batch -> logits (batch, tokens, classes), differentiable in the weights.
        seed: of the drawn labels.
    """
    sums, tokens = dict.fromkeys(weights, 0.0), 0
    needed = {name: weight.requires_grad for name, weight in weights.items()}
    generator: torch.Generator | None = None
    try:
        for weight in weights.values():
            weight.requires_grad_(True)
        for batch in batches:
            with torch.enable_grad():
                logits = forward(batch)
                logs = F.log_softmax(logits[batch["labels"].to(logits.device) != IGNORE].float(), -1)
                generator = generator or torch.Generator(logits.device).manual_seed(seed)
                drawn = torch.multinomial(logs.detach().exp(), 1, generator=generator)
                nll = -logs.gather(1, drawn).sum()
                gradients = torch.autograd.grad(nll, list(weights.values()), allow_unused=True)
            for name, gradient in zip(weights, gradients, strict=True):
                if gradient is not None:  # an expert that no token of this batch chose has none: 0
                    sums[name] += float(gradient.float().square().sum())
            tokens += len(drawn)
    finally:
        for name, weight in weights.items():
            weight.requires_grad_(needed[name])
    return {name: total / tokens for name, total in sums.items()}
