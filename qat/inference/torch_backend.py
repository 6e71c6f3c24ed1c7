"""Packed layers on the integer operators that torch itself has for CPUs.

    scheme                             operator                            weights
    w4a16, groups of 32/64/128/256     aten::_weight_int4pack_mm_for_cpu   (u - 8) * scale
    w8a16, channel                     aten::_weight_int8pack_mm           q * scale
    w8a8, channel                      aten::_int_mm                       q, scaled in the int32 result

They round differently from the reference: int4pack rounds scales and weights to x's dtype, the others scale
sums instead of weights.  A layer that fits no row stays as it is, and so do its activations: they are
quantized only where the scheme says so.
"""

import logging
from collections import Counter

import torch
from torch import Tensor, nn

from qat.functional import dynamic_scale, quantize
from qat.inference.packed import PackedLinear
from qat.kernels.reference import input_spec
from qat.packing import unpack

log = logging.getLogger(__name__)


class Int4Linear(nn.Module):
    """w4a16: `tiles` is torch's own order of the codes; `scale_and_zero` (groups, out, 2), the model's dtype."""

    operator = "_weight_int4pack_mm_for_cpu"
    tiles: Tensor
    scale_and_zero: Tensor
    bias: Tensor | None

    def __init__(self, layer: PackedLinear, dtype: torch.dtype):
        super().__init__()
        self.group_size = layer.group_size
        codes = unpack(layer.packed, 4, layer.in_features).int() + 8
        self.register_buffer("tiles", torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1))
        scale = layer.scale.T.to(dtype)
        self.register_buffer("scale_and_zero", torch.stack([scale, torch.zeros_like(scale)], -1).contiguous())
        self.register_buffer("bias", layer.bias)

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        rows = input.reshape(-1, input.shape[-1])
        out = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.tiles, self.group_size, self.scale_and_zero)
        return _finish(out, input, self.bias)


class Int8Linear(nn.Module):
    """w8a16: `codes` (out, in) int8; `scale` (out,), the model's dtype."""

    operator = "_weight_int8pack_mm"
    codes: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, layer: PackedLinear, dtype: torch.dtype):
        super().__init__()
        self.register_buffer("codes", unpack(layer.packed, 8, layer.in_features))
        self.register_buffer("scale", layer.scale[:, 0].to(dtype))
        self.register_buffer("bias", layer.bias)

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        out = torch._weight_int8pack_mm(input.reshape(-1, input.shape[-1]), self.codes, self.scale)
        return _finish(out, input, self.bias)


class Int8DynamicLinear(nn.Module):
    """w8a8: int8 products summed in int32, then scaled in float32; `codes` (in, out) int8, `scale` (out,) float32."""

    operator = "_int_mm"
    codes: Tensor
    scale: Tensor
    input_scale: Tensor | None
    bias: Tensor | None

    def __init__(self, layer: PackedLinear, dtype: torch.dtype):
        super().__init__()
        assert layer.scheme.input is not None
        self.spec = input_spec(layer.scheme.input.bits, layer.scheme.input.absmax_rule)
        self.register_buffer("codes", unpack(layer.packed, 8, layer.in_features).T)
        self.register_buffer("scale", layer.scale[:, 0].float())
        self.register_buffer("input_scale", layer.input_scale)
        self.register_buffer("bias", layer.bias)

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        rows = input.reshape(-1, input.shape[-1])
        static = self.input_scale
        scale = dynamic_scale(rows, self.spec) if static is None else static.float().expand(len(rows), 1)
        sums = torch._int_mm(quantize(rows, scale, self.spec).to(torch.int8), self.codes)
        return _finish((sums * scale * self.scale).to(input.dtype), input, self.bias)


def use_torch_operators(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace the packed layers of `model` that a torch operator computes; one log line says which.

    Args:
        model: on the CPU, with filled `PackedLinear` layers.
        dtype: of its activations.
    """
    counts: Counter[str] = Counter()
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, PackedLinear):
            continue
        kind = _operator_for(layer, dtype)
        counts[kind.operator if kind is not None else "reference (no torch operator fits the scheme)"] += 1
        if kind is not None:
            model.set_submodule(name, kind(layer, dtype))
    log.info("backend torch: %s", ", ".join(f"{n} layers on {operator}" for operator, n in counts.items()))


def _operator_for(
    layer: PackedLinear, dtype: torch.dtype
) -> type[Int4Linear] | type[Int8Linear] | type[Int8DynamicLinear] | None:
    weight, inputs = layer.scheme.weight, layer.scheme.input
    if layer.beyond_operator is not None:
        return None
    if weight.bits == 8 and inputs is not None and inputs.bits == 8 and weight.group_size is None:
        return Int8DynamicLinear
    if inputs is not None or dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return None
    if weight.bits == 8 and weight.group_size is None:
        return Int8Linear
    # The operator's tiles are 16 outputs wide.
    if weight.bits == 4 and layer.group_size in (32, 64, 128, 256) and layer.out_features % 16 == 0:
        return Int4Linear
    return None


def _finish(rows: Tensor, input: Tensor, bias: Tensor | None) -> Tensor:
    out = rows.reshape(*input.shape[:-1], -1)
    return out if bias is None else out + bias.to(out.dtype)
