"""The arithmetic of quantization: the only place that rounds or clamps.

Everything is computed in float32 from upcast inputs, by division (not by a reciprocal), rounding half to
even.  A scale always has one dimension less than the tensor's grouped view: `x` (..., in) with `scale`
(..., groups) means that x[..., g * n : (g + 1) * n] shares scale[..., g], n = in // groups.
"""

import torch
from torch import Tensor

from qat.scheme import QuantSpec

# Below these a scale's products leave the normal range of its dtype, where devices disagree about
# flushing to zero.  Weights that small are zero for every purpose.
SCALE_FLOOR = {torch.bfloat16: 2.0**-64, torch.float32: 2.0**-64, torch.float16: 2.0**-14}


def scale_dtype(spec: QuantSpec) -> torch.dtype:
    """The torch dtype in which an artifact stores the scales of `spec`."""
    return getattr(torch, spec.scale_dtype)


def store_scale(scale: Tensor, spec: QuantSpec) -> Tensor:
    """Round scales to the dtype the artifact stores them in, and keep them away from zero.

    Args:
        scale: any shape, floating; a negative one turns the unpaired code qmin to the positive side.

    Returns:
        Same shape, float32 values that `spec.scale_dtype` represents exactly.
    """
    dtype = scale_dtype(spec)
    return away_from_zero(scale.float(), SCALE_FLOOR[dtype]).to(dtype).float()


def away_from_zero(scale: Tensor, floor: float) -> Tensor:
    """Scales, any shape, of at least `floor` in magnitude and with the sign they have."""
    return scale.abs().clamp_(min=floor).copysign_(scale)


def absmax_scale(absmax: Tensor, spec: QuantSpec) -> Tensor:
    """The scale that covers `absmax` by the spec's rule, as the artifact stores it.

    Args:
        absmax: any shape, floating, not negative.

    Returns:
        Same shape, float32.
    """
    return store_scale(absmax.float() / spec.absmax_divisor, spec)


