"""Packed layers on qat's CUDA kernels, their weights repacked once."""

import logging
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation

from qat.inference.fusion import by_turns, why_separate
from qat.inference.packed import PackedLinear
from qat.kernels import cuda
from qat.kernels import device as kernels_device
from qat.kernels.plan import TILE_N, why_not
from qat.kernels.tiles import tile_scale

log = logging.getLogger(__name__)

# Of transformers: down(act_fn(gate(x)) * up(x)).
GATED_MLPS = ("LlamaMLP", "MistralMLP", "Qwen2MLP")


class CudaLinear(nn.Module):
    """`qat::tiled_linear` or `qat::tiled_linear_int8` with its tensors, in place of a `PackedLinear` on a CUDA device.

    `tiles` (words,) int32 and `scale` (ceil(out / 16), groups, 16) are in the order of the kernels and hold
    what the packed layer held; `bias` (out,) or None.

    Args:
        layer: filled, on a CUDA device.
        dtype: of the activations, float16 or bfloat16.
        swiglu: rows of `layer` are gate and up by turns, as `fusion.by_turns` orders them, and the result is
            silu(gate) * up, (..., out / 2).

    Raises:
        CompileError: the kernel that repacks cannot be compiled.
    """

    rows = ("tiles", "scale", "bias")  # outermost by tiles of `row_multiple` outputs, the last one padded
    row_multiple = TILE_N
    tiles: Tensor
    scale: Tensor
    input_scale: Tensor | None
    bias: Tensor | None

    def __init__(self, layer: PackedLinear, dtype: torch.dtype, swiglu: bool = False):
        super().__init__()
        self.swiglu = swiglu
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.bits, self.group_size, self.input_bits = layer.bits, layer.group_size, layer.input_bits
        self.input_rule = "qmax" if layer.scheme.input is None else layer.scheme.input.absmax_rule
        self.register_buffer("tiles", cuda.repack(layer.packed, layer.bits, layer.in_features))
        self.register_buffer("scale", tile_scale(layer.scale, dtype))
        self.register_buffer("input_scale", None if layer.input_scale is None else layer.input_scale.float())
        self.register_buffer("bias", None if layer.bias is None else layer.bias.to(dtype))

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """(..., in) -> (..., out), in the input's dtype; `residual` (..., out) is added in the same launch."""
        if self.input_bits:
            return self.multiply(*self.quantize(input), input.dtype, residual)
        weight = (self.tiles, self.scale, self.bias, self.bits, self.group_size, self.out_features)
        return torch.ops.qat.tiled_linear(input, *weight, residual, self.swiglu)

    def of_norm(self, input: Tensor, norm: Any) -> Tensor:
        """`forward` of an RMSNorm's result; where the scheme quantizes each token, both are one launch."""
        if not self.input_bits or self.input_scale is not None:
            return self(norm(input))
        weight, epsilon = norm.weight, norm.variance_epsilon
        codes, scale = torch.ops.qat.rmsnorm_quantize(input, weight, epsilon, self.input_bits, self.input_rule)
        return self.multiply(codes, scale, input.dtype)

    def kin(self) -> tuple[Any, ...]:
        """What layers have in common that can be rows of one."""
        static = None if self.input_scale is None else float(self.input_scale)
        scheme = self.bits, self.group_size, self.input_bits, self.input_rule, static
        return self.in_features, self.scale.dtype, self.swiglu, scheme

    def quantize(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """The codes and scales of (..., in) by the scheme; see `qat.kernels.cuda.quantize_tokens`."""
        return torch.ops.qat.quantize_tokens(input, self.input_scale, self.input_bits, self.input_rule)

    def multiply(
        self, codes: Tensor, token_scale: Tensor, dtype: torch.dtype, residual: Tensor | None = None
    ) -> Tensor:
        """`forward` on codes and scales that `quantize`, another layer's, or `rmsnorm_quantize` gave; -> `dtype`."""
        weight = (self.tiles, self.scale, self.bias, self.bits, self.group_size, self.out_features)
        return torch.ops.qat.tiled_linear_int8(codes, token_scale, *weight, dtype, residual, self.swiglu)

    def _apply(self, fn: Any, recurse: bool = True) -> "CudaLinear":
        """Follow the model to another device, never to another dtype: rounded scales are another model.

        Raises:
            ValueError: the model was converted.
        """
        before = self.scale.dtype
        super()._apply(fn, recurse)
        if self.scale.dtype != before:
            raise ValueError("a model on backend cuda cannot change its dtype: load it again with dtype=...")
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}"


class GatedMlp(nn.Module):
    """The MLP of a Llama-like block in two launches: gate, up and SwiGLU are one."""

    def __init__(self, gate_up: CudaLinear, down_proj: nn.Module):
        super().__init__()
        self.gate_up, self.down_proj = gate_up, down_proj

    def forward(self, input: Tensor) -> Tensor:
        """(..., hidden) -> (..., hidden)."""
        return self.down_proj(self.gate_up(input))


def require_cuda(device: torch.device) -> None:
    """Refuse a device that the kernels do not run on, before anything is loaded.

    Raises:
        ValueError: says why, and what to use instead.
    """
    if device.type != "cuda":
        raise ValueError(f"backend cuda runs on NVIDIA GPUs, not on {device}: use device=cuda or another backend")
    if not torch.cuda.is_available():
        raise ValueError("backend cuda needs an NVIDIA GPU, its driver, and a torch built for CUDA: none was found")
    if reason := kernels_device.unavailable(device):
        raise ValueError(f"backend cuda: {reason}; backend=reference runs everywhere")


def use_cuda_kernels(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace the packed layers of `model` that a kernel computes, one after the other; one log line says which.

    Gate and up of a Llama-like MLP become one layer, SwiGLU in its epilogue.  The packed bytes of a layer are freed
    before the next one is repacked: the model never has two copies.

    Args:
        model: on a CUDA device, with filled `PackedLinear` layers.
        dtype: of its activations.

    Raises:
        CompileError: a kernel cannot be compiled.
    """
    counts: Counter[str] = Counter()
    for name in [name for name, module in model.named_modules() if type(module).__name__ in GATED_MLPS]:
        mlp: Any = model.get_submodule(name)
        gate, up = mlp.gate_proj, mlp.up_proj
        if not isinstance(gate, PackedLinear) or not isinstance(mlp.act_fn, SiLUActivation):
            continue
        if why_separate([gate, up]) is None and _why_not(gate, dtype) is None:
            model.set_submodule(name, GatedMlp(CudaLinear(by_turns(gate, up), dtype, swiglu=True), mlp.down_proj))
            counts["CUDA kernels"] += 2
    for name in [name for name, module in model.named_modules() if isinstance(module, PackedLinear)]:
        layer = model.get_submodule(name)
        assert isinstance(layer, PackedLinear)
        reason = _why_not(layer, dtype)
        counts["CUDA kernels" if reason is None else f"the slower reference ({reason})"] += 1
        if reason is None:
            model.set_submodule(name, CudaLinear(layer, dtype))
    log.info("backend cuda: %s", ", ".join(f"{n} layers on {kind}" for kind, n in counts.items()))


def _why_not(layer: PackedLinear, dtype: torch.dtype) -> str | None:
    return layer.beyond_operator or why_not(
        layer.bits, layer.group_size, layer.in_features, dtype, False, layer.input_bits
    )
