"""`qat::packed_linear` on CPUs, by the C++ kernels in csrc/cpu/: w4a16, w8a16, w4a8, w8a8 from the packed bytes.

    tokens   w4a16, w8a16                      w4a8, w8a8 in groups   w8a8, channel
    few      own: q * x in float32             own: integer sums      own: integer sums
    many     tiles of dequantized weights,     own: integer sums      with VNNI torch._int_mm on tiles of codes,
             torch's matrix product                                   else own

Activations are quantized only where the scheme says so.  Sums are float32 (or int32), and rounded to x's dtype once.
"""

import ctypes
import logging
from functools import cache
from struct import Struct
from typing import Any

import torch
from torch import Tensor

from qat.functional import dynamic_scale, quantize
from qat.kernels import build
from qat.kernels.build import BuildError
from qat.kernels.reference import input_spec

log = logging.getLogger(__name__)

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# From here on torch is faster than the own kernels (benchmarks/cpu_linear.py): its matrix product over dequantized
# tiles, of float32 on AVX2 and of bfloat16 on AVX512 (both from between 16 and 32); its int8 product on VNNI.
MANY_TOKENS, MANY_TOKENS_IN_INT8 = 32, 96
TILE = 1 << 20  # weights that are dequantized at once: 4 MB in float32
MOST_INPUTS = 65536  # int32 sums; csrc/cpu/int8_input.h
# `Arguments` in csrc/cpu/library.cpp.  Packing them costs a third of what ctypes takes to convert twenty.
ARGUMENTS = Struct("@6P5q7i2f4x")


class Kernels:
    """The functions of a compiled library.

    Args:
        library: as `qat.kernels.build.load` returns it.
        isa: 0 portable, 1 AVX2, 2 AVX512 with VNNI; the best that the machine has by default.
    """

    def __init__(self, library: ctypes.CDLL, isa: int | None = None):
        pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        self.linear = library.qat_linear
        self.linear.argtypes = [ctypes.c_char_p]
        self.dequantize = library.qat_dequantize
        self.dequantize.argtypes = [pointer] * 3 + [size] * 4 + [number] * 5
        self.dequantize.restype = None
        # Of what lies between linear layers (decode.h); qat.kernels.cpu_decode makes their arguments.
        self.norm, self.rotary, self.attend, self.gate = (
            getattr(library, f"qat_{name}") for name in ("norm", "rotary", "attend", "gate")
        )
        for function in (self.norm, self.rotary, self.attend, self.gate):
            function.argtypes = [ctypes.c_char_p, number]
        self.isa = library.qat_cpu_isa() if isa is None else isa


@cache
def _built() -> Kernels | BuildError:
    try:
        return Kernels(build.load())
    except BuildError as error:
        return error


def kernels() -> Kernels:
    """The compiled kernels; compiles them at the first call of a machine's user, which takes some seconds.

    Raises:
        BuildError: they cannot be compiled; holds the compiler's output.
    """
    built = _built()
    if isinstance(built, BuildError):
        raise built
    return built


@cache
def unsupported(bits: int, group_size: int, in_features: int, input_bits: int = 0) -> str | None:
    """Why the kernels cannot compute a layer, or None where they can."""
    if bits not in (4, 8):
        return f"weights of {bits} bits"
    if group_size != in_features and (group_size < 32 or group_size & (group_size - 1)):
        return f"groups of {group_size}"
    if in_features < 1 or (input_bits and in_features > MOST_INPUTS):
        return f"{in_features} inputs"
    return None


