"""Layers that train through quantization.

A quantized layer is a float layer in place: same parameters, same names, same hooks, plus quantizers.  Each kind says
how its weight is seen as a matrix (out, in), whose rows are quantized, and how it computes with it; `LAYERS` is all
that the rest of qat knows of them.

The product of a linear layer is one autograd function that saves what `nn.Linear` saves (input and weight) and
quantizes the weight a second time in backward, so that training needs no second copy of the weights.
"""

from dataclasses import replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from qat.estimators import Estimator, FakeQuantize
from qat.fake_quantizer import FakeQuantizer
from qat.functional import dequantize, quantize
from qat.scheme import Kind, QuantScheme


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
        # In the order of the artifact, which a transposed weight is not: products then sum as they will there.
        quantized = dequantize(codes, scale).to(dtype).contiguous()
        return F.linear(x, quantized, None if bias is None else bias.to(dtype))

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


class FakeQuantLayer(nn.Module):
    """What quantized layers of every kind have; made from a float layer by `insert`, which changes its class in place.

    Attributes:
        original: the float layer's class.
        kind: what rules call it.
        multiplies: whether its inputs multiply the matrix, and so say which of its columns matter.
    """

    original: ClassVar[type[nn.Module]]
    kind: ClassVar[Kind] = "linear"
    multiplies: ClassVar[bool] = True

    weight: Any  # a parameter, and bias one or None: as the float layer declares them
    bias: Any
    scheme: QuantScheme
    weight_quantizer: FakeQuantizer
    input_quantizer: FakeQuantizer | None

    @staticmethod
    def as_matrix(weight: Tensor) -> Tensor:
        """A view (out, in) of a weight; what shares a scale lies in one row."""
        return weight

    @classmethod
    def fitted(cls, scheme: QuantScheme) -> QuantScheme:
        """`scheme` as this kind of layer can follow it."""
        return scheme

    @classmethod
    def adopt(
        cls, layer: nn.Module, scheme: QuantScheme, estimator: Estimator, shared: FakeQuantizer | None = None
    ) -> Self:
        """Turn the float `layer` into this class, in place; its function does not change until a stage does.

        Args:
            layer: of type `original`.
            scheme: how it is quantized.
            estimator: the gradient.
            shared: the weight's quantizer where another layer has the same weight; None makes one.

        Raises:
            ValueError: the group size does not divide the layer's inputs.
        """
        new: Any = layer
        matrix = cls.as_matrix(new.weight)
        rows = 1 if scheme.weight.granularity == "tensor" else matrix.shape[0]
        shape, device = (rows, scheme.weight.groups(matrix.shape[1])), matrix.device
        weight_quantizer = shared if shared is not None else FakeQuantizer(scheme.weight, shape, estimator, device)
        input_quantizer = None if scheme.input is None else FakeQuantizer(scheme.input, (1,), estimator, device)
        new.__class__ = cls
        new.scheme = scheme
        new.weight_quantizer, new.input_quantizer = weight_quantizer, input_quantizer
        return new

    def release(self) -> nn.Module:
        """Turn this layer back into the float layer it was, in place, with the weights it has now."""
        del self.weight_quantizer, self.input_quantizer, self.scheme
        self.__class__ = self.original  # type: ignore[assignment]
        return self

    @property
    def matrix(self) -> Tensor:
        """The weight as a matrix (out, in); a view, so that writing to it writes to the weight."""
        return self.as_matrix(self.weight)

    @property
    def quantizers(self) -> list[FakeQuantizer]:
        """The weight's and, where there is one, the input's."""
        return [q for q in (self.weight_quantizer, self.input_quantizer) if q is not None]

    def rows(self, input: Tensor) -> Tensor:
        """An input as the rows (..., in) that the matrix multiplies."""
        return input

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out): what a linear layer computes; the parameter is called `input`, as in `nn.Linear`."""
        if self.input_quantizer is not None:
            input = self.input_quantizer(input)
        quantizer = self.weight_quantizer
        if not quantizer.active:
            return super().forward(input)  # of the float layer
        return _QuantizedProduct.apply(input, self.matrix, quantizer.scale, self.bias, quantizer)


class FakeQuantLinear(FakeQuantLayer, nn.Linear):
    """A linear layer whose weight, and input where the scheme says so, pass through fake quantizers."""

    original = nn.Linear


class FakeQuantConv1D(FakeQuantLayer, Conv1D):
    """GPT-2's linear layer, whose weight is stored (in, out)."""

    original = Conv1D

    @staticmethod
    def as_matrix(weight: Tensor) -> Tensor:
        return weight.T


class FakeQuantEmbedding(FakeQuantLayer, nn.Embedding):
    """An embedding of quantized rows; an output layer tied to it has its weight and its quantizer too.

    Only the rows that are looked up are quantized, each by itself, as the whole table would be.
    """

    original = nn.Embedding
    kind = "embedding"
    multiplies = False
    bias = None

    @classmethod
    def fitted(cls, scheme: QuantScheme) -> QuantScheme:
        return replace(scheme, input=None)

    def forward(self, input: Tensor) -> Tensor:
        """(...) indices -> (..., dim)."""
        rows, quantizer = super(FakeQuantLayer, self).forward(input), self.weight_quantizer
        if not quantizer.active:
            return rows
        assert quantizer.scale is not None
        scale = quantizer.weight_scale(self.weight)
        if quantizer.recorder is not None:
            quantizer.recorder(quantize(self.weight, scale, quantizer.spec), scale, self.weight)
        stored, scale = (F.embedding(input, s.expand(len(self.weight), -1)) for s in (quantizer.scale, scale))
        return FakeQuantize.apply(rows, stored, scale, quantizer.spec, quantizer.estimator)


class FakeQuantConv2d(FakeQuantLayer, nn.Conv2d):
    """A convolution; a row of its matrix (out, in / groups * height * width) makes one output channel.

    What rules call a token of its input is an image.
    """

    original = nn.Conv2d
    kind = "conv"

    @staticmethod
    def as_matrix(weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def rows(self, input: Tensor) -> Tensor:
        """Patches (batch, positions, in * height * width) of images (batch, in, rows, columns)."""
        if self.groups != 1:
            raise ValueError(
                f"{self}: no one matrix multiplies the inputs of a grouped convolution; calibrate by ranges without "
                "importance (calibration=mse)"
            )
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        padded = F.pad(input, self._reversed_padding_repeated_twice, mode)
        return F.unfold(padded, self.kernel_size, self.dilation, stride=self.stride).transpose(1, 2)

    def forward(self, input: Tensor) -> Tensor:
        """(batch, in, rows, columns) -> (batch, out, rows, columns)."""
        if self.input_quantizer is not None:
            input = self.input_quantizer(input.flatten(-3)).view_as(input)
        quantizer, weight = self.weight_quantizer, self.weight
        if quantizer.active:
            scale = quantizer.weight_scale(self.matrix)
            if quantizer.recorder is not None:
                quantizer.recorder(quantize(self.matrix, scale, quantizer.spec), scale, self.matrix)
            weight = FakeQuantize.apply(self.matrix, quantizer.scale, scale, quantizer.spec, quantizer.estimator)
        return self._conv_forward(input, weight.view_as(self.weight), self.bias)


LAYERS: dict[type[nn.Module], type[FakeQuantLayer]] = {
    layer.original: layer for layer in (FakeQuantLinear, FakeQuantConv1D, FakeQuantEmbedding, FakeQuantConv2d)
}
"""The quantized layer for each class of float layers; a subclass of those is somebody else's, and stays float."""
