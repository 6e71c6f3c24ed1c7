"""Packed linear layers on NVIDIA GPUs: the kernels of `csrc/cuda/`, registered for CUDA tensors.

    qat::packed_linear   on the canonical bytes: repacks them into a workspace at every call, so that it needs no
                         second copy of the weights and no state
    qat::tiled_linear    on tiles that `repack` made once; what `qat.inference` uses after loading
    qat::tiled_linear_int8   the same on the codes and scales of `quantize_tokens` or `rmsnorm_quantize`

What no kernel computes goes to the reference, with one logged line that says why.  The kernels keep exact integers in
the matrix units and multiply float sums by the scale, where the reference rounds scale * code to the activations'
type first: results agree bit for bit where sums and products are exact, and else to within that rounding.  Quantized
activations are multiplied as integers, where the reference rounds code * scale to the activations' type: the codes and
scales are the same.

The kernels have run on the emulator of `tests/kernels/simt`, and compile for sm_80, 86, 89 and 90a; none has run on a
GPU yet.
"""

import logging
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from qat.kernels import cubins, device, reference
from qat.kernels.cuda_quantize import quantize_tokens, rmsnorm_quantize
from qat.kernels.ops import check
from qat.kernels.plan import (
    MEDIUM_TOKENS,
    Layer,
    dequantize_launch,
    plan,
    repack_launch,
    why_not,
)
from qat.kernels.tiles import padded_codes, padded_rows, tile_scale

__all__ = [
    "dense",
    "packed_linear_cuda",
    "quantize_tokens",
    "repack",
    "rmsnorm_quantize",
    "tiled_linear",
    "tiled_linear_int8",
]

log = logging.getLogger(__name__)

# Why a kernel could not be compiled for a device: it is not tried again at every call.
_refused: dict[torch.device, str] = {}

torch.library.define(
    "qat::tiled_linear",
    "(Tensor x, Tensor tiles, Tensor scale, Tensor? bias, int bits, int group_size, int out_features, "
    "Tensor? residual=None, bool swiglu=False) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.define(
    "qat::tiled_linear_int8",
    "(Tensor codes, Tensor token_scale, Tensor tiles, Tensor scale, Tensor? bias, int bits, int group_size, "
    "int out_features, ScalarType dtype, Tensor? residual=None, bool swiglu=False) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def packed_linear_cuda(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    input_bits: int,
    input_scale: Tensor | None = None,
    input_rule: str = "qmax",
    backend: str = "reference",
) -> Tensor:
    """`qat::packed_linear` for CUDA tensors; arguments, result and errors are `qat.kernels.packed_linear`'s."""
    arguments = (x, packed, scale, zero_point, bias, bits, group_size, input_bits, input_scale, input_rule)
    check(*arguments)
    if backend == "reference":
        return reference.packed_linear(*arguments)
    if backend != "cuda":
        raise ValueError(f"qat::packed_linear: backend must be reference or cuda for CUDA tensors, got {backend!r}")
    reason = why_not(bits, group_size, x.shape[-1], x.dtype, zero_point is not None, input_bits)
    reason = reason or device.unavailable(x.device) or _refused.get(x.device)
    if reason is None:
        try:
            tiles = repack(packed, bits, x.shape[-1])
            runtime_scale, out_features = tile_scale(scale, x.dtype), packed.shape[0]
            if not input_bits:
                return tiled_linear(x, tiles, runtime_scale, bias, bits, group_size, out_features)
            codes, token_scale = quantize_tokens(x, input_scale, input_bits, input_rule)
            return tiled_linear_int8(
                codes, token_scale, tiles, runtime_scale, bias, bits, group_size, out_features, x.dtype
            )
        except cubins.CompileError as error:
            reason = _refused[x.device] = str(error)
    say_slower(reason)
    return reference.packed_linear(*arguments)


@cache
def say_slower(reason: str) -> None:
    """Log, once for each reason, that a layer is computed by the reference."""
    log.warning("packed layers on CUDA run on the slower reference: %s", reason)


def repack(packed: Tensor, bits: int, in_features: int) -> Tensor:
    """The canonical bytes in the order that the kernels read.

    Args:
        packed: (out, words), int32, on a CUDA device.
        bits: 4 or 8.
        in_features: codes in a row.

    Returns:
        (words,), int32: tiles of 16 outputs and 64 inputs, padded with zero weights.

    Raises:
        CompileError: the kernel cannot be compiled.
    """
    layer = Layer(packed.shape[0], in_features, bits, in_features, torch.float16, torch.float16)
    tiles = torch.empty(layer.tile_words, dtype=torch.int32, device=packed.device)
    device.run(repack_launch(layer), packed.device, packed.contiguous(), tiles, layer.n, layer.k)
    return tiles


