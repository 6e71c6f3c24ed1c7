"""SmoothQuant: activation outliers moved into the weights, so that activations round well (arXiv 2211.10438)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from qat.calibration.equalization import Equalization, Inputs
from qat.calibration.llama_like import Pair


@dataclass
class SmoothQuant(Equalization):
    """s_j = max|x_j|^a / max|w_j|^(1 - a) (eq. 4), between each norm and the layers after it.

    The maxima are over all real tokens, and over the rows of all layers that share the input.  The exponent a (the
    migration strength) is the one of `exponents` with the smallest output error, for each pair; the paper has one for
    the whole model, mostly 0.5.

    Attributes:
        exponents: tried for each pair; 0 stands for no smoothing at all.
    """

    name: str = "smoothquant"
    exponents: tuple[float, ...] = (0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    pairs: tuple[str, ...] = ("qkv", "gate_up")

    def factor(self, inputs: Inputs, pair: Pair, exponent: float) -> Tensor:
        rows = [layer.weight.detach().float().abs().amax(0) for layer in pair.consumers.values()]
        largest = pair.shared(torch.stack(rows).amax(0))
        return pair.shared(inputs.absmax).pow(exponent) / largest.pow(1 - exponent)
