"""The health of training through quantizers, in a few figures that cost next to nothing.

    oscillation      share of the weights whose code turned back in a step (arXiv 2203.11086), mean of the steps since
                     the last look
    changed          share of the weights whose code is not what it was at the last look
    clipped          share of the weights beyond the estimator's range: no gradient reaches them
    scale_drift      mean |s / s0 - 1|, s0 being the scales that training started from
    gradient_ratio   (||ds|| / ||s||) / (||dW|| / ||W||) (R of arXiv 1902.08153, section 2.2), over the whole model

Shares are those of a sample: about 32 rows of each weight (all of fewer than 64), evenly spread, always the same.

LIMITS were set by the embedded model at w4a16 g128: LSQ from MSE scales, 40 steps of 2,048 tokens, a look every 10, one
rate for weights and scales.  1e-4 is the recipe's rate; 1e-3 cost an earlier such model 23 millinats.

    rate     oscillation        changed        clipped        scale_drift    gradient_ratio
    1e-4     0.0008 to 0.0011   0.014 - 0.023  0.017          0.012 - 0.021  1.1 - 1.2
    1e-3     0.008 to 0.010     0.15 - 0.27    0.019 - 0.022  0.11 - 0.18    1.1 - 1.2
    5e-3     0.025 to 0.044     0.34 - 0.67    0.040 - 0.065  0.54 - 0.86    1.0 - 1.9

The recipe, which starts from GPTQ and so from weights in the middle of their bins, changes almost no code in 40 steps:
changed below 5e-5, clipped 0.008 to 0.011, scale_drift 0.007 to 0.016, gradient_ratio 0.7 to 0.9.
"""

import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from qat.estimators import inside_range
from qat.functional import quantize
from qat.insertion import layers, quantizers
from qat.nn import FakeQuantLayer
from qat.training.oscillation import Turns

FIGURES = ("oscillation", "changed", "clipped", "scale_drift", "gradient_ratio")
ROWS = 32
"""Rows watched of each weight, about."""

LIMITS = {
    "oscillation": (0.0, 0.005, "lower the learning rate, or damp: callbacks.oscillation.damping"),
    "changed": (0.0, 0.1, "lower the learning rate: codes change faster than they can settle"),
    "clipped": (0.0, 0.04, "start from other scales (calibration=mse), or raise callbacks.quantization.scale_lr"),
    "scale_drift": (0.0, 0.1, "lower callbacks.quantization.scale_lr"),
    "gradient_ratio": (0.05, 20.0, "keep estimator.scale_gradient=true, or train with estimator=lsq_log"),
}


class Health:
    """Watches the weights of a model from step to step; changes nothing in it.

    Its state, about 3 bytes a watched weight, is plain tensors.
    """

    def __init__(self) -> None:
        self.turns: dict[str, Turns] = {}
        self.looked: dict[str, Tensor] = {}
        self.started: dict[str, Tensor] = {}
        self.turned: dict[str, Tensor] = {}
        self.steps = 0

    @torch.no_grad()
    def start(self, model: nn.Module) -> None:
        """Take what the quantizers that became active use now as the start; others are not watched yet."""
        for name, layer in layers(model).items():
            if name in self.turns or not layer.weight_quantizer.active:
                continue
            codes, scale, _ = _watched(layer)
            self.turns[name], self.looked[name] = Turns(codes), codes.to(torch.int8)
            self.started[name] = scale.clone()
            self.turned[name] = torch.zeros((), device=codes.device)

    @torch.no_grad()
    def step(self, model: nn.Module) -> None:
        """After an optimizer step: see which codes turned back."""
        for name, layer in layers(model).items():
            if name in self.turns:
                codes = _watched(layer)[0]
                self.turned[name] = self.turned[name].to(codes.device) + self.turns[name](codes).sum()
        self.steps += 1

    @torch.no_grad()
    def look(self, model: nn.Module) -> dict[str, float]:
        """The figures since the last look but `gradient_ratio`, which `gradient_ratio()` gives; reads the device once.

        Raises:
            ValueError: nothing is watched, or no step was taken since.
        """
        if not (self.turns and self.steps):
            raise ValueError("health needs active quantizers and a step since the last look")
        sums: list[Tensor] = []
        weights = scales = 0
        for name, layer in layers(model).items():
            if name not in self.turns:
                continue
            codes, scale, clipped = _watched(layer)
            start = self.started[name].to(codes.device)
            drift = (scale / start - 1).abs().sum()
            changed = (codes != self.looked[name].to(codes.device)).sum()
            found = torch.stack([self.turned[name].to(codes.device), changed, clipped, drift])
            sums.append(found if not sums else found.to(sums[0].device))
            self.looked[name] = codes.to(torch.int8)
            self.turned[name] = torch.zeros((), device=codes.device)
            weights, scales = weights + codes.numel(), scales + start.numel()
        totals = torch.stack(sums).cpu().double().sum(0)
        each = torch.tensor([weights * self.steps, weights, weights, scales], dtype=torch.float64)
        self.steps = 0
        return dict(zip(FIGURES, (totals / each).tolist(), strict=False))

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors, for a checkpoint."""
        turns = {name: t.state_dict() for name, t in self.turns.items()}
        own = {"looked": self.looked, "started": self.started, "turned": self.turned}
        return {"turns": turns, "steps": self.steps, **{kind: dict(tensors) for kind, tensors in own.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was asked."""
        self.turns = {name: Turns.from_state(t) for name, t in state["turns"].items()}
        self.looked, self.started, self.turned = (dict(state[kind]) for kind in ("looked", "started", "turned"))
        self.steps = state["steps"]


