"""The tensors beside the weights that the CUDA kernels read, in the order of `csrc/cuda/layout.cuh`."""

import torch
from torch import Tensor
from torch.nn import functional as F

from qat.kernels.plan import INT8_ROW_MULTIPLE, ROW_MULTIPLE, TILE_N, runtime_scale_dtype


def tile_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales in the order in which a lane reads them: 16 rows side by side, padded with zeros.

    Args:
        scale: (out, groups), bfloat16, float16 or float32.
        dtype: of the activations.

    Returns:
        (ceil(out / 16), groups, 16), `dtype` where the scales are stored in it, else float32.
    """
    rows = F.pad(scale.to(runtime_scale_dtype(scale.dtype, dtype)), (0, 0, 0, -scale.shape[0] % TILE_N))
    return rows.unflatten(0, (-1, TILE_N)).transpose(1, 2).contiguous()


def padded_rows(x: Tensor) -> Tensor:
    """Rows that 16-byte loads can read: contiguous, aligned, and padded with zeros to a multiple of 8 values.

    Args:
        x: (tokens, in), a 16-bit type.

    Returns:
        (tokens, in rounded up to 8), x itself where nothing is to be done.
    """
    return _padded(x, ROW_MULTIPLE)


def padded_codes(codes: Tensor) -> Tensor:
    """The same for INT8: rows are a multiple of 16 values.

    Args:
        codes: (tokens, in), int8.

    Returns:
        (tokens, in rounded up to 16), codes itself where nothing is to be done.
    """
    return _padded(codes, INT8_ROW_MULTIPLE)


def interleave_rows(gate: Tensor, up: Tensor) -> Tensor:
    """Rows of two equal weights, scales or biases by turns, as the SwiGLU epilogue wants its layer: 2j gate, 2j + 1 up.

    Args:
        gate, up: (out, ...), the same dtype and shape.

    Returns:
        (2 * out, ...).
    """
    return torch.stack([gate, up], 1).flatten(0, 1)


def _padded(x: Tensor, multiple: int) -> Tensor:
    if missing := -x.shape[-1] % multiple:
        return F.pad(x, (0, missing))
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()
