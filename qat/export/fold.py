"""Fold: from a trained layer to the integers it was trained with, and the record that proves it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from qat.export.cache import record_key_values
from qat.fake_quantizer import FakeQuantizer
from qat.functional import quantize, scale_dtype
from qat.insertion import layers
from qat.nn import FakeQuantLayer
from qat.scheme import QuantScheme


@dataclass(frozen=True, eq=False)
class Recorded:
    """What the last active forward of one layer quantized its weight to; on the CPU.

    Attributes:
        codes: (out, in), int8.
        scale: (out, groups), float32.
        weight_dtype: of the weight that this forward saw.
        input_scale: (1,), float32, of static activations; else None.
        input_zero_point: (1,), int8, of asymmetric activations; else None.
    """

    codes: Tensor
    scale: Tensor
    weight_dtype: torch.dtype
    input_scale: Tensor | None = None
    input_zero_point: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Folded:
    """One layer as the artifact stores it; on the CPU.

    Attributes:
        scheme: how it is quantized.
        codes: (out, in), int8.
        scale: (out, groups), the scheme's scale dtype.
        input_scale: (1,), the input's scale dtype, for static activations; else None.
        input_zero_point: (1,), int8, for asymmetric activations; else None.
    """

    scheme: QuantScheme
    codes: Tensor
    scale: Tensor
    input_scale: Tensor | None
    input_zero_point: Tensor | None


@contextmanager
def record(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Within, every forward of a quantized layer, or attention, notes what it used; the last one counts.

    Yields:
        Records by dotted name, filled as layers run: `Recorded` of a layer, `RecordedKeyValues` of an attention.
    """
    recorded: dict[str, Any] = {}
    before = {name: layer.weight_quantizer.recorder for name, layer in layers(model).items()}
    for name, layer in layers(model).items():
        layer.weight_quantizer.recorder = _recorder(recorded, name, layer.input_quantizer)
    try:
        with record_key_values(model, recorded):
            yield recorded
    finally:
        for name, layer in layers(model).items():
            layer.weight_quantizer.recorder = before[name]


def _recorder(
    recorded: dict[str, Recorded], name: str, inputs: FakeQuantizer | None
) -> Callable[[Tensor, Tensor, Tensor], None]:
    def note(codes: Tensor, scale: Tensor, weight: Tensor) -> None:
        input_scale, input_zero_point = _static(inputs)
        recorded[name] = Recorded(
            codes=codes.detach().to("cpu", torch.int8, copy=True),
            scale=_per_row(scale.detach(), weight).to("cpu", torch.float32, copy=True),
            weight_dtype=weight.dtype,
            input_scale=input_scale,
            input_zero_point=input_zero_point,
        )

    return note


@torch.no_grad()
def fold(layer: FakeQuantLayer, weight_dtype: torch.dtype, name: str = "the layer") -> Folded:
    """The codes and scales of `layer`, by the same functions that its training forward calls.

    Args:
        layer: trained, with calibrated scales.
        weight_dtype: what the weight is rounded to first: the dtype that the training forward saw.
        name: the layer's dotted name, for messages.

    Raises:
        ValueError: a weight or a scale is NaN or infinite.
    """
    weight, quantizer = layer.adapted.detach().to(weight_dtype), layer.weight_quantizer
    scale, (input_scale, input_zero_point) = quantizer.weight_scale(weight), _static(layer.input_quantizer)
    # The scale before rounding too: -inf, which training diverged to, is stored as the smallest scale.
    for what, tensor in (
        ("weight", weight),
        ("scale", quantizer.scale),
        (f"scale rounded to {quantizer.spec.scale_dtype}", scale),
        ("input scale", input_scale),
        ("input offset", None if layer.input_quantizer is None else layer.input_quantizer.offset),
    ):
        if tensor is not None and not torch.isfinite(tensor).all():
            raise ValueError(
                f"{name}: a {what} is NaN or infinite; training diverged, or the scale dtype is too narrow"
            )
    return Folded(
        scheme=replace(layer.scheme, weight=quantizer.spec.alone),
        codes=quantize(weight, scale, quantizer.spec).to("cpu", torch.int8),
        scale=_per_row(scale, weight).to("cpu", scale_dtype(quantizer.spec)),
        input_scale=None if input_scale is None else input_scale.to(scale_dtype(layer.scheme.input)),  # type: ignore[arg-type]
        input_zero_point=input_zero_point,
    )


def _per_row(scale: Tensor, weight: Tensor) -> Tensor:
    """A tensor's only scale (1, 1) repeated to (out, 1), so that artifacts know channels and groups only."""
    return scale.expand(weight.shape[0], -1).contiguous()


def _static(quantizer: FakeQuantizer | None) -> tuple[Tensor | None, Tensor | None]:
    """The static scale (1,) float32 and zero point (1,) int8 that a forward uses now, on the CPU."""
    if quantizer is None or quantizer.scale is None:
        return None, None
    scale, zero_point = quantizer.static_qparams()
    return scale.to("cpu", copy=True), None if zero_point is None else zero_point.to("cpu", torch.int8, copy=True)