def grouped(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Views (..., groups, n) of x and (..., groups, 1) of scale that broadcast against each other."""
    return x.unflatten(-1, (scale.shape[-1], -1)), scale.unsqueeze(-1)


def zero_point(offset: Tensor, scale: Tensor, spec: QuantSpec) -> Tensor:
    """The code of 0 where code q stands for about q * scale + offset: clamp(round(-offset / scale), qmin, qmax).

    Args:
        offset: any shape, float32.
        scale: the same shape, as `store_scale` returns it.

    Returns:
        Same shape, float32 holding integers.
    """
    return (-offset / scale).round_().clamp_(spec.qmin, spec.qmax)


def quantize(x: Tensor, scale: Tensor, spec: QuantSpec, zero_point: Tensor | None = None) -> Tensor:
    """Codes of x: clamp(round(x / scale) + zero_point, qmin, qmax).

    On the odd grid, round to the nearest odd integer; of floats, the nearest e4m3 number to clamp(x / scale).

    Args:
        x: (..., in), floating.
        scale: (..., groups), float32, not zero, as `store_scale` returns it.
        zero_point: the shape of scale, float32 holding integers; None for 0.

    Returns:
        (..., in), float32 holding integers, or e4m3 numbers, in [qmin, qmax]: `code_dtype` holds them exactly.
    """
    view, divisor = grouped(x.float(), scale)
    if zero_point is not None:  # after rounding, as servers add it
        return (view / divisor).round_().add_(zero_point.unsqueeze(-1)).clamp_(spec.qmin, spec.qmax).flatten(-2)
    return round_clamp(view / divisor, spec).flatten(-2)


def round_clamp(ratio: Tensor, spec: QuantSpec) -> Tensor:
    """The codes of x / scale, float32; overwrites `ratio`, any shape.

    Floats saturate: they are clamped to the largest finite value, as servers' kernels do, and then rounded half to even
    by torch's cast, which would turn what is too large into NaN.

    Codes that are the high bits of wider ones are rounded from those, not from x (arXiv 2502.06786, eq. 6, with signed
    codes): clamp(round(code / step), qmin, qmax).  A step is a power of two, so nothing but that is rounded.
    """
    if spec.element == "float":
        return ratio.copy_(ratio.clamp_(spec.qmin, spec.qmax).to(torch.float8_e4m3fn))
    if spec.grid == "odd":  # exact, and halfway between two codes, an even integer, the upper one
        return ratio.div_(2).floor_().mul_(2).add_(1).clamp_(spec.qmin, spec.qmax)
    if spec.sliced_from is not None:
        ratio = round_clamp(ratio.mul_(spec.step), spec.parent).div_(spec.step)
    return ratio.round_().clamp_(spec.qmin, spec.qmax)


def code_dtype(spec: QuantSpec) -> torch.dtype:
    """The dtype of one byte that holds every code of `spec` exactly."""
    return torch.float8_e4m3fn if spec.element == "float" else torch.int8


def dequantize(codes: Tensor, scale: Tensor) -> Tensor:
    """codes * scale, in float32; exact for every supported width and 16-bit scale.

    Args:
        codes: (..., in), integers in any dtype, or e4m3 numbers.
        scale: (..., groups), any floating dtype.

    Returns:
        (..., in), float32.
    """
    view, factor = grouped(codes.float(), scale.float())
    return (view * factor).flatten(-2)


def fake_quantize(x: Tensor, scale: Tensor, spec: QuantSpec, zero_point: Tensor | None = None) -> Tensor:
    """dequantize(quantize(x)) in x's dtype: what training computes with.

    Args:
        x: (..., in), floating.
        scale: (..., groups), float32.
        zero_point: as of `quantize`.

    Returns:
        (..., in), x's dtype.
    """
    codes = quantize(x, scale, spec, zero_point)
    if zero_point is not None:
        codes = grouped(codes, scale)[0].sub_(zero_point.unsqueeze(-1)).flatten(-2)
    return dequantize(codes, scale).to(x.dtype)


def dynamic_scale(x: Tensor, spec: QuantSpec) -> Tensor:
    """The scale of each token, from the token itself.

    Args:
        x: (..., in), floating.

    Returns:
        (..., 1), float32.
    """
    absmax = x.detach().abs().amax(-1, keepdim=True).float()
    return (absmax / spec.absmax_divisor).clamp_(min=SCALE_FLOOR[torch.float32])


def cache_scale(x: Tensor, spec: QuantSpec) -> Tensor:
    """As `dynamic_scale`, in the dtype in which a cache keeps the scale beside the codes: of keys and values."""
    return store_scale(dynamic_scale(x, spec), spec)


def floor_codes(x: Tensor, scale: Tensor, spec: QuantSpec, codes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The lower of the two codes that a learned rounding chooses from, and where it starts between them.

    Args:
        x: (..., in), floating.
        scale: (..., groups), float32, not zero.
        codes: (..., in), integers that the choice shall hold beside their neighbour towards x; None for x's own two.

    Returns:
        (..., in) twice, float32: codes in [qmin, qmax - spacing], and how far x / scale is from them towards the next,
        in [0, 1]; with `codes`, the middle between that and the code.
    """
    view, divisor = grouped(x.float(), scale)
    ratio = (view / divisor).flatten(-2)
    step, first = spec.spacing, spec.qmin % spec.spacing
    if codes is None:
        lower = ((ratio - first) / step).floor_() * step + first
    else:
        lower = torch.where(codes > ratio, codes - step, codes)
    lower = lower.clamp_(spec.qmin, spec.qmax - step)
    rest = ((ratio - lower) / step).clamp_(0, 1)
    return lower, rest if codes is None else (rest + (codes - lower) / step) / 2


def rectified_sigmoid(v: Tensor) -> Tensor:
    """h = clip(1.2 sigmoid(v) - 0.1, 0, 1), any shape: a soft bit (arXiv 2004.10568, eq. 23; differentiable)."""
    return (1.2 * torch.sigmoid(v) - 0.1).clamp(0, 1)
