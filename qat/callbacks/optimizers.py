"""Give the learned scales a learning rate of their own in optimizers that somebody else's module builds."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import CyclicLR, LRScheduler, OneCycleLR

from qat.training import scale_parameters

_SPLIT = "qat_scales"  # marks a parameter group that holds scales


@contextmanager
def scale_groups(model: nn.Module, scale_lr: float, scale_decay: float = 0.0) -> Iterator[None]:
    """Within, an optimizer that is built puts the scales of `model` in groups with `scale_lr` and `scale_decay`.

    The groups are split while the optimizer is built, and not after: schedulers read the number and the
    rates of the groups when they are built themselves.  Groups that hold scales only are left alone
    where they have a rate of their own; without one they would train at that of weights that do not learn.
    """
    parameters = scale_parameters(model)
    scales = {id(p) for p in parameters}
    frozen = [p for p in parameters if not p.requires_grad]
    for scale in frozen:  # a run resumed after the freeze needs the same groups as the one it goes on with
        scale.requires_grad_(True)
    original = torch.optim.Optimizer.add_param_group

    def add_split(self: torch.optim.Optimizer, param_group: dict[str, Any]) -> None:
        params = param_group["params"]
        params = [params] if isinstance(params, torch.Tensor) else list(params)
        ours = [p for p in params if id(_tensor(p)) in scales]
        rest = [p for p in params if id(_tensor(p)) not in scales]
        if not ours or (not rest and "lr" in param_group):
            return original(self, {**param_group, "params": params})
        if rest:
            original(self, {**param_group, "params": rest})
        own = {"params": ours, "lr": scale_lr, "weight_decay": scale_decay, _SPLIT: True}
        return original(self, {**param_group, **own})

    torch.optim.Optimizer.add_param_group = add_split  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.optim.Optimizer.add_param_group = original  # type: ignore[method-assign]
        for scale in frozen:
            scale.requires_grad_(False)


def _tensor(param: Any) -> torch.Tensor:
    return param[1] if isinstance(param, tuple) else param  # optimizers also take (name, parameter)


def check_optimizers(model: nn.Module, built: Any, scale_lr: float) -> None:
    """Every learned scale must be in an optimizer, and every scheduler must leave it its own rate.

    `built` is whatever `configure_optimizers` returned.  `OneCycleLR` sets all groups to its `max_lr`; for the
    scales that curve is scaled to peak at `scale_lr`.

    Raises:
        ValueError: a scale is in no optimizer, or a `CyclicLR` overwrites the scales' rate.
    """
    optimizers, schedulers = _instances(built, torch.optim.Optimizer), _instances(built, LRScheduler)
    held = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
    missing = sum(id(p) not in held for p in scale_parameters(model))
    if missing:
        raise ValueError(
            f"{missing} learned scales are in no optimizer: configure_optimizers chooses parameters by itself. Add "
            "qat.training.scale_parameters(self), or build the groups with qat.training.parameter_groups(self, ...)"
        )
    for scheduler in schedulers:
        split = [g for g in scheduler.optimizer.param_groups if g.get(_SPLIT)]
        if split and isinstance(scheduler, CyclicLR):
            raise ValueError(
                "CyclicLR gives every parameter group the same rate, scales included: build the groups with "
                "qat.training.parameter_groups(self, ...) and pass base_lr and max_lr as lists"
            )
        if isinstance(scheduler, OneCycleLR):
            for group in split:
                factor = scale_lr / group["max_lr"]
                for key in ("initial_lr", "max_lr", "min_lr", "lr"):
                    group[key] *= factor


def _instances(built: Any, kind: type) -> list[Any]:
    """All objects of `kind` in the nested lists, tuples and dicts that `configure_optimizers` may return."""
    if isinstance(built, kind):
        return [built]
    if isinstance(built, dict):
        built = list(built.values())
    return [found for item in built for found in _instances(item, kind)] if isinstance(built, (list, tuple)) else []