def tiled_linear(
    x: Tensor,
    tiles: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    out_features: int,
    residual: Tensor | None = None,
    swiglu: bool = False,
) -> Tensor:
    """A linear layer on tiled weights, and what may follow it, in one launch for up to 64 tokens.

    Args:
        x: (..., in), float16 or bfloat16.
        tiles: (words,), int32, from `repack`.
        scale: (ceil(out / 16), groups, 16), from `qat.kernels.tiles.tile_scale` for x's dtype.
        bias: (out,), floating, or None.
        bits: of a weight, 4 or 8.
        group_size: 32, a multiple of 64, or in.
        out_features: rows of the weight that are not padding.
        residual: (..., out), x's dtype: the result is residual + linear, both rounded as torch would.
        swiglu: rows of the weight are gate and up by turns (`qat.kernels.tiles.interleave_rows`): the result is
            silu(gate) * up, (..., out / 2), rounded as torch would.

    Returns:
        (..., out), x's dtype.

    Raises:
        ValueError: a layer that no kernel computes, or operands that do not fit together.
        CompileError: the kernel cannot be compiled.
    """
    layer = check_tiled(x, tiles, scale, bias, bits, group_size, out_features)
    _check_epilogue(x, (*x.shape[:-1], out_features), x.dtype, residual, swiglu)
    rows = padded_rows(x.reshape(-1, layer.k))
    if len(rows) <= MEDIUM_TOKENS:
        out = _multiply(rows, None, tiles, scale, bias, residual, swiglu, layer)
        return out.reshape(*x.shape[:-1], out.shape[-1])
    linear = F.linear(rows, dense(tiles, scale, layer), None if bias is None else bias.to(x.dtype))
    linear = linear.reshape(*x.shape[:-1], layer.n)
    if swiglu:
        return F.silu(linear[..., ::2]) * linear[..., 1::2]
    return linear if residual is None else residual + linear


def tiled_linear_int8(
    codes: Tensor,
    token_scale: Tensor,
    tiles: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    out_features: int,
    dtype: torch.dtype,
    residual: Tensor | None = None,
    swiglu: bool = False,
) -> Tensor:
    """A linear layer on tiled weights and integer activations: W8A8 with channel scales, W4A8 with any.

    Args:
        codes: (..., in rounded up to 16), int8, zero from `in` on, from `quantize_tokens` or `rmsnorm_quantize`.
        token_scale: (...), float32, the same.
        tiles, scale, bias, bits, group_size, out_features: as `tiled_linear`'s; in is groups * group_size.
        dtype: of the result, float16 or bfloat16.
        residual, swiglu: as `tiled_linear`'s.

    Returns:
        (..., out), or (..., out / 2) with SwiGLU, `dtype`.

    Raises:
        ValueError: a layer that no kernel computes, or operands that do not fit together.
        CompileError: the kernel cannot be compiled.
    """
    layer = check_tiled_int8(codes, token_scale, tiles, scale, bias, bits, group_size, out_features, dtype)
    _check_epilogue(codes, (*codes.shape[:-1], out_features), dtype, residual, swiglu)
    rows = padded_codes(codes.reshape(-1, layer.stride))
    out = _multiply(rows, token_scale.reshape(-1).contiguous(), tiles, scale, bias, residual, swiglu, layer)
    return out.reshape(*codes.shape[:-1], out.shape[-1])


