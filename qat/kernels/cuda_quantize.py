"""Activations to integer codes on NVIDIA GPUs, alone or behind RMSNorm, in one pass: `csrc/cuda/quantize.cuh`.

    qat::quantize_tokens    qat.functional.dynamic_scale (or a static scale) and quantize, bit for bit
    qat::rmsnorm_quantize   transformers' LlamaRMSNorm first, but for the order in which squares are summed

Registered for CUDA tensors; the codes are what `qat::tiled_linear_int8` multiplies.
"""

import torch
from torch import Tensor

from qat.kernels import device
from qat.kernels.plan import INT8_ROW_MULTIPLE, MAX_INT8_INPUTS, ceil_div, quantize_launch
from qat.kernels.tiles import padded_rows

for _schema in (
    "quantize_tokens(Tensor x, Tensor? input_scale=None, int bits=8, str rule='qmax') -> (Tensor, Tensor)",
    "rmsnorm_quantize(Tensor x, Tensor weight, float eps, int bits=8, str rule='qmax') -> (Tensor, Tensor)",
):
    _name, _signature = _schema.split("(", 1)
    torch.library.define(f"qat::{_name}", f"({_signature}", tags=(torch.Tag.pt2_compliant_tag,))


def quantize_tokens(
    x: Tensor, input_scale: Tensor | None = None, bits: int = 8, rule: str = "qmax"
) -> tuple[Tensor, Tensor]:
    """Codes and scales of activations.

    Args:
        x: (..., in), float16 or bfloat16.
        input_scale: (1,), floating: the static scale; None for one from each token's absolute maximum.
        bits: of a code, 2 to 8.
        rule: the `absmax_rule` of dynamic scales.

    Returns:
        codes (..., in rounded up to 16), int8, zero from `in` on; scales (...), float32.

    Raises:
        ValueError: what the kernel cannot quantize.
        CompileError: it cannot be compiled.
    """
    codes, scale = _results(x, bits, rule)
    rows, static = padded_rows(x.reshape(-1, x.shape[-1])), None if input_scale is None else input_scale.float()
    if scale.numel():
        launch = quantize_launch("quantize_tokens", x.dtype, len(rows), x.shape[-1])
        device.run(launch, x.device, rows, static, codes, scale, x.shape[-1], *_range(bits, rule))
    return codes, scale


def rmsnorm_quantize(x: Tensor, weight: Tensor, eps: float, bits: int = 8, rule: str = "qmax") -> tuple[Tensor, Tensor]:
    """Codes and scales of weight * (x / sqrt(mean(x^2) + eps)), rounded where LlamaRMSNorm rounds.

    Args:
        x: (..., in), float16 or bfloat16.
        weight: (in,), x's dtype.
        eps: of the norm.
        bits, rule: as `quantize_tokens`'.

    Returns:
        codes (..., in rounded up to 16), int8, zero from `in` on; scales (...), float32.

    Raises:
        ValueError: what the kernel cannot quantize.
        CompileError: it cannot be compiled.
    """
    codes, scale = _norm_results(x, weight, bits, rule)
    rows = padded_rows(x.reshape(-1, x.shape[-1]))
    if scale.numel():
        launch = quantize_launch("rmsnorm_quantize", x.dtype, len(rows), x.shape[-1])
        gain = padded_rows(weight[None])
        device.run(launch, x.device, rows, gain, codes, scale, x.shape[-1], float(eps), *_range(bits, rule))
    return codes, scale


def _range(bits: int, rule: str) -> tuple[int, int]:
    """qmax, and 1 for the rule whose divisor is qmax + 1/2."""
    return 2 ** (bits - 1) - 1, int(rule == "half_range")


def _results(x: Tensor, bits: int, rule: str) -> tuple[Tensor, Tensor]:
    """Empty codes and scales, after checks."""
    if x.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"qat::quantize_tokens: x must be torch.float16 or torch.bfloat16, got {x.dtype}")
    if not 1 <= x.shape[-1] <= MAX_INT8_INPUTS:
        raise ValueError(f"qat::quantize_tokens: a token has 1 to {MAX_INT8_INPUTS} values, got {x.shape[-1]}")
    if not 2 <= bits <= 8 or rule not in ("half_range", "qmax"):
        raise ValueError(f"qat::quantize_tokens: no kernel for {bits} bits and the rule {rule!r}")
    padded = ceil_div(x.shape[-1], INT8_ROW_MULTIPLE) * INT8_ROW_MULTIPLE
    return x.new_empty(*x.shape[:-1], padded, dtype=torch.int8), x.new_empty(x.shape[:-1], dtype=torch.float32)


def _norm_results(x: Tensor, weight: Tensor, bits: int, rule: str) -> tuple[Tensor, Tensor]:
    if weight.shape != x.shape[-1:] or weight.dtype != x.dtype:
        raise ValueError(
            f"qat::rmsnorm_quantize: weight must be {x.dtype} of shape {tuple(x.shape[-1:])}, "
            f"got {weight.dtype} {tuple(weight.shape)}"
        )
    return _results(x, bits, rule)


@torch.library.register_fake("qat::quantize_tokens")
def _fake(x: Tensor, input_scale: Tensor | None = None, bits: int = 8, rule: str = "qmax") -> tuple[Tensor, Tensor]:
    return _results(x, bits, rule)


@torch.library.register_fake("qat::rmsnorm_quantize")
def _fake_norm(x: Tensor, weight: Tensor, eps: float, bits: int = 8, rule: str = "qmax") -> tuple[Tensor, Tensor]:
    return _norm_results(x, weight, bits, rule)


torch.library.impl("qat::quantize_tokens", "CUDA", quantize_tokens)
torch.library.impl("qat::rmsnorm_quantize", "CUDA", rmsnorm_quantize)
