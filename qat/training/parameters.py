"""Which parameters learn how fast: scales in groups of their own."""

from typing import Any

from torch import nn

from qat.fake_quantizer import FakeQuantizer


def scale_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The learned scales of `model`, in the order of its modules."""
    owners = [m for m in model.modules() if isinstance(m, FakeQuantizer)]
    return [q.scale for q in owners if isinstance(q.scale, nn.Parameter) and q.estimator.learns_scale]


def parameter_groups(model: nn.Module, lr: float, scale_lr: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: matrices, vectors (no decay), scales (own rate, no decay).

    Call it in `configure_optimizers`: `torch.optim.AdamW(qat.parameter_groups(self.model, ...))`.

    Args:
        model: with fake quantizers inserted.
        lr: of weights.
        scale_lr: of scales.
        weight_decay: of matrices.
    """
    scales = scale_parameters(model)
    known = {id(p) for p in scales}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
    groups = [
        {"params": [p for p in rest if p.dim() >= 2], "lr": lr, "weight_decay": weight_decay},
        {"params": [p for p in rest if p.dim() < 2], "lr": lr, "weight_decay": 0.0},
        {"params": scales, "lr": scale_lr, "weight_decay": 0.0},
    ]
    return [g for g in groups if g["params"]]
