"""Which parameters learn how fast, and what becomes of a step: scales in groups of their own."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qat.fake_quantizer import FakeQuantizer
from qat.functional import SCALE_FLOOR, away_from_zero


def scale_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The learned scales of `model`, and the offsets that learn with them, in the order of its modules."""
    return [part for q in _learning(model) for part in q.learned if isinstance(part, nn.Parameter)]


def _learning(model: nn.Module) -> list[FakeQuantizer]:
    owners = [m for m in model.modules() if isinstance(m, FakeQuantizer)]
    return [q for q in owners if q.scale is not None and q.estimator.learns_scale]


def scale_steps(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[RemovableHandle]:
    """Finish every step of `optimizer`: keep the scales of `model` away from zero, and make relative steps relative.

    Where an estimator learns log2 |s|, the optimizer was given its gradient, and the step d that it took is the step
    of log2 |s|: s becomes s * 2^d.  That is exact for optimizers whose step does not look at the parameter's value
    (SGD and Adam without weight decay), loses less to rounding than a stored logarithm would, and leaves s in the
    checkpoint.

    Args:
        optimizer: any; may hold none of the scales.
        model: with fake quantizers inserted.

    Returns:
        Handles whose `remove()` takes this back.
    """
    before: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def remember(*_: Any) -> None:
        before.update(
            {q.scale: q.scale.clone() for q in _learning(model) if q.scale is not None and q.estimator.relative}
        )

    @torch.no_grad()
    def finish(*_: Any) -> None:
        for scale, old in before.items():
            scale.copy_(old * torch.exp2(scale - old))
        before.clear()
        for quantizer in _learning(model):
            assert quantizer.scale is not None
            quantizer.scale.copy_(away_from_zero(quantizer.scale, SCALE_FLOOR[torch.float32]))

    return [optimizer.register_step_pre_hook(remember), optimizer.register_step_post_hook(finish)]


def parameter_groups(
    model: nn.Module, lr: float, scale_lr: float, weight_decay: float = 0.0, scale_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: matrices, vectors (no decay), scales (own rate and decay).

    Call it in `configure_optimizers`: `torch.optim.AdamW(qat.parameter_groups(self.model, ...))`.

    Args:
        model: with fake quantizers inserted.
        lr: of weights.
        scale_lr: of scales.
        weight_decay: of matrices.
        scale_decay: of scales; PACT's regularizer.
    """
    scales = scale_parameters(model)
    known = {id(p) for p in scales}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
    groups = [
        {"params": [p for p in rest if p.dim() >= 2], "lr": lr, "weight_decay": weight_decay},
        {"params": [p for p in rest if p.dim() < 2], "lr": lr, "weight_decay": 0.0},
        {"params": scales, "lr": scale_lr, "weight_decay": scale_decay},
    ]
    return [g for g in groups if g["params"]]
