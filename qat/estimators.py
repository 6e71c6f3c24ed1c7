"""Estimators define what gradient passes a quantizer, and which scale it uses while it learns.

With v = x / s, inside = (qmin <= v <= qmax), code = clamp(round(v)) and g the gradient of the quantized tensor:

    STE (arXiv 1308.3432, section 4; 0 where clipped, as in arXiv 2203.11086, section 2.1):  dx = g * inside
    LSQ (arXiv 1902.08153, sections 2.1 and 2.2):  dx = g * inside
        ds = scale_gradient * sum over the group of g * (round(v) - v   inside,
                                                          qmin or qmax   outside)
    LSQ, relative (after TQT, arXiv 1903.08066):  d(log2 s) = ds * s * ln 2
    DSQ (arXiv 1908.05033, section 3.2):  LSQ with soft'(v) >= 0 of mean 1 in the place of the straight line's 1:
        dx = g * soft'(v) * inside,   ds = scale_gradient * sum of g * (code - v * soft'(v) * inside)
    PACT (arXiv 1805.06085, eq. 3), two-sided:  dx = g * inside,   ds = sum of g * code outside

    SEQ (ParetoQ, arXiv 2502.02631):  LSQ on a symmetric grid, inside = (|v| <= qmax + half a step)
    LSQ+ (arXiv 2004.09576), v = (x - offset) / s:  LSQ, and
        d offset = scale_gradient * sum of g outside

A value on the outermost code, up to rounding in its dtype, is inside, as in 2203.11086; the papers of LSQ and PACT
count it as clipped.  GPTQ leaves many weights there, a dynamic scale the largest value of each token, and no gradient
would reach them.

Where codes are the high bits of wider ones (`QuantSpec.at`), s is step times the stored scale: dx is that of an
ordinary quantizer of this width, straight through both roundings, and that of the stored scale is step * ds.

All of them end in codes, a scale and an integer zero point, which is what artifacts hold.

An estimator is a small frozen value without state, shared by all quantizers of a model.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from qat.functional import absmax_scale, fake_quantize, grouped, round_clamp, store_scale
from qat.observers import mse_scale
from qat.scheme import QuantSpec


class Estimator(Protocol):
    """What a fake quantizer asks of an estimator; a subclass overrides what it does differently."""

    @property
    def learns_scale(self) -> bool:
        """Whether the scale is a parameter that the optimizer moves."""
        ...

    @property
    def relative(self) -> bool:
        """Whether the scale's gradient and steps are those of log2 |scale| (`qat.training.scale_steps`)."""
        return False

    def at(self, progress: float) -> "Estimator":
        """The estimator after `progress`, from 0 to 1, of the steps that train through quantizers."""
        return self

    def margin(self, spec: QuantSpec) -> float:
        """How far beyond the outermost codes of `spec` the gradient of x still passes, in scales."""
        return 0.0

    def refusal(self, spec: QuantSpec) -> str | None:
        """Why a tensor of `spec` cannot be trained so; None if it can."""
        if not spec.symmetric:
            return f"{type(self).__name__} knows no zero point, and the spec is asymmetric: use estimator=lsq_plus"
        return None

    def scale(self, x: Tensor, stored: Tensor, spec: QuantSpec) -> Tensor:
        """The scale this forward uses, (..., groups) float32, given the stored one of the same shape."""
        return store_scale(stored, spec)

    def backward(
        self, grad: Tensor, x: Tensor, scale: Tensor, spec: QuantSpec, needs_scale: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Gradients of x (..., in) and, if needed, of the stored scale (..., groups), given that of fq(x)."""
        ...


def inside_range(x: Tensor, scale: Tensor, spec: QuantSpec, margin: float = 0.0) -> Tensor:
    """Whether x / scale lies in [qmin, qmax] up to rounding in x's dtype, or at most `margin` beyond; x's shape."""
    view, divisor = grouped(x.float(), scale)
    return _inside(view / divisor, spec, x.dtype, margin).flatten(-2)


def _inside(ratio: Tensor, spec: QuantSpec, dtype: torch.dtype, margin: float = 0.0) -> Tensor:
    # What was written as code * scale in `dtype`, or what a dynamic scale was made for, is divided back to its code
    # only up to rounding.
    slack = 1 + torch.finfo(dtype).eps / 2 + torch.finfo(torch.float32).eps
    return (ratio >= spec.qmin * slack - margin) & (ratio <= spec.qmax * slack + margin)


@dataclass(frozen=True)
class STE(Estimator):
    """Straight-through: the gradient passes where the value was not clipped.

    Attributes:
        follow: recompute the scale of each group of a weight in every forward: the one that covers its `absmax`,
            or the one with the smallest squared error (`mse`, a search that costs 48 fake quantizations).  None
            keeps the calibrated scale.  Activations keep theirs.

    Raises:
        ValueError: another `follow`.
    """

    follow: Literal["absmax", "mse"] | None = None
    learns_scale = False

    def __post_init__(self) -> None:
        if self.follow not in (None, "absmax", "mse"):
            raise ValueError(f"STE follows absmax, mse or nothing (null), got follow={self.follow!r}")

    def scale(self, x: Tensor, stored: Tensor, spec: QuantSpec) -> Tensor:
        if self.follow is None:
            return store_scale(stored, spec)
        if self.follow == "mse":
            return mse_scale(x.detach(), (stored.shape[0], stored.shape[-1]), spec)
        absmax = grouped(x.detach(), stored)[0].abs().amax(-1)
        return absmax_scale(absmax.amax(0, keepdim=True) if len(stored) == 1 else absmax, spec)

    def backward(
        self, grad: Tensor, x: Tensor, scale: Tensor, spec: QuantSpec, needs_scale: bool
    ) -> tuple[Tensor, Tensor | None]:
        return grad * inside_range(x, scale, spec), None


@dataclass(frozen=True)
class LSQ(Estimator):
    """Learned step size: the scale is a parameter with its own gradient (arXiv 1902.08153).

    The paper starts from s = 2 mean|x| / sqrt(qmax); here a calibration sets it.

    Attributes:
        scale_gradient: multiplies the scale's gradient by 1 / sqrt(n * qmax) (section 2.2 of the paper), n being the
            weights that share a scale, where the paper has one for the tensor, or the features of a token.  Nested
            widths share their parent's qmax: with one factor for all, what the scale follows is the gradient of the
            sum of their losses.
        relative: learn log2 |scale|, as TQT does (arXiv 1903.08066): a step of the optimizer moves small and large
            scales by the same factor, and never changes a sign.  What is stored is the scale all the same.  TQT's
            scales are powers of two, one a tensor, without `scale_gradient`, and its gradient passes half a scale
            beyond the outermost codes; here artifacts hold any scale, and what is inside is as for LSQ.
    """

    scale_gradient: bool = True
    relative: bool = False
    learns_scale = True

    def backward(
        self, grad: Tensor, x: Tensor, scale: Tensor, spec: QuantSpec, needs_scale: bool
    ) -> tuple[Tensor, Tensor | None]:
        view, divisor = grouped(x.float(), scale)
        ratio = view / divisor
        codes = round_clamp(ratio.clone(), spec)
        slope = self._slope(ratio, _inside(ratio, spec, x.dtype, self.margin(spec)))
        grad_view = grad.float().unflatten(-1, view.shape[-2:])
        grad_x = (grad_view * slope).flatten(-2).to(grad.dtype)
        if not needs_scale:
            return grad_x, None
        grad_scale = codes.sub_(ratio.mul_(slope)).mul_(grad_view).sum(-1)
        return grad_x, self._as_learned(grad_scale, x.numel(), scale, spec)

    def of_codes(self, grad: Tensor, codes: Tensor, scale: Tensor, spec: QuantSpec) -> Tensor:
        """The scale's gradient where codes are constants (arXiv 2407.11062, section 3.3): ds = sum of g * code, exact.

        Args:
            grad: (out, in), floating, of code * s.
            codes: (out, in), integers in any dtype.
            scale: (out, groups), float32.

        Returns:
            (out, groups), float32, by `scale_gradient` and `relative` as in `backward`.
        """
        view = grouped(codes.float(), scale)[0]
        grad_scale = grad.float().unflatten(-1, view.shape[-2:]).mul(view).sum(-1)
        return self._as_learned(grad_scale, codes.numel(), scale, spec)

    def _as_learned(self, grad_scale: Tensor, count: int, scale: Tensor, spec: QuantSpec) -> Tensor:
        if self.scale_gradient:
            grad_scale /= (count // max(scale.numel(), 1) * spec.parent.qmax) ** 0.5
        return grad_scale.mul_(scale).mul_(math.log(2)) if self.relative else grad_scale.mul_(spec.step)

    def _slope(self, ratio: Tensor, inside: Tensor) -> Tensor:
        """The slope of the function that stands in for quantization; 0 where not `inside`."""
        return inside


@dataclass(frozen=True)
class SEQ(LSQ):
    """Stretched elastic quantization (SEQ, of ParetoQ: arXiv 2502.02631): LSQ for grids of few levels.

    The paper's k levels are those of alpha * (round(clip(w / alpha, -1, 1) * k / 2 - 1/2) + 1/2) * 2 / k: they fill
    [-alpha, alpha] evenly, and a weight gets its gradient in all of it, the outer halves of the outermost bins too,
    which LSQ clips.  Its alpha is 2^bits scales here on the odd grid (k = 4 at 2 bits, the levels +-1/4 and +-3/4 of
    alpha), and 3/2 of a scale on the ternary one (k = 3; with neither 1/2, as in the authors' code, so that 0 is a
    level).  That code clips at 0.99 alpha, lest the largest weight round to a level that is not there; here codes are
    clamped after rounding.  It starts from alpha = max|w|, which is the scale of `calibration=absmax`, and its
    counterpart of `scale_gradient` differs by a constant, which Adam divides out.  The full grid, which is not
    symmetric around zero, is left to LSQ, as in the paper.
    """

    def margin(self, spec: QuantSpec) -> float:
        return 0.0 if spec.grid == "full" else spec.spacing / 2


@dataclass(frozen=True)
class LSQPlus(LSQ):
    """LSQ that learns the offset of asymmetric activations too (LSQ+, arXiv 2004.09576).

    The paper's x = code * s + offset is computed, from the first step on, with the offset rounded to a whole number of
    scales: (code - z) * s, z = `qat.functional.zero_point`.  The rounding is passed straight through, so gradients are
    the paper's.  Symmetric tensors are trained as by LSQ.

    Raises:
        ValueError: `relative`: an offset has no logarithm.
    """

    def __post_init__(self) -> None:
        if self.relative:
            raise ValueError("LSQPlus learns offsets, which have no logarithm: relative must be false")

    def refusal(self, spec: QuantSpec) -> str | None:
        return None

    def backward_shifted(
        self, grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of x (..., in), of the scale and of the offset (..., groups), given that of fq(x).

        Args:
            grad, x: (..., in), floating.
            scale, zero_point: (..., groups), float32.
            spec: of x.
        """
        view, divisor = grouped(x.float(), scale)
        ratio, zero = view / divisor, zero_point.unsqueeze(-1)
        inside = (ratio >= spec.qmin - zero) & (ratio <= spec.qmax - zero)
        grad_view = grad.float().unflatten(-1, view.shape[-2:])
        rounded = ratio.round()
        slope = torch.where(inside, rounded - ratio, (rounded + zero).clamp_(spec.qmin, spec.qmax))
        of_scale = self._as_learned(slope.mul_(grad_view).sum(-1), x.numel(), scale, spec)
        of_offset = self._as_learned(grad_view.mul(~inside).sum(-1), x.numel(), scale, spec)
        return (grad_view * inside).flatten(-2).to(grad.dtype), of_scale, of_offset


@dataclass(frozen=True)
class DSQ(LSQ):
    """LSQ whose gradient hardens: from a straight line at first towards the staircase that forward always is.

    Between two codes rounding is taken for soft(v) = n + 1/2 + tanh(k (v - n - 1/2)) / (2 tanh(k / 2)), which is v as
    k -> 0 and the staircase as k -> infinity (arXiv 1908.05033, section 3.2, in units of the scale).  Values near a
    rounding border then get more than their gradient, those near a code less, and settle there.  Forward rounds hard
    at all times, so what is trained is what is shipped.

    The paper learns how hard the function is, by alpha = 1 - tanh(k / 2), and both ends of the range (sections 3.3 and
    3.4); here k follows a schedule, the same for all tensors, and the scale learns as LSQ's.

    Attributes:
        start, end: k before and after training, moved through geometrically.
        progress: how much of training is done, from 0 to 1; a callback moves it.

    Raises:
        ValueError: k is not positive.
    """

    start: float = 1.0
    end: float = 4.0
    progress: float = 0.0

    def __post_init__(self) -> None:
        if not (self.start > 0 and self.end > 0):
            raise ValueError(f"DSQ's sharpness must be positive, got start={self.start}, end={self.end}")

    @property
    def sharpness(self) -> float:
        """k now."""
        return self.start * (self.end / self.start) ** self.progress

    def refusal(self, spec: QuantSpec) -> str | None:
        if spec.grid == "odd":
            return "DSQ's staircase stands on the integers, and the odd grid does not: use estimator=seq or lsq"
        if spec.element == "float":
            return "DSQ's staircase has even steps, and FP8's are not: use estimator=lsq, or kv_cache=int8"
        return super().refusal(spec)

    def at(self, progress: float) -> "DSQ":
        return replace(self, progress=progress)

    def _slope(self, ratio: Tensor, inside: Tensor) -> Tensor:
        k = self.sharpness
        offset = ratio.frac().abs_().sub_(0.5)  # from the middle between two codes; its sign does not matter
        return offset.mul_(k).tanh_().square_().neg_().add_(1).mul_(k / (2 * math.tanh(k / 2))).mul_(inside)


@dataclass(frozen=True)
class PACT(Estimator):
    """Learned clipping of static activations (arXiv 1805.06085): only clipped values say where to clip.

    The paper clips at 0 and at a learned alpha, whose gradient is the sum of g where x >= alpha (eqs. 1 and 3); signed
    activations are clipped at qmin * s and at alpha = qmax * s.  Its regularizer, lambda * alpha^2, is a weight decay
    of the scales: `scale_decay` of `QuantizationAwareTraining` and of `qat.parameter_groups`.  Without it a level only
    moves where values are clipped.  The paper starts from a large alpha, which that brings down; here a calibration
    sets it.
    """

    learns_scale = True

    def refusal(self, spec: QuantSpec) -> str | None:
        if spec.granularity != "tensor" or spec.dynamic:
            return f"PACT learns where to clip static activations, and a scale for each {spec.granularity} is not that"
        if spec.nested:
            return f"PACT learns one level to clip at, and {list(spec.widths)} bits clip at one each: use estimator=lsq"
        return super().refusal(spec)

    def backward(
        self, grad: Tensor, x: Tensor, scale: Tensor, spec: QuantSpec, needs_scale: bool
    ) -> tuple[Tensor, Tensor | None]:
        view, divisor = grouped(x.float(), scale)
        ratio = view / divisor
        inside = _inside(ratio, spec, x.dtype)
        grad_view = grad.float().unflatten(-1, view.shape[-2:])
        grad_x = (grad_view * inside).flatten(-2).to(grad.dtype)
        if not needs_scale:
            return grad_x, None
        return grad_x, round_clamp(ratio, spec).mul_(~inside).mul_(grad_view).sum(-1)


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


class FakeQuantizeShifted(torch.autograd.Function):
    """fq(x) of asymmetric activations, with the gradients of LSQ+."""

    @staticmethod
    def forward(
        ctx, x: Tensor, stored: Tensor, offset: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec,
        estimator: LSQPlus,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, scale, zero_point)
        ctx.spec, ctx.estimator = spec, estimator
        return fake_quantize(x, scale, spec, zero_point)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, scale, zero_point = ctx.saved_tensors
        return *ctx.estimator.backward_shifted(grad, x, scale, zero_point, ctx.spec), None, None, None, None
