"""AWQ: weights that meet large activations are scaled up before rounding (arXiv 2306.00978)."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from qat.calibration.equalization import Equalization, Inputs
from qat.calibration.gptq import Grams
from qat.calibration.llama_like import Pair
from qat.calibration.method import Calibration, check_layers
from qat.calibration.ranges import RangeCalibration, set_tables
from qat.fake_quantizer import Stage
from qat.functional import fake_quantize, store_scale
from qat.insertion import layers
from qat.scheme import QuantSpec


@dataclass
class ClipSearch:
    """Scales that minimise each group's share of the layer's output error (AWQ's clipping, 2306.00978, section 3.2).

    For a row of one group, d = fq(w) - w: the smallest d^T H_g d over shrunk ranges, H_g being the group's block of
    X^T X.  Unlike a squared error weighted by its diagonal, it knows which errors cancel.  The paper only names the
    step; the authors' code shrinks ranges to 0.55 by steps of 1/20, and leaves those of q and k as they are.

    Attributes:
        name: what tables call it.
        ranges: sets the scales that ratios are taken of, and those of static inputs.
        ratios: tried; 1 keeps the range.
    """

    name: str = "clip"
    ranges: RangeCalibration = field(default_factory=lambda: RangeCalibration("absmax", weight="absmax"))
    ratios: tuple[float, ...] = tuple(1 - i / 40 for i in range(21))
    changes_weights: ClassVar[bool] = False

    def check(self, model: nn.Module) -> None:
        """Refuse what this method cannot treat; `model` may be float still."""
        check_layers(self.name, model)

    def needs_data(self, model: nn.Module) -> bool:
        """True: H is made of data."""
        return True

    @torch.no_grad()
    def __call__(self, model: nn.Module, run: Callable[[], None], folder: Path | None = None) -> None:
        """Set all scales; as `Calibration`.

        Raises:
            ValueError: NaN, or a layer that no usable token reaches; names the layer.
        """
        set_tables(model, self.ranges)
        watched = {name: layer for name, layer in layers(model).items() if layer.multiplies}
        for layer in watched.values():
            self.ranges.observe(layer)
        grams = Grams(watched)
        with grams.watch():
            run()
        for name, layer in watched.items():
            try:
                gram = grams.of(name)
                self.ranges.set_layer(layer, gram.diagonal())
                quantizer = layer.weight_quantizer
                assert quantizer.scale is not None
                quantizer.set_scale(
                    _clipped(layer.matrix.detach().float(), gram, quantizer.scale, self.ratios, quantizer.spec)
                )
            except ValueError as error:
                raise ValueError(f"calibration {self.name}, layer {name}: {error}") from error
            for each in layer.quantizers:
                each.set_stage(Stage.FLOAT)
        self.ranges.set_caches(model, run)


def _clipped(weight: Tensor, gram: Tensor, scale: Tensor, ratios: tuple[float, ...], spec: QuantSpec) -> Tensor:
    rows, groups = scale.shape
    size = weight.shape[1] // groups
    blocks = torch.stack([gram[g : g + size, g : g + size] for g in range(0, weight.shape[1], size)])
    best, least = scale.detach().clone(), torch.full_like(scale, torch.inf)
    for ratio in ratios:
        tried = store_scale(scale.detach() * ratio, spec)
        error = fake_quantize(weight, tried.expand(len(weight), -1), spec) - weight
        grouped = error.unflatten(1, (groups, size)).transpose(0, 1)  # (groups, out, size)
        cost = ((grouped @ blocks) * grouped).sum(-1).T
        cost = cost.sum(0, keepdim=True) if rows == 1 else cost
        best, least = torch.where(cost < least, tried, best), torch.minimum(cost, least)
    return best


@dataclass
class AWQ(Equalization):
    """s_j = mean|x_j|^a (eq. 5), its exponent a by the smallest output error (eq. 4); then ranges by `ClipSearch`.

    Applied before q/k/v and gate/up (from the norms), before o (from v, where the query heads that share a value head
    share its factors; the authors' code leaves those models' o alone) and before down (from up).  The error is that of
    the layers that share the input, as in the paper; the authors' code takes the whole attention's and MLP's.
    """

    name: str = "awq"
    then: Calibration = field(default_factory=ClipSearch)

    def factor(self, inputs: Inputs, pair: Pair, exponent: float) -> Tensor:
        return pair.shared(inputs.mean).pow(exponent)
