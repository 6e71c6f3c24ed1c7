"""Weights that jump to and fro between two codes: found, damped ("dampened") and frozen (arXiv 2203.11086, section 4).

Straight-through gradients are those of the quantized weight, so a weight near a rounding border is pushed over it,
then back, and never settles.  With w = W / s and codes q = clamp(round(w)):

    turned back (section 4.1)      o = q changed, and in the direction opposite to its last change
    how often (section 4.1)        f <- m o + (1 - m) f
    damping (section 4.2)          L = lambda || fq(W) - clip(W) ||^2, fq(W) held;  dW = 2 lambda (W - fq(W)) inside
    freezing                       where f > threshold: W = s * round(a) from then on, a <- m q + (1 - m) a

The authors anneal the threshold of freezing, too; here it is constant.
"""

from typing import Any

import torch
from torch import Tensor

from qat.estimators import inside_range
from qat.functional import dequantize, fake_quantize, quantize, round_clamp
from qat.nn import FakeQuantLayer


class Turns:
    """Watches codes from step to step: which changed in the direction opposite to their last change.

    Two bytes a code.

    Args:
        codes: at the start, any shape, integers in [-128, 127] in any dtype.
    """

    def __init__(self, codes: Tensor):
        self.codes = codes.to(torch.int8)
        self.direction = torch.zeros_like(self.codes)

    def __call__(self, codes: Tensor) -> Tensor:
        """Whether each code turned back in this step; bool, the shape it began with."""
        before, direction = self.codes.to(codes.device), self.direction.to(codes.device)
        step = (codes - before.to(codes.dtype)).sign().to(torch.int8)
        self.codes, self.direction = codes.to(torch.int8), torch.where(step != 0, step, direction)
        return step * direction < 0

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors, for a checkpoint."""
        return {"codes": self.codes, "direction": self.direction}

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> "Turns":
        """The one that `state_dict` was asked of."""
        turns = cls(state["codes"])
        turns.direction = state["direction"]
        return turns


@torch.no_grad()
def damping_gradient(layer: FakeQuantLayer) -> Tensor:
    """What damping with lambda = 1 adds to the gradient of a layer's matrix: (out, in), float32."""
    weight, quantizer = layer.matrix.detach(), layer.weight_quantizer
    scale = quantizer.weight_scale(weight)
    pull = weight.float() - fake_quantize(weight.float(), scale, quantizer.spec)
    return pull.mul_(2).mul_(inside_range(weight, scale, quantizer.spec, quantizer.estimator.margin(quantizer.spec)))


class Freezing:
    """Freezes those weights of one layer that oscillate, at the code where they were most.

    The code is held, not the weight: a weight follows its scale.  11 bytes a weight.

    Args:
        layer: whose quantizers are active; without an adapter, which would move what is quantized past its weight.
        threshold: f above which a weight is frozen.
        momentum: m.
    """

    def __init__(self, layer: FakeQuantLayer, threshold: float, momentum: float):
        self.layer, self.threshold, self.momentum = layer, threshold, momentum
        codes = self._codes()[0]
        self.turns, self.average = Turns(codes), codes
        self.frequency, self.frozen = torch.zeros_like(codes), torch.zeros_like(codes, dtype=torch.bool)

    def _codes(self) -> tuple[Tensor, Tensor]:
        weight, quantizer = self.layer.matrix.detach(), self.layer.weight_quantizer
        scale = quantizer.weight_scale(weight)
        return quantize(weight, scale, quantizer.spec), scale

    @torch.no_grad()
    def step(self) -> None:
        """After an optimizer step: put frozen weights back to their codes, and freeze more."""
        self._hold(self._codes()[1])
        codes, scale = self._codes()
        self.frequency.lerp_(self.turns(codes).float(), self.momentum)
        self.average.lerp_(codes, self.momentum)
        self.frozen |= self.frequency > self.threshold
        self._hold(scale)

    def _hold(self, scale: Tensor) -> None:
        # The average of a frozen code moves towards its own rounding, so it stays what it was.
        held = dequantize(round_clamp(self.average.clone(), self.layer.weight_quantizer.spec), scale)
        weight = self.layer.matrix
        weight.copy_(torch.where(self.frozen, held.to(weight.dtype), weight))

    def state_dict(self) -> dict[str, Any]:
        """Tensors, for a checkpoint."""
        own = {"average": self.average, "frequency": self.frequency, "frozen": self.frozen}
        return {"turns": self.turns.state_dict(), **own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was asked."""
        device = self.layer.weight.device
        self.turns = Turns.from_state(state["turns"])
        self.average, self.frequency, self.frozen = (
            state[name].to(device) for name in ("average", "frequency", "frozen")
        )
