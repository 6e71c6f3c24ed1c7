"""Packed linear layers on NVIDIA GPUs: the kernels of `csrc/cuda/`, registered for CUDA tensors.

    qat::packed_linear   on the canonical bytes: repacks them into a workspace at every call, so that it needs no
                         second copy of the weights and no state
    qat::tiled_linear    on tiles that `repack` made once; what `qat.inference` uses after loading

What no kernel computes goes to the reference, with one logged line that says why.  The kernels keep exact integers in
the matrix units and multiply float sums by the scale, where the reference rounds scale * code to the activations'
type first: results agree bit for bit where sums and products are exact, and else to within that rounding.

The kernels have run on the emulator of `tests/kernels/simt`, and compile for sm_80, 86, 89 and 90a; none has run on a
GPU yet.
"""

import ctypes
import logging
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qat.kernels import cubins, reference
from qat.kernels.ops import check
from qat.kernels.plan import (
    MEDIUM_TOKENS,
    Launch,
    Layer,
    dequantize_launch,
    plan,
    repack_launch,
    why_not,
)
from qat.kernels.tiles import padded_rows, tile_scale

log = logging.getLogger(__name__)

# Why a kernel could not be compiled for a device: it is not tried again at every call.
_refused: dict[torch.device, str] = {}

torch.library.define(
    "qat::tiled_linear",
    "(Tensor x, Tensor tiles, Tensor scale, Tensor? bias, int bits, int group_size, int out_features) -> Tensor",
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
    reason = reason or unavailable(x.device) or _refused.get(x.device)
    if reason is None:
        try:
            tiles = repack(packed, bits, x.shape[-1])
            return tiled_linear(x, tiles, tile_scale(scale, x.dtype), bias, bits, group_size, packed.shape[0])
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
    run(repack_launch(layer), packed.device, packed.contiguous(), tiles, layer.n, layer.k)
    return tiles


def tiled_linear(
    x: Tensor, tiles: Tensor, scale: Tensor, bias: Tensor | None, bits: int, group_size: int, out_features: int
) -> Tensor:
    """A linear layer on tiled weights.

    Args:
        x: (..., in), float16 or bfloat16.
        tiles: (words,), int32, from `repack`.
        scale: (ceil(out / 16), groups, 16), from `qat.kernels.tiles.tile_scale` for x's dtype.
        bias: (out,), floating, or None.
        bits: of a weight, 4 or 8.
        group_size: 32, a multiple of 64, or in.
        out_features: rows of the weight that are not padding.

    Returns:
        (..., out), x's dtype.

    Raises:
        ValueError: a layer that no kernel computes, or operands that do not fit together.
        CompileError: the kernel cannot be compiled.
    """
    layer = check_tiled(x, tiles, scale, bias, bits, group_size, out_features)
    rows = padded_rows(x.reshape(-1, layer.k))
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    if len(rows) > MEDIUM_TOKENS:
        return F.linear(rows, dense(tiles, scale, layer), bias).reshape(*x.shape[:-1], layer.n)
    out = x.new_empty(len(rows), layer.n)
    if out.numel():
        _multiply(rows, tiles, scale, bias, out, layer)
    return out.reshape(*x.shape[:-1], layer.n)


@torch.library.register_fake("qat::tiled_linear")
def _fake(
    x: Tensor, tiles: Tensor, scale: Tensor, bias: Tensor | None, bits: int, group_size: int, out_features: int
) -> Tensor:
    check_tiled(x, tiles, scale, bias, bits, group_size, out_features)
    return x.new_empty(*x.shape[:-1], out_features)


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
    expected = {
        "tiles": (tiles, (layer.tile_words,), (torch.int32,)),
        "scale": (scale, (layer.row_tiles, layer.groups, 16), (x.dtype, torch.float32)),
    }
    if bias is not None:
        expected["bias"] = (bias, (out_features,), (torch.float16, torch.bfloat16, torch.float32, torch.float64))
    for name, (tensor, shape, dtypes) in expected.items():
        if tuple(tensor.shape) != shape or tensor.dtype not in dtypes or not tensor.is_contiguous():
            raise ValueError(
                f"qat::tiled_linear: {name} must be contiguous {' or '.join(map(str, dtypes))} of shape {shape}, "
                f"got {tensor.dtype} {tuple(tensor.shape)}"
            )
    return layer


def dense(tiles: Tensor, scale: Tensor, layer: Layer) -> Tensor:
    """The weights as training saw them.

    Args:
        tiles, scale: as `tiled_linear`'s.
        layer: what they hold.

    Returns:
        (out, in rounded up to 8), the layer's dtype; the padding is zero.
    """
    weight = torch.empty(layer.n, layer.stride, dtype=layer.dtype, device=tiles.device)
    run(dequantize_launch(layer), tiles.device, tiles, scale, weight, layer.n, layer.k, layer.groups)
    return weight


def _multiply(rows: Tensor, tiles: Tensor, scale: Tensor, bias: Tensor | None, out: Tensor, layer: Layer) -> None:
    m, device = len(rows), rows.device
    chosen = plan(layer, m, _multiprocessors(device))
    shape = (m, layer.n, layer.k, layer.groups)
    if chosen.linear.name.startswith("qat::linear_small"):
        run(chosen.linear, device, tiles, scale, rows, bias, out, *shape)
        return
    parts = None if chosen.splits == 1 else rows.new_empty(chosen.splits, m, layer.n, dtype=torch.float32)
    run(chosen.linear, device, tiles, scale, rows, bias, out, parts, *shape)
    if chosen.sum_splits is not None:
        run(chosen.sum_splits, device, parts, bias, out, m, layer.n, chosen.splits)


def run(launch: Launch, device: torch.device, *arguments: Tensor | int | None) -> None:
    """Launch a kernel on torch's current stream.

    Args:
        launch: which and how.
        device: a CUDA device.
        arguments: tensors are passed as their address, None as a null pointer, numbers as C ints.

    Raises:
        CompileError: it cannot be compiled.
    """
    cubins.nvrtc_version()  # says so where the packages are missing
    from cuda.core import LaunchConfig
    from cuda.core import launch as start

    index = torch.cuda.current_device() if device.index is None else device.index
    # The kernels are written for programmatic dependent launch; it stays off until it has been seen to work on a GPU,
    # and must stay off where a kernel follows the `repack` that wrote its weights.
    config = LaunchConfig(grid=launch.grid, block=launch.threads, shmem_size=launch.shared_bytes)
    with torch.cuda.device(index):
        kernel = _kernel(launch.name, launch.shared_bytes, index)
        start(torch.cuda.current_stream(index), config, kernel, *map(as_argument, arguments))


def as_argument(value: Tensor | int | None) -> Any:
    """How cuda.core takes it: a Python int is a pointer, a ctypes.c_int a C int."""
    if value is None:
        return 0
    return value.data_ptr() if isinstance(value, Tensor) else ctypes.c_int(value)


@cache
def _kernel(name: str, shared_bytes: int, index: int) -> Any:
    """A kernel, loaded, and allowed more shared memory than the 48 KiB that need no permission."""
    from cuda.bindings import driver
    from cuda.core import Device, ObjectCode

    Device(index).set_current()
    cubin = cubins.load(name, cubins.architecture(torch.cuda.get_device_capability(index)))
    kernel = ObjectCode.from_cubin(cubin.code).get_kernel(cubin.symbol)
    if shared_bytes > 48 * 1024:
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        (status,) = driver.cuKernelSetAttribute(attribute, shared_bytes, kernel.handle, driver.CUdevice(index))
        if status != driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"{name} needs {shared_bytes} bytes of shared memory: {status.name}")
    return kernel


def unavailable(device: torch.device) -> str | None:
    """Why no kernel runs on `device`, or None."""
    return _unavailable(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _unavailable(index: int) -> str | None:
    capability = torch.cuda.get_device_capability(index)
    if capability < cubins.OLDEST:
        return f"{torch.cuda.get_device_name(index)} is sm_{capability[0]}{capability[1]}, the kernels need sm_80"
    try:
        cubins.nvrtc_version()
    except cubins.CompileError as error:
        return str(error)
    return None


@cache
def _multiprocessor_count(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def _multiprocessors(device: torch.device) -> int:
    return _multiprocessor_count(torch.cuda.current_device() if device.index is None else device.index)


torch.library.impl("qat::packed_linear", "CUDA", packed_linear_cuda)
torch.library.impl("qat::tiled_linear", "CUDA", tiled_linear)
