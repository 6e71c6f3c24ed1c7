"""What a calibration is, and what all of them need."""

from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from qat.attention import FakeQuantKeyValues
from qat.calibration.blocks import Run
from qat.fake_quantizer import FakeQuantizer
from qat.functional import dequantize, fake_quantize, quantize, store_scale
from qat.nn import FakeQuantLayer


class Calibration(Protocol):
    """Sets the scales of inserted fake quantizers, and changes weights where that makes them round better.

    A calibration is called with a model and a way to run data through it, and so is everything it is made of: methods
    that prepare weights hand each block, with a way to run it, to the calibration that sets its scales.
    """

    name: str
    changes_weights: ClassVar[bool]
    """Whether weights change too; whoever only measures puts them back."""

    def check(self, model: nn.Module) -> None:
        """Raise ValueError, with the remedy, if `model` (inserted or still float) cannot be treated."""

    def needs_data(self, model: nn.Module) -> bool:
        """Whether calibrating `model` runs it on data."""

    def __call__(self, model: nn.Module, run: Run, folder: Path | None = None) -> None:
        """Calibrate; all quantizers are in `Stage.FLOAT` afterwards.

        Args:
            model: with fake quantizers inserted.
            run: runs the calibration data through `model`, the same batches every time, padding announced by
                `token_mask`.
            folder: where finished parts may be kept, so that a killed run goes on; None keeps nothing.

        Raises:
            ValueError: bad weights or data, naming the layer.
        """


def check_layers(method: str, model: nn.Module) -> None:
    """Refuse quantizers that are in no layer of qat's.

    Raises:
        ValueError: names the layer and its type.
    """
    for name, module in model.named_modules():
        owned = any(isinstance(child, FakeQuantizer) for child in module.children())
        if owned and not isinstance(module, (FakeQuantLayer, FakeQuantKeyValues)):
            raise ValueError(
                f"calibration {method} treats the layers of qat.nn, and {name} is a {type(module).__name__}: leave it "
                "in float (a rule with null), or calibrate by ranges (calibration=mse)"
            )


@torch.no_grad()
def write_back(layer: FakeQuantLayer, codes: Tensor) -> None:
    """Overwrite the weight with codes * scale, in the weight's dtype, so that it quantizes to exactly these codes.

    In bfloat16 a product may round, by 2^-9 of itself at most, which is 1/4 of a step at code 128: never another code.

    Args:
        codes: (out, in), integers in any dtype.

    Raises:
        ValueError: the weight's dtype cannot hold the grid (float16 below its normal range).
    """
    quantizer, weight = layer.weight_quantizer, layer.matrix
    assert quantizer.scale is not None
    scale = store_scale(quantizer.scale.detach(), quantizer.spec)
    written = dequantize(codes, scale.expand(weight.shape[0], -1)).to(weight.dtype)
    kept = torch.equal(quantize(written, scale.expand(weight.shape[0], -1), quantizer.spec), codes.float())
    if not (kept and torch.equal(fake_quantize(written, scale.expand(weight.shape[0], -1), quantizer.spec), written)):
        raise ValueError(
            f"{str(weight.dtype).removeprefix('torch.')} weights cannot hold its quantized values; load the model in "
            "bfloat16 or float32"
        )
    weight.copy_(written)


def described(method: Any) -> str:
    """All settings of a calibration, nested ones too, as text: equal texts calibrate alike."""
    if hasattr(method, "__dict__"):
        inner = ", ".join(f"{key}={described(value)}" for key, value in sorted(vars(method).items()))
        return f"{type(method).__name__}({inner})"
    return repr(method)
