"""Estimators define what gradient passes a quantizer, and which scale it uses while it learns.

With v = x / s, inside = (qmin <= v <= qmax) and g the gradient of the quantized tensor:

    STE (arXiv 1308.3432, section 4; clipped as in arXiv 1806.08342):  dx = g * inside
    LSQ (arXiv 1902.08153, eqs. 3 and 5):  dx = g * inside
        ds = scale_gradient * sum over the group of g * (round(v) - v   inside,
                                                          qmin or qmax   outside)

An estimator is a small frozen value without state, shared by all quantizers of a model.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from qat.functional import absmax_scale, fake_quantize, grouped, round_clamp, store_scale
from qat.scheme import QuantSpec


class Estimator(Protocol):
    """What a fake quantizer asks of an estimator."""

    @property
    def learns_scale(self) -> bool:
        """Whether the scale is a parameter that the optimizer moves."""
        ...

    def scale(self, x: Tensor, stored: Tensor, spec: QuantSpec) -> Tensor:
        """The scale this forward uses, (..., groups) float32, given the stored one of the same shape."""
        ...

    def backward(
        self, grad: Tensor, x: Tensor, scale: Tensor, spec: QuantSpec, needs_scale: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Gradients of x (..., in) and, if needed, of the scale (..., groups), given that of fq(x)."""
        ...


def inside_range(x: Tensor, scale: Tensor, spec: QuantSpec) -> Tensor:
    """Whether x / scale lies in [qmin, qmax]; bool, x's shape."""
    view, divisor = grouped(x.float(), scale)
    ratio = view / divisor
    return ((ratio >= spec.qmin) & (ratio <= spec.qmax)).flatten(-2)


@dataclass(frozen=True)
class STE:
    """Straight-through: the gradient passes where the value was not clipped.

    Attributes:
        follow: recompute the absmax scale of each group from the values of every forward; False keeps
            the calibrated scale.
    """

    follow: bool = False
    learns_scale = False

    def scale(self, x: Tensor, stored: Tensor, spec: QuantSpec) -> Tensor:
        if not self.follow:
            return store_scale(stored, spec)
        absmax = grouped(x.detach(), stored)[0].abs().amax(-1)
        return absmax_scale(absmax.amax(0, keepdim=True) if len(stored) == 1 else absmax, spec)

    def backward(
        self, grad: Tensor, x: Tensor, scale: Tensor, spec: QuantSpec, needs_scale: bool
    ) -> tuple[Tensor, Tensor | None]:
        return grad * inside_range(x, scale, spec), None


@dataclass(frozen=True)
class LSQ:
    """Learned step size: the scale is a parameter with its own gradient (arXiv 1902.08153).

    Attributes:
        scale_gradient: multiplies the scale's gradient by 1 / sqrt(n * qmax), n being the values that
            share a scale (section 2.2 of the paper, per group and not per tensor).
    """

    scale_gradient: bool = True
    learns_scale = True

    def scale(self, x: Tensor, stored: Tensor, spec: QuantSpec) -> Tensor:
        return store_scale(stored, spec)

    def backward(
        self, grad: Tensor, x: Tensor, scale: Tensor, spec: QuantSpec, needs_scale: bool
    ) -> tuple[Tensor, Tensor | None]:
        view, divisor = grouped(x.float(), scale)
        ratio = view / divisor
        codes = round_clamp(ratio.clone(), spec)
        inside = (ratio >= spec.qmin) & (ratio <= spec.qmax)
        grad_view = grad.float().unflatten(-1, view.shape[-2:])
        grad_x = (grad_view * inside).flatten(-2).to(grad.dtype)
        if not needs_scale:
            return grad_x, None
        slope = codes.sub_(ratio.mul_(inside)).mul_(grad_view)
        grad_scale = slope.sum(-1)
        if self.scale_gradient:
            shared = x.numel() // max(scale.numel(), 1)
            grad_scale /= (shared * spec.qmax) ** 0.5
        return grad_x, grad_scale


class FakeQuantize(torch.autograd.Function):
    """fq(x) with the gradient of an estimator; for activations (a weight's is fused into its product)."""

    @staticmethod
    def forward(ctx, x: Tensor, stored: Tensor, scale: Tensor, spec: QuantSpec, estimator: Estimator) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.spec, ctx.estimator = spec, estimator
        return fake_quantize(x, scale, spec)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, scale = ctx.saved_tensors
        grad_x, grad_scale = ctx.estimator.backward(grad, x, scale, ctx.spec, ctx.needs_input_grad[1])
        return grad_x, grad_scale, None, None, None
