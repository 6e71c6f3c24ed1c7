"""What takes the place of each kind of float layer in a packed model."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qat.functional import dequantize, scale_dtype
from qat.inference.packed import PackedLinear
from qat.kernels.reference import quantized_input
from qat.nn import LAYERS
from qat.packing import unpack, words_of
from qat.scheme import QuantScheme


class _Packed(nn.Module):
    """Follows its model to another device, never to another dtype: a rounded scale is another model."""

    packed: Tensor
    scale: Tensor
    input_scale: Tensor | None
    input_zero_point: Tensor | None

    def _apply(self, fn: Any, recurse: bool = True) -> "_Packed":
        before = {name: self._buffers.get(name) for name in ("scale", "input_scale")}
        super()._apply(fn, recurse)
        for name, scale in before.items():
            if scale is not None and getattr(self, name).dtype != scale.dtype:
                setattr(self, name, scale.to(self.packed.device))
        return self


class PackedEmbedding(_Packed):
    """Packed rows, looked up and then dequantized: what a trained `FakeQuantEmbedding` becomes.

    State: `packed` (rows, words) int32 and `scale` (rows, groups) in the scheme's scale dtype, laid out as a linear
    layer's weight is, so that a tied output layer has the same tensors.  They are allocated, not filled.

    Args:
        out_features: rows of the table.
        in_features: of a row.
        scheme: how it is quantized.
        dtype: of what it returns.
    """

    def __init__(self, out_features: int, in_features: int, scheme: QuantScheme, dtype: torch.dtype):
        super().__init__()
        self.out_features, self.in_features, self.scheme, self.dtype = out_features, in_features, scheme, dtype
        words, groups = words_of(in_features, scheme.weight.bits), scheme.weight.groups(in_features)
        self.register_buffer("packed", torch.empty(out_features, words, dtype=torch.int32))
        self.register_buffer("scale", torch.empty(out_features, groups, dtype=scale_dtype(scheme.weight)))

    def forward(self, input: Tensor) -> Tensor:
        """(...) indices -> (..., in_features)."""
        index = input.flatten()
        spec = self.scheme.weight
        codes = unpack(self.packed[index], spec.bits, self.in_features, spec.spacing)
        return dequantize(codes, self.scale[index]).to(self.dtype).view(*input.shape, -1)

    def extra_repr(self) -> str:
        return f"{self.out_features}, {self.in_features}, {self.scheme}"


class PackedConv2d(_Packed):
    """Packed rows of a convolution's matrix: what a trained `FakeQuantConv2d` becomes; it dequantizes, and convolves.

    State: `packed` (out, words) int32; `scale` (out, groups) and `input_scale` (1,) for static activations in the
    scheme's scale dtypes; `input_zero_point` (1,) int8 for asymmetric ones; `bias` (out,).  The tensors are
    allocated, not filled.

    Args:
        layer: the float convolution, whose geometry it takes.
        scheme: how it is quantized.
        dtype: of the bias.
    """

    bias: Tensor | None

    def __init__(self, layer: nn.Conv2d, scheme: QuantScheme, dtype: torch.dtype):
        super().__init__()
        self.scheme, self.shape = scheme, layer.weight.shape
        self.out_features, self.in_features = len(layer.weight), layer.weight[0].numel()
        self.padded = None if layer.padding_mode == "zeros" else layer.padding_mode
        self.borders = tuple(layer._reversed_padding_repeated_twice)
        padding = layer.padding if self.padded is None else 0
        self.geometry: dict[str, Any] = {"stride": layer.stride, "padding": padding, "dilation": layer.dilation}
        self.geometry["groups"] = layer.groups
        words, groups = words_of(self.in_features, scheme.weight.bits), scheme.weight.groups(self.in_features)
        static = None if scheme.input is None or scheme.input.dynamic else scheme.input
        self.register_buffer("packed", torch.empty(self.out_features, words, dtype=torch.int32))
        self.register_buffer("scale", torch.empty(self.out_features, groups, dtype=scale_dtype(scheme.weight)))
        self.register_buffer("input_scale", None if static is None else torch.empty(1, dtype=scale_dtype(static)))
        zero = None if static is None or static.symmetric else torch.empty(1, dtype=torch.int8)
        self.register_buffer("input_zero_point", zero)
        self.register_buffer("bias", None if layer.bias is None else torch.empty(self.out_features, dtype=dtype))

    def forward(self, input: Tensor) -> Tensor:
        """(batch, in, rows, columns) -> (batch, out, rows, columns), in the input's dtype."""
        spec = self.scheme.input
        if spec is not None:
            qparams = spec.bits, self.input_scale, spec.absmax_rule, self.input_zero_point
            input = quantized_input(input.flatten(-3), *qparams).view_as(input)
        codes = unpack(self.packed, self.scheme.weight.bits, self.in_features, self.scheme.weight.spacing)
        weight = dequantize(codes, self.scale).to(input.dtype).view(self.shape)
        if self.padded is not None:
            input = F.pad(input, self.borders, self.padded)
        return F.conv2d(input, weight, self.bias, **self.geometry)

    def extra_repr(self) -> str:
        return f"{self.out_features}, {self.in_features}, {self.scheme}"


def packed_layer(layer: Any, scheme: QuantScheme, dtype: torch.dtype) -> PackedLinear | PackedEmbedding | PackedConv2d:
    """The packed layer for a float one, its tensors allocated and not filled.

    Args:
        layer: of a class in `LAYERS`, or derived from one.
        scheme: how it is quantized.
        dtype: of what is not packed.
    """
    kind = next(LAYERS[cls] for cls in type(layer).__mro__ if cls in LAYERS)
    rows, columns = kind.as_matrix(layer.weight).shape
    if kind.kind == "embedding":
        return PackedEmbedding(rows, columns, scheme, dtype)
    if kind.kind == "conv":
        return PackedConv2d(layer, scheme, dtype)
    return PackedLinear(columns, rows, scheme, layer.bias is not None, dtype)