def packed_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    input_bits: int,
    input_scale: Tensor | None,
    input_rule: str,
    use: Kernels | None = None,
) -> Tensor:
    """As `qat.kernels.packed_linear`, whose checks the arguments have passed.

    Differs from the reference by rounding alone: the reference rounds weights and quantized activations to x's
    dtype, this rounds nothing but the result.

    Raises:
        ValueError: a scheme, dtype or memory layout that the kernels don't take.
        BuildError: they cannot be compiled.
    """
    # A decoder calls this a hundred times a token, with caches full of weights: every line is paid for.
    use = use or kernels()
    (out_features, words), shape, dtype = packed.shape, x.shape, x.dtype
    in_features = shape[-1]
    reason = "zero points" if zero_point is not None else unsupported(bits, group_size, in_features, input_bits)
    if dtype not in TYPES:
        reason = f"activations of {dtype}"
    if reason:
        raise ValueError(f"qat::packed_linear: backend cpu has no kernel for {reason}: use backend='reference'")
    if not (packed.is_contiguous() and scale.is_contiguous()):
        name = "scale" if packed.is_contiguous() else "packed"
        raise ValueError(f"qat::packed_linear: backend cpu needs {name} contiguous")
    if not x.is_contiguous():
        x = x.contiguous()
    if bias is not None:
        bias = bias.to(dtype).contiguous()
    tokens = x.numel() // in_features
    if tokens >= MANY_TOKENS:
        rows = x.view(tokens, in_features)
        if input_bits == 0:
            return _by_tiles(use, rows, packed, scale, bias, bits, group_size).view(*shape[:-1], out_features)
        vnni = (bits, group_size, use.isa) == (8, in_features, 2)
        if vnni and tokens >= MANY_TOKENS_IN_INT8 and in_features > 1:  # torch 2.13's reads past one input
            out = _by_int_mm(rows, packed, scale, bias, input_bits, input_scale, input_rule)
            return out.view(*shape[:-1], out_features)
    out = torch.empty((*shape[:-1], out_features), dtype=dtype)
    if tokens == 0 or out_features == 0:
        return out
    mode, static, divisor = 0, 0.0, 1.0
    if input_bits:
        mode, static = (1, 0.0) if input_scale is None else (2, float(input_scale.float()))
        divisor = input_spec(input_bits, input_rule).absmax_divisor
    failed = use.linear(
        ARGUMENTS.pack(
            x.data_ptr(), out.data_ptr(), 0 if bias is None else bias.data_ptr(), 0,  # no residual
            packed.data_ptr(), scale.data_ptr(), tokens, out_features, in_features, group_size, 4 * words,
            bits, TYPES[dtype], TYPES[scale.dtype], mode, input_bits, use.isa, torch.get_num_threads(),
            static, divisor,
        )
    )  # fmt: skip
    if failed:
        raise MemoryError(f"qat::packed_linear: no memory for {tuple(shape)} activations")
    return out


def _by_tiles(
    use: Kernels, rows: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, bits: int, group_size: int
) -> Tensor:
    """(m, in) -> (m, out), a bounded number of weights dequantized at a time."""
    (out_features, words), in_features = packed.shape, rows.shape[1]
    dtype = _tile_dtype(rows.dtype)
    left = rows.to(dtype)
    out = torch.empty(len(rows), out_features, dtype=dtype)
    height = min(out_features, max(16, TILE // in_features))
    tile = torch.empty(height, in_features, dtype=dtype)
    for start in range(0, out_features, height):
        count = min(height, out_features - start)
        use.dequantize(
            packed[start].data_ptr(), scale[start].data_ptr(), tile.data_ptr(), count, in_features, group_size,
            4 * words, bits, TYPES[scale.dtype], TYPES[dtype], use.isa, torch.get_num_threads(),
        )  # fmt: skip
        part = out[:, start : start + count]
        if bias is None:
            torch.mm(left, tile[:count].T, out=part)
        else:  # added before the sum is rounded to 16 bits
            torch.addmm(bias[start : start + count].to(dtype), left, tile[:count].T, out=part)
    return out.to(rows.dtype)


def _by_int_mm(
    rows: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, bits: int, static: Tensor | None, rule: str
) -> Tensor:
    """(m, in) -> (m, out) for 8-bit weights with a scale a channel.

    torch's int8 product needs VNNI: on AVX2 it was 50 times slower than the own kernel (2048 x 2048, 128 tokens).
    """
    spec, (out_features, in_features) = input_spec(bits, rule), (len(packed), rows.shape[1])
    token = dynamic_scale(rows, spec) if static is None else static.float().expand(len(rows), 1)
    codes = quantize(rows, token, spec)
    token = torch.where(codes.isnan().any(-1, keepdim=True), torch.nan, token)  # int8 holds no NaN, the scale does
    left = codes.nan_to_num_(0).to(torch.int8)
    out = torch.empty(len(rows), out_features, dtype=rows.dtype)
    height = max(16, TILE // in_features)
    for start in range(0, out_features, height):
        unsigned = packed[start : start + height].view(torch.uint8)[:, :in_features]
        sums = torch._int_mm(left, (unsigned ^ 128).view(torch.int8).T).float()  # u - 128: the top bit flipped
        sums = sums.mul_(scale[start : start + height, 0].float()).mul_(token)
        out[:, start : start + height] = sums if bias is None else sums.add_(bias[start : start + height])
    return out


@cache
def _tile_dtype(dtype: torch.dtype) -> Any:
    """What torch multiplies fastest: 16 bits where the processor has instructions for them, else float32."""
    supported = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return dtype if dtype in supported and supported[dtype]() else torch.float32