@torch.no_grad()
def gradient_ratio(model: nn.Module) -> Tensor | None:
    """R of arXiv 1902.08153, section 2.2, over all learned scales and quantized weights; a scalar, float32.

    1: both would move by like shares of themselves.  None where no scale has a gradient, or no weight, as under LoRA.
    To be asked between backward and the step of the optimizer.
    """
    scales = [(q.scale, q.scale.grad, q) for q in quantizers(model) if q.scale is not None and q.scale.grad is not None]
    weights = [(p, p.grad) for p in (layer.weight for layer in layers(model).values()) if p.grad is not None]
    if not scales or not weights:
        return None
    # A relative estimator's gradient is that of log2 |s|.
    slopes = [grad / (s * math.log(2)) if q.estimator.relative else grad for s, grad, q in scales]
    of_scales = get_total_norm(slopes) / get_total_norm([s for s, _, _ in scales])
    return of_scales / (get_total_norm([grad for _, grad in weights]) / get_total_norm([w for w, _ in weights]))


def unusual(figures: Mapping[str, float | None], bits: Collection[int] = (4,)) -> dict[str, str]:
    """For each figure out of its usual range, a sentence that names the remedy.

    The ranges are wide around what trains well on the embedded model at 4 bits and 10 steps between looks; other rates
    and intervals differ, so a warning is a reason to look, and no verdict.  Where weights are narrower, nothing is said
    of clipping (at 2 bits 0.33 of them are clipped in a run that trains well), and where they are wider nothing of
    codes that change, their steps being smaller.

    Args:
        figures: of `Health.look`, and `gradient_ratio`.
        bits: the widths of the model's weights.
    """
    silent = {"clipped"} if min(bits) < 4 else set()
    silent |= {"oscillation", "changed"} if max(bits) > 4 else set()
    found = {}
    for name, (low, high, remedy) in LIMITS.items():
        value = figures.get(name)
        if name not in silent and value is not None and not low <= value <= high:
            found[name] = f"{name} is {value:.3g}, usually {low:g} to {high:g}: {remedy}"
    return found


def _every(layer: FakeQuantLayer) -> int:
    """The stride of the watched rows; 1 where one scale of the whole tensor may follow all of them."""
    assert layer.weight_quantizer.scale is not None
    # Odd: the size of a head is a power of two, and its rows shall be met at every place.
    return max(len(layer.weight_quantizer.scale) // ROWS, 1) | 1  # a row of scales for each of the weight, or one


def _watched(layer: FakeQuantLayer) -> tuple[Tensor, Tensor, Tensor]:
    """Of the watched rows: codes (rows, in) float32, scales (rows or 1, groups), and how many weights are clipped.

    The scales are those that learn, before rounding; where none learns, those in use.
    """
    quantizer, every = layer.weight_quantizer, _every(layer)
    assert quantizer.scale is not None
    rows = layer.adapted_rows(every).detach()
    used = quantizer.weight_scale(rows, every)
    scale = quantizer.scale.detach()[::every] if quantizer.estimator.learns_scale else used
    margin = quantizer.estimator.margin(quantizer.spec)
    clipped = (~inside_range(rows, used, quantizer.spec, margin)).sum()
    return quantize(rows, used, quantizer.spec), scale, clipped
