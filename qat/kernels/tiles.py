"""The tensors beside the weights that the CUDA kernels read, in the order of `csrc/cuda/layout.cuh`."""

import torch
from torch import Tensor
from torch.nn import functional as F

from qat.kernels.plan import ROW_MULTIPLE, TILE_N, runtime_scale_dtype


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
    if missing := -x.shape[-1] % ROW_MULTIPLE:
        return F.pad(x, (0, missing))
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()
