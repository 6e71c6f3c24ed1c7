"""Layers that train through quantization.

A quantized layer is a float layer in place: same parameters, same names, same hooks, plus quantizers.  Each kind says
how its weight is seen as a matrix (out, in), whose rows are quantized, and how it computes with it; `LAYERS` is all
that the rest of qat knows of them.

The product of a linear layer is one autograd function that saves what `nn.Linear` saves (input and weight) and
quantizes the weight a second time in backward, so that training needs no second copy of the weights.

A linear layer may have a low-rank adapter (arXiv 2106.09685).  It is added to the weight before quantization,
fq(W + scaling * B A), and so is in the codes that are exported: nothing is merged, or rounded again, afterwards.
"""

from dataclasses import replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from qat.estimators import LSQ, Estimator, FakeQuantize
from qat.fake_quantizer import FakeQuantizer
from qat.functional import dequantize, quantize, store_scale
from qat.packing import unpack
from qat.scheme import Kind, QuantScheme


def adapted(weight: Tensor, a: Tensor | None, b: Tensor | None, scaling: float) -> Tensor:
    """weight + scaling * b @ a, computed in float32: the one place that adds an adapter.

    Args:
        weight: (out, in), floating.
        a, b: (rank, in) and (out, rank), floating; None for no adapter.
        scaling: alpha / rank.

    Returns:
        (out, in), the weight's dtype; the weight itself where there is no adapter.
    """
    if a is None or b is None:
        return weight
    with torch.autocast(weight.device.type, enabled=False):  # the fold adds without autocast
        return torch.addmm(weight.float(), b.float(), a.float(), alpha=scaling).to(weight.dtype)


class _QuantizedProduct(torch.autograd.Function):
    """x @ fq(weight + scaling * b @ a).T + bias."""

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, stored: Tensor, bias: Tensor | None, quantizer: FakeQuantizer,
        a: Tensor | None, b: Tensor | None, scaling: float,
    ):  # fmt: skip
        base, weight = weight, adapted(weight, a, b, scaling)
        scale = quantizer.weight_scale(weight)
        codes = quantize(weight, scale, quantizer.spec)
        if quantizer.recorder is not None:
            quantizer.recorder(codes, scale, weight)
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        x = x.to(dtype)
        saved = (weight,) if a is None else (base, a, b)
        ctx.save_for_backward(x, scale, *saved)
        ctx.quantizer, ctx.spec, ctx.has_bias, ctx.scaling = quantizer, quantizer.spec, bias is not None, scaling
        # In the order of the artifact, which a transposed weight is not: products then sum as they will there.
        quantized = dequantize(codes, scale).to(dtype).contiguous()
        return F.linear(x, quantized, None if bias is None else bias.to(dtype))

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, scale, base, *adapter = ctx.saved_tensors
        a, b = adapter if adapter else (None, None)
        weight, quantizer = adapted(base, a, b, ctx.scaling), ctx.quantizer
        spec, flat = ctx.spec, grad.reshape(-1, grad.shape[-1])
        grad_x = grad_weight = grad_scale = grad_bias = grad_a = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ dequantize(quantize(weight, scale, spec), scale).to(grad.dtype)
        if any(ctx.needs_input_grad[i] for i in (1, 2, 5)):
            grad_quantized = (flat.T @ x.reshape(-1, x.shape[-1])).to(weight.dtype)
            grad_weight, grad_scale = quantizer.estimator.backward(
                grad_quantized, weight, scale, spec, ctx.needs_input_grad[2]
            )
        if a is not None and b is not None and ctx.needs_input_grad[5]:
            assert grad_weight is not None
            through = ctx.scaling * grad_weight.to(a.dtype)
            grad_a, grad_b = b.T @ through, through @ a.T
        if ctx.has_bias and ctx.needs_input_grad[3]:
            grad_bias = flat.sum(0)
        return (
            grad_x,
            grad_weight if ctx.needs_input_grad[1] else None,
            grad_scale,
            grad_bias,
            None,
            grad_a,
            grad_b,
            None,
        )


