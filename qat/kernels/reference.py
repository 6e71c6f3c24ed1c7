"""The truth that every kernel is compared with: what training computed, from packed weights, in plain torch."""

from functools import cache
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from qat.functional import dequantize, dynamic_scale, fake_quantize
from qat.packing import unpack
from qat.scheme import QuantSpec


def packed_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    input_bits: int,
    input_scale: Tensor | None,
    input_rule: str,
) -> Tensor:
    """fq(x) @ dequantize(unpack(packed)).T + bias, the weight dequantized in float32 and cast to x's dtype.

    Arguments are those of `qat.kernels.packed_linear`, which checks them.  On the weight and scales that a
    `FakeQuantLinear` trains with, this equals its forward bit for bit (but for the sign of zeros, which
    integers do not keep).
    """
    codes = unpack(packed, bits, x.shape[-1])
    if zero_point is not None:
        # int16: the difference of two int8 codes
        codes = codes.short() - zero_point.short().repeat_interleave(group_size, -1)
    weight = dequantize(codes, scale).to(x.dtype)
    return F.linear(
        quantized_input(x, input_bits, input_scale, input_rule), weight, None if bias is None else bias.to(x.dtype)
    )


def quantized_input(
    x: Tensor, input_bits: int, input_scale: Tensor | None, input_rule: str, zero_point: Tensor | None = None
) -> Tensor:
    """fq(x) as training computes it: x itself for 0 bits, else by the static scale or one for each token.

    Args:
        x: (..., in), floating.
        input_bits: 0 or 2 to 8.
        input_scale: (1,), floating, or None for dynamic scales.
        input_rule: the `absmax_rule` of dynamic scales.
        zero_point: (1,), int8, of asymmetric activations, which have a static scale; None for 0.

    Returns:
        (..., in), x's dtype.
    """
    if input_bits == 0:
        return x
    spec = input_spec(input_bits, input_rule)
    scale = dynamic_scale(x, spec) if input_scale is None else input_scale.float().expand(*x.shape[:-1], 1)
    return fake_quantize(x, scale, spec, None if zero_point is None else zero_point.float().expand_as(scale))


@cache
def input_spec(input_bits: int, input_rule: Any) -> QuantSpec:
    """The spec of dynamically quantized activations."""
    return QuantSpec(bits=input_bits, granularity="token", dynamic=True, absmax_rule=input_rule)
