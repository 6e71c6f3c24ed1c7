"""Hadamard rotation: outliers spread over all features before rounding, merged into the weights.

With orthogonal R, y = W x = (W R)(R^T x).  Two rotations cost nothing when the model runs, because a neighbour's
weights absorb the inverse (QuaRot, arXiv 2404.00456, section 4; the names are SpinQuant's, arXiv 2405.16406):

    R1: the residual stream, from the embedding to the output layer.  RMSNorm commutes with it once the norm's gain
        has moved into the layers after it: (x R) / rms(x R) = (x / rms(x)) R.
    R2: the features of each value head, between v and o.

They are randomized Hadamard matrices, as QuaRot's; SpinQuant learns its R1 and R2, which is not done here.  Rotations
that must be computed while the model runs (R3 on keys and queries, R4 before down, QuaRot's across the heads before o)
are left out: the inputs of `down` keep their outliers.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qat.calibration.blocks import Run
from qat.calibration.gptq import GPTQ
from qat.calibration.llama_like import check_llama_like
from qat.calibration.method import Calibration


@dataclass
class Rotation:
    """Rotates a Llama-like model, then has its scales set by another calibration.

    Attributes:
        name: what tables call it.
        then: sets scales and rounds weights after the rotation.
        seed: of the random signs of the Hadamard matrices.
        values: R2 too, not only R1.
    """

    name: str = "rotation"
    then: Calibration = field(default_factory=GPTQ)
    seed: int = 0
    values: bool = True
    changes_weights: ClassVar[bool] = True

    def check(self, model: nn.Module) -> None:
        """Refuse what this method cannot treat; `model` may be float still."""
        check_llama_like(self.name, model)
        whole: Any = model
        if whole.get_output_embeddings().weight is whole.get_input_embeddings().weight:
            raise ValueError(
                f"calibration {self.name}: the output layer shares the embedding's weight, and takes the last norm's "
                "gain, which the embedding must not; untie it: callbacks.quantization.untie=true, or qat.untie(model)"
            )
        self.then.check(model)

    def needs_data(self, model: nn.Module) -> bool:
        """Whether `then` does."""
        return self.then.needs_data(model)

    def __call__(self, model: nn.Module, run: Run, folder: Path | None = None) -> None:
        """Rotate, set scales; the stage of all quantizers is FLOAT afterwards.

        Args:
            model: a Llama-like transformers model with fake quantizers inserted, its output layer untied.
            run: runs the calibration data through `model`, with padding announced by `token_mask`.
            folder: handed to `then`.

        Raises:
            ValueError: the model is not Llama-like or its embeddings are tied; or as `then` raises.
        """
        self.check(model)
        rotate(model, self.seed, self.values)
        self.then(model, run, folder)


@torch.no_grad()
def rotate(model: Any, seed: int = 0, values: bool = True) -> None:
    """Merge R1, and R2 with `values`, into the weights of an untied Llama-like `model`; its float function stays."""
    generator = torch.Generator().manual_seed(seed)
    decoder, head = model.model, model.get_output_embeddings()
    stream = _signs(decoder.embed_tokens.weight.shape[1], generator)
    _turn(decoder.embed_tokens.weight, stream, 1)
    for block in decoder.layers:
        attention, mlp = block.self_attn, block.mlp
        _absorb(block.input_layernorm, attention.q_proj, attention.k_proj, attention.v_proj)
        _absorb(block.post_attention_layernorm, mlp.gate_proj, mlp.up_proj)
        for reads in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
            _turn(reads.weight, stream, 1)
        for writes in (attention.o_proj, mlp.down_proj):
            _turn(writes.weight, stream, 0)
            if writes.bias is not None:
                _turn(writes.bias, stream, 0)
        if values:
            signs = _signs(attention.head_dim, generator)
            _turn(attention.v_proj.weight, signs, 0)
            if attention.v_proj.bias is not None:
                _turn(attention.v_proj.bias, signs, 0)
            _turn(attention.o_proj.weight, signs, 1)
    _absorb(decoder.norm, head)
    _turn(head.weight, stream, 1)


def hadamard(x: Tensor, signs: Tensor) -> Tensor:
    """x R with R = diag(signs) (I (x) H) / sqrt(b), H the Hadamard matrix of size b, the largest power of 2 in n.

    Where n is no power of two, features mix within blocks of b only (QuaRot mixes all, by a known Hadamard matrix of
    size n / b).

    Args:
        x: (..., n), floating.
        signs: (n,), of 1 and -1.

    Returns:
        (..., n), x's dtype; orthogonal in the last dimension.
    """
    size = len(signs) & -len(signs)
    y, width = (x * signs).unflatten(-1, (-1, size)), 1
    while width < size:  # Sylvester: H_2w = [[H_w, H_w], [H_w, -H_w]]
        y = y.unflatten(-1, (-1, 2, width))
        y = torch.cat([y[..., :1, :] + y[..., 1:, :], y[..., :1, :] - y[..., 1:, :]], -2).flatten(-3)
        width *= 2
    return (y / size**0.5).flatten(-2)


def _signs(features: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, (features,), generator=generator).double() * 2 - 1


def _turn(parameter: Tensor, signs: Tensor, dim: int) -> None:
    """Rotate a parameter along `dim`, in consecutive parts of len(signs) features (heads), in float64."""
    moved = parameter.double().movedim(dim, -1).unflatten(-1, (-1, len(signs)))
    parameter.copy_(hadamard(moved, signs.to(parameter.device)).flatten(-2).movedim(-1, dim))


def _absorb(norm: Any, *after: nn.Linear) -> None:
    """Move a norm's gain into the columns of the layers after it."""
    for layer in after:
        layer.weight.copy_(layer.weight.double() * norm.weight.double())
    norm.weight.fill_(1.0)