class _HeldProduct(torch.autograd.Function):
    """x @ (codes * scale).T + bias, codes being constants: saves x alone and unpacks in forward and in backward."""

    @staticmethod
    def forward(ctx, x: Tensor, stored: Tensor, bias: Tensor | None, quantizer: FakeQuantizer):
        assert quantizer.packed is not None
        kind, spec = x.device.type, quantizer.spec
        x = x.to(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype)
        scale = store_scale(stored.detach(), spec)
        codes = unpack(quantizer.packed, spec.bits, x.shape[-1], spec.spacing)
        weight = dequantize(codes, scale)
        if quantizer.recorder is not None:
            quantizer.recorder(codes, scale, weight)
        ctx.save_for_backward(x, stored, quantizer.packed)
        ctx.spec, ctx.estimator, ctx.has_bias = spec, quantizer.estimator, bias is not None
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, stored, packed = ctx.saved_tensors
        scale, codes = (
            store_scale(stored.detach(), ctx.spec),
            unpack(packed, ctx.spec.bits, x.shape[-1], ctx.spec.spacing),
        )
        flat, grad_x, grad_scale, grad_bias = grad.reshape(-1, grad.shape[-1]), None, None, None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ dequantize(codes, scale).to(grad.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = flat.T @ x.reshape(-1, x.shape[-1])
            grad_scale = ctx.estimator.of_codes(grad_weight, codes, scale, ctx.spec)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            grad_bias = flat.sum(0)
        return grad_x, grad_scale, grad_bias, None


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
    lora_A: nn.Parameter | None  # peft's names
    lora_B: nn.Parameter | None
    scaling: float

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
        cls,
        layer: nn.Module,
        scheme: QuantScheme,
        estimator: Estimator,
        input_estimator: Estimator | None = None,
        shared: FakeQuantizer | None = None,
    ) -> Self:
        """Turn the float `layer` into this class, in place; its function does not change until a stage does.

        Args:
            layer: of type `original`.
            scheme: how it is quantized.
            estimator: of its weight.
            input_estimator: of its input; by default the weight's.
            shared: the weight's quantizer where another layer has the same weight; None makes one.

        Raises:
            ValueError: the group size does not divide the layer's inputs.
        """
        new: Any = layer
        if not new.weight.is_contiguous():  # channels_last: its matrix would be a copy, and writes to it lost
            new.weight.data = new.weight.data.contiguous()
        matrix = cls.as_matrix(new.weight)
        rows = 1 if scheme.weight.granularity == "tensor" else matrix.shape[0]
        shape, device = (rows, scheme.weight.groups(matrix.shape[1])), matrix.device
        weight_quantizer = shared if shared is not None else FakeQuantizer(scheme.weight, shape, estimator, device)
        input_quantizer = None
        if scheme.input is not None:
            input_quantizer = FakeQuantizer(scheme.input, (1,), input_estimator or estimator, device)
        new.__class__ = cls
        new.scheme = scheme
        new.weight_quantizer, new.input_quantizer = weight_quantizer, input_quantizer
        new.lora_A, new.lora_B, new.scaling = None, None, 0.0
        return new

    def release(self) -> nn.Module:
        """Turn this layer back into the float layer it was, in place, with the weights it has now."""
        if self.weight_quantizer.packed is not None:
            self.weight.data = self.adapted.to(self.weight.dtype)
        self.merge()
        del self.weight_quantizer, self.input_quantizer, self.scheme, self.lora_A, self.lora_B, self.scaling
        self.__class__ = self.original  # type: ignore[assignment]
        return self

    @torch.no_grad()
    def hold(self) -> None:
        """Replace the float weight by its packed codes: from now on only the scale can learn (arXiv 2305.14152).

        `weight` stays, frozen, with no rows.

        Raises:
            ValueError: not a plain linear layer, an adapter, an inactive quantizer, or an estimator without gradient.
        """
        quantizer = self.weight_quantizer
        if type(self) is not FakeQuantLinear or self.lora_A is not None or not quantizer.active:
            raise ValueError(f"{self}: codes are held of active linear layers without an adapter")
        if not isinstance(quantizer.estimator, LSQ):
            raise ValueError(f"{quantizer.estimator} learns no scale of held codes: use estimator=lsq or lsq_log")
        quantizer.hold(self.weight)
        self._empty()

    def _empty(self) -> None:
        self.weight.requires_grad_(False)
        self.weight.data = self.weight.data[:0].clone()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        if prefix + "weight_quantizer.packed" in state_dict:
            self._empty()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    @property
    def matrix(self) -> Tensor:
        """The weight as a matrix (out, in); a view, so that writing to it writes to the weight."""
        if self.weight_quantizer.packed is not None:
            raise ValueError(
                f"{self}: its float weight is gone, only packed codes are held; load the float model again"
            )
        return self.as_matrix(self.weight)

    @property
    def adapted(self) -> Tensor:
        """What is quantized, (out, in): the matrix, with the adapter where there is one."""
        return self.adapted_rows(1)

    def adapted_rows(self, every: int) -> Tensor:
        """Each `every`th row of what is quantized."""
        quantizer, b = self.weight_quantizer, self.lora_B
        if quantizer.packed is not None and quantizer.scale is not None:
            spec, packed, scale = quantizer.spec, quantizer.packed[::every], quantizer.scale.detach()[::every]
            return dequantize(unpack(packed, spec.bits, self.weight.shape[1], spec.spacing), store_scale(scale, spec))
        return adapted(self.matrix[::every], self.lora_A, None if b is None else b[::every], self.scaling)

    def adapt(self, rank: int, scaling: float) -> None:
        """Add a low-rank adapter of `rank`; the layer's function does not change until it learns (B is 0).

        Raises:
            ValueError: a layer that does not multiply, or has an adapter already.
        """
        if not self.multiplies or self.kind != "linear":
            raise ValueError(f"a {self.kind} layer cannot have an adapter: only linear layers can")
        if self.lora_A is not None:
            raise ValueError("the layer has an adapter already")
        rows, columns = self.matrix.shape
        self.lora_A = nn.Parameter(self.weight.new_empty(rank, columns))
        self.lora_B = nn.Parameter(self.weight.new_zeros(rows, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=5**0.5)
        self.scaling = scaling

    @torch.no_grad()
    def merge(self) -> None:
        """Write the adapter into the weight and set B to 0: what is quantized stays the same, bit for bit."""
        if self.lora_B is not None:
            self.matrix.copy_(self.adapted)
            self.lora_B.zero_()

    @property
    def quantizers(self) -> list[FakeQuantizer]:
        """The weight's and, where there is one, the input's."""
        return [q for q in (self.weight_quantizer, self.input_quantizer) if q is not None]

    def added(self) -> list[Tensor]:
        """Parameters and buffers that the float layer did not have."""
        state = [t for quantizer in self.quantizers for t in quantizer.state_dict(keep_vars=True).values()]
        return state + [part for part in (self.lora_A, self.lora_B) if part is not None]

    def rows(self, input: Tensor) -> Tensor:
        """An input as the rows (..., in) that the matrix multiplies."""
        return input

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out): what a linear layer computes; the parameter is called `input`, as in `nn.Linear`."""
        if self.input_quantizer is not None:
            input = self.input_quantizer(input)
        quantizer = self.weight_quantizer
        if quantizer.packed is not None:
            if not quantizer.active:
                raise ValueError(f"{self}: cannot run in float: only packed codes are held; load the float model again")
            return _HeldProduct.apply(input, quantizer.scale, self.bias, quantizer)
        if not quantizer.active:
            if self.lora_A is not None:
                return F.linear(self.rows(input), self.adapted, self.bias)
            return super().forward(input)  # of the float layer
        adapter = self.lora_A, self.lora_B, self.scaling
        return _QuantizedProduct.apply(input, self.matrix, quantizer.scale, self.bias, quantizer, *adapter)


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
