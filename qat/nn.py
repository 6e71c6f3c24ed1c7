"""Layers that train through quantization.

`FakeQuantLinear` is an `nn.Linear` in place: same parameters, same names, same hooks, plus quantizers.  Its
product is one autograd function that saves what `nn.Linear` saves (input and weight) and quantizes the
weight a second time in backward, so that training needs no second copy of the weights.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qat.estimators import Estimator
from qat.fake_quantizer import FakeQuantizer
from qat.functional import dequantize, quantize
from qat.scheme import QuantScheme


class _QuantizedProduct(torch.autograd.Function):
    """x @ fq(weight).T + bias."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, stored: Tensor, bias: Tensor | None, quantizer: FakeQuantizer):
        scale = quantizer.weight_scale(weight)
        codes = quantize(weight, scale, quantizer.spec)
        if quantizer.recorder is not None:
            quantizer.recorder(codes, scale, weight)
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        x = x.to(dtype)
        ctx.save_for_backward(x, weight, scale)
        ctx.quantizer, ctx.has_bias = quantizer, bias is not None
        return F.linear(x, dequantize(codes, scale).to(dtype), None if bias is None else bias.to(dtype))

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight, scale = ctx.saved_tensors
        quantizer = ctx.quantizer
        spec, flat = quantizer.spec, grad.reshape(-1, grad.shape[-1])
        grad_x = grad_weight = grad_scale = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ dequantize(quantize(weight, scale, spec), scale).to(grad.dtype)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            grad_quantized = (flat.T @ x.reshape(-1, x.shape[-1])).to(weight.dtype)
            grad_weight, grad_scale = quantizer.estimator.backward(
                grad_quantized, weight, scale, spec, ctx.needs_input_grad[2]
            )
        if ctx.has_bias and ctx.needs_input_grad[3]:
            grad_bias = flat.sum(0)
        return grad_x, grad_weight, grad_scale, grad_bias, None


class FakeQuantLinear(nn.Linear):
    """A linear layer whose weight, and input where the scheme says so, pass through fake quantizers.

    Made from an existing layer by `insert`, which changes the layer's class in place.
    """

    scheme: QuantScheme
    weight_quantizer: FakeQuantizer
    input_quantizer: FakeQuantizer | None

    @staticmethod
    def adopt(
        linear: nn.Linear, scheme: QuantScheme, estimator: Estimator, input_estimator: Estimator | None = None
    ) -> "FakeQuantLinear":
        """Turn `linear` into a FakeQuantLinear, in place; its function does not change until a stage does.

        Args:
            linear: any.
            scheme: how it is quantized.
            estimator: of its weight.
            input_estimator: of its input; by default the weight's.

        Raises:
            ValueError: the group size does not divide the layer's inputs.
        """
        rows = 1 if scheme.weight.granularity == "tensor" else linear.out_features
        shape, device = (rows, scheme.weight.groups(linear.in_features)), linear.weight.device
        weight_quantizer = FakeQuantizer(scheme.weight, shape, estimator, device)
        input_quantizer = None
        if scheme.input is not None:
            input_quantizer = FakeQuantizer(scheme.input, (1,), input_estimator or estimator, device)
        linear.__class__ = FakeQuantLinear
        assert isinstance(linear, FakeQuantLinear)
        linear.scheme = scheme
        linear.weight_quantizer, linear.input_quantizer = weight_quantizer, input_quantizer
        return linear

    def release(self) -> nn.Linear:
        """Turn this layer back into the `nn.Linear` it was, in place, with the weights it has now."""
        del self.weight_quantizer, self.input_quantizer, self.scheme
        self.__class__ = nn.Linear  # type: ignore[assignment]
        return self

    @property
    def quantizers(self) -> list[FakeQuantizer]:
        """The weight's and, where there is one, the input's."""
        return [q for q in (self.weight_quantizer, self.input_quantizer) if q is not None]

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out); the parameter is called `input`, as in `nn.Linear`."""
        if self.input_quantizer is not None:
            input = self.input_quantizer(input)
        quantizer = self.weight_quantizer
        if not quantizer.active:
            return F.linear(input, self.weight, self.bias)
        return _QuantizedProduct.apply(input, self.weight, quantizer.scale, self.bias, quantizer)