@torch.library.register_fake("qat::tiled_linear")
def _fake(
    x: Tensor,
    tiles: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    out_features: int,
    residual: Tensor | None = None,
    swiglu: bool = False,
) -> Tensor:
    check_tiled(x, tiles, scale, bias, bits, group_size, out_features)
    _check_epilogue(x, (*x.shape[:-1], out_features), x.dtype, residual, swiglu)
    return x.new_empty(*x.shape[:-1], out_features // (1 + swiglu))


@torch.library.register_fake("qat::tiled_linear_int8")
def _fake_int8(
    codes: Tensor,
    token_scale: Tensor,
    tiles: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    out_features: int,
    dtype: torch.dtype,
    residual: Tensor | None = None,
    swiglu: bool = False,
) -> Tensor:
    check_tiled_int8(codes, token_scale, tiles, scale, bias, bits, group_size, out_features, dtype)
    _check_epilogue(codes, (*codes.shape[:-1], out_features), dtype, residual, swiglu)
    return codes.new_empty(*codes.shape[:-1], out_features // (1 + swiglu), dtype=dtype)


def check_tiled(
    x: Tensor, tiles: Tensor, scale: Tensor, bias: Tensor | None, bits: int, group_size: int, out_features: int
) -> Layer:
    """The layer that the operands of `tiled_linear` describe.

    Raises:
        ValueError: no kernel computes it, or a shape or dtype is wrong; names the argument.
    """
    if reason := why_not(bits, group_size, x.shape[-1], x.dtype, False, 0):
        raise ValueError(f"qat::tiled_linear: no kernel for {reason}")
    if group_size < 1 or x.shape[-1] % group_size:
        raise ValueError(f"qat::tiled_linear: group_size {group_size} does not divide {x.shape[-1]} inputs")
    layer = Layer(out_features, x.shape[-1], bits, group_size, x.dtype, scale.dtype)
    _check_weight(layer, tiles, scale, bias, x.device)
    return layer


def check_tiled_int8(
    codes: Tensor,
    token_scale: Tensor,
    tiles: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    out_features: int,
    dtype: torch.dtype,
) -> Layer:
    """The layer that the operands of `tiled_linear_int8` describe.

    Raises:
        ValueError: no kernel computes it, or a shape or dtype is wrong; names the argument.
    """
    in_features = scale.shape[1] * group_size if scale.ndim == 3 else 0
    if reason := why_not(bits, group_size, in_features, dtype, False, 8):
        raise ValueError(f"qat::tiled_linear_int8: no kernel for {reason}")
    layer = Layer(out_features, in_features, bits, group_size, dtype, scale.dtype, True)
    _check_weight(layer, tiles, scale, bias, codes.device)
    _expect("codes", codes, (*codes.shape[:-1], layer.stride), (torch.int8,), codes.device)
    _expect("token_scale", token_scale, tuple(codes.shape[:-1]), (torch.float32,), codes.device)
    return layer


def _check_weight(layer: Layer, tiles: Tensor, scale: Tensor, bias: Tensor | None, device: torch.device) -> None:
    _expect("tiles", tiles, (layer.tile_words,), (torch.int32,), device)
    _expect("scale", scale, (layer.row_tiles, layer.groups, 16), (layer.dtype, torch.float32), device)
    if bias is not None:
        _expect("bias", bias, (layer.n,), (torch.float16, torch.bfloat16, torch.float32, torch.float64), device)


def _check_epilogue(
    like: Tensor, shape: tuple[int, ...], dtype: torch.dtype, residual: Tensor | None, swiglu: bool
) -> None:
    if swiglu and (residual is not None or shape[-1] % 2):
        raise ValueError(
            f"qat::tiled_linear: swiglu takes an even number of rows and no residual, got {shape[-1]} rows"
        )
    if residual is not None and (
        tuple(residual.shape) != shape or residual.dtype != dtype or residual.device != like.device
    ):
        raise ValueError(
            f"qat::tiled_linear: residual must be {dtype} of shape {shape} on {like.device}, "
            f"got {residual.dtype} {tuple(residual.shape)} on {residual.device}"
        )


def _expect(
    name: str, tensor: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], device: torch.device
) -> None:
    """Refuse an operand that a kernel would misread: it sees an address alone."""
    if tuple(tensor.shape) != shape or tensor.dtype not in dtypes or not tensor.is_contiguous():
        raise ValueError(
            f"qat::tiled_linear: {name} must be contiguous {' or '.join(map(str, dtypes))} of shape {shape}, "
            f"got {tensor.dtype} {tuple(tensor.shape)}"
        )
    if tensor.device != device:
        raise ValueError(f"qat::tiled_linear: {name} is on {tensor.device}, the activations on {device}: move one")


def dense(tiles: Tensor, scale: Tensor, layer: Layer) -> Tensor:
    """The weights as training saw them.

    Args:
        tiles, scale: as `tiled_linear`'s.
        layer: what they hold.

    Returns:
        (out, in rounded up to 8), the layer's dtype; the padding is zero.
    """
    weight = torch.empty(layer.n, layer.stride, dtype=layer.dtype, device=tiles.device)
    device.run(dequantize_launch(layer), tiles.device, tiles, scale, weight, layer.n, layer.k, layer.groups)
    return weight


def _multiply(
    rows: Tensor,
    token_scale: Tensor | None,
    tiles: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    swiglu: bool,
    layer: Layer,
) -> Tensor:
    """(tokens, out), or (tokens, out / 2) with SwiGLU, from padded rows."""
    m = len(rows)
    out = rows.new_empty(m, layer.n // (1 + swiglu), dtype=layer.dtype)
    if not out.numel():
        return out
    for name, tensor in (("tiles", tiles), ("scale", scale)):
        if tensor.data_ptr() % 16:  # loaded 16 bytes at a time
            raise ValueError(f"qat::tiled_linear: {name} must start at a multiple of 16 bytes: clone it")
    bias = None if bias is None else bias.to(layer.dtype).contiguous()
    residual = None if residual is None else residual.contiguous()
    chosen = plan(layer, m, device.multiprocessors(rows.device))
    before, shape = (
        (tiles, scale, rows, token_scale, bias, residual, out),
        (m, layer.n, layer.k, layer.groups, int(swiglu)),
    )
    if chosen.linear.name.startswith("qat::linear_small"):
        device.run(chosen.linear, rows.device, *before, *shape)
        return out
    sums = torch.int32 if layer.passes == 0 else torch.float32
    parts = None if chosen.splits == 1 else rows.new_empty(chosen.splits, m, layer.n, dtype=sums)
    device.run(chosen.linear, rows.device, *before, parts, *shape)
    if chosen.sum_splits is not None:
        epilogue = (scale if layer.passes == 0 else None, token_scale, bias, residual, out)
        device.run(chosen.sum_splits, rows.device, parts, *epilogue, m, layer.n, chosen.splits, int(swiglu))
    return out


torch.library.impl("qat::packed_linear", "CUDA", packed_linear_cuda)
torch.library.impl("qat::tiled_linear", "CUDA", tiled_linear)
torch.library.impl("qat::tiled_linear_int8", "CUDA", tiled_linear_int8)
