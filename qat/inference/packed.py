"""A linear layer on packed weights."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qat.functional import dequantize, scale_dtype
from qat.kernels import packed_linear, pages
from qat.kernels.cpu_layer import CpuLayer
from qat.kernels.reference import quantized_input
from qat.packing import unpack, words_of
from qat.scheme import QuantScheme


class PackedLinear(nn.Module):
    """`qat::packed_linear` with its tensors: what a trained `FakeQuantLinear` becomes.

    State: `packed` (out, words) int32; `scale` (out, groups), the scheme's scale dtype whatever the model's;
    `input_scale` (1,) for static activations, with `input_zero_point` (1,) int8 for asymmetric ones; `bias` (out,), the
    model's dtype.  The tensors are allocated, not filled.  `backend` is the operator's, `reference` unless a loader
    sets another.

    Args:
        in_features: of an input row.
        out_features: of an output row.
        scheme: how the layer is quantized.
        bias: whether it has one.
        dtype: of the bias.
        device: of all tensors.

    Raises:
        ValueError: the group size does not divide `in_features`.
    """

    rows = ("packed", "scale", "bias")  # outermost by outputs
    packed: Tensor
    scale: Tensor
    input_scale: Tensor | None
    input_zero_point: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scheme: QuantScheme,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.in_features, self.out_features, self.scheme = in_features, out_features, scheme
        self.backend = "reference"
        self._resolved: CpuLayer | None = None
        self._resolved_bias: Tensor | None = None
        words, groups = words_of(in_features, scheme.weight.bits), scheme.weight.groups(in_features)
        static = None if scheme.input is None or scheme.input.dynamic else scheme.input
        self.register_buffer("packed", pages.empty(out_features, words, dtype=torch.int32, device=device))
        self.register_buffer(
            "scale", torch.empty(out_features, groups, dtype=scale_dtype(scheme.weight), device=device)
        )
        self.register_buffer(
            "input_scale", None if static is None else torch.empty(1, dtype=scale_dtype(static), device=device)
        )
        zero = None if static is None or static.symmetric else torch.empty(1, dtype=torch.int8, device=device)
        self.register_buffer("input_zero_point", zero)
        self.register_buffer("bias", torch.empty(out_features, dtype=dtype, device=device) if bias else None)

    @property
    def bits(self) -> int:
        """Of a weight."""
        return self.scheme.weight.bits

    @property
    def beyond_operator(self) -> str | None:
        """What of its scheme the operator, and so every backend, does not know; None where it knows all."""
        if self.scheme.weight.grid == "odd":
            return "odd codes"
        return None if self.input_zero_point is None else "activations with a zero point"

    @property
    def input_bits(self) -> int:
        """Of an activation; 0 leaves activations as they are."""
        return 0 if self.scheme.input is None else self.scheme.input.bits

    @property
    def group_size(self) -> int:
        """Inputs that share a scale; all of them for one scale a channel."""
        return self.scheme.weight.group_size or self.in_features

    def kin(self) -> tuple[Any, ...]:
        """What layers have in common that can be rows of one."""
        static = [None if t is None else float(t) for t in (self.input_scale, self.input_zero_point)]
        return self.in_features, self.scheme, self.backend, *static

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out), in the input's dtype."""
        if self.backend == "cpu" and not torch.compiler.is_compiling():
            layer = self.resolved(input.dtype)
            if layer is not None and layer.takes(input):
                return layer(input)
        rule = "qmax" if self.scheme.input is None else self.scheme.input.absmax_rule
        if self.beyond_operator is not None:
            codes = unpack(self.packed, self.bits, self.in_features, self.scheme.weight.spacing)
            bias = None if self.bias is None else self.bias.to(input.dtype)
            x = quantized_input(input, self.input_bits, self.input_scale, rule, self.input_zero_point)
            return F.linear(x, dequantize(codes, self.scale).to(input.dtype), bias)
        return packed_linear(
            input,
            self.packed,
            self.scale,
            None,
            self.bias,
            self.bits,
            self.group_size,
            self.input_bits,
            self.input_scale,
            rule,
            self.backend,
        )

    def resolved(self, dtype: torch.dtype) -> CpuLayer | None:
        """The layer for backend cpu and activations of `dtype`, with its addresses; None where no kernel takes it.

        Made at the first call, and again where a tensor was replaced or moved.
        """
        layer, own = self._resolved, self._buffers
        if layer is not None and layer.dtype is dtype:
            packed, scale = own["packed"], own["scale"]
            assert packed is not None and scale is not None
            if (packed.data_ptr(), scale.data_ptr()) == layer.addresses[1:] and own["bias"] is self._resolved_bias:
                return layer
        self._resolved = None
        try:
            spec = self.scheme.input
            rule = "qmax" if spec is None else spec.absmax_rule
            self._resolved = CpuLayer(
                self.packed, self.scale, self.bias, self.bits, self.group_size, self.input_bits, self.input_scale, rule,
                in_features=self.in_features, dtype=dtype,
            )  # fmt: skip
        except ValueError:  # the operator says what it is
            return None
        self._resolved_bias = self.bias
        return self._resolved

    def _apply(self, fn: Any, recurse: bool = True) -> "PackedLinear":
        """Follow the model to another device, never to another dtype: a rounded scale is another model."""
        before = {name: getattr(self, name) for name in ("scale", "input_scale")}
        super()._apply(fn, recurse)
        for name, scale in before.items():
            if scale is not None and getattr(self, name).dtype != scale.dtype:
                setattr(self, name, scale.to(self.packed.device))
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.scheme}"
