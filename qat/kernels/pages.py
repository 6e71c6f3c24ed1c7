"""Memory for weights on huge pages, where the system has them.

A decoder reads every weight once a token.  With pages of 4 KiB the processor looks up an address for each 64 cache
lines, and misses nearly always; with pages of 2 MiB hardly ever.  Linux gives them to a range that asks for them before
it is written, and takes nothing back: a range that is never written takes no memory.
"""

import ctypes
import sys
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor

HUGE = 2 << 20
MADV_HUGEPAGE = 14  # linux/mman.h


def empty(*shape: int, dtype: torch.dtype, device: torch.device | str | None = None) -> Tensor:
    """`torch.empty`, aligned to a huge page and asking for them where it holds one.

    Args:
        shape, dtype, device: as torch's.
    """
    size = prod(shape) * dtype.itemsize
    if size < HUGE or torch.empty(0, device=device).device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    memory = torch.empty(size + HUGE, dtype=torch.uint8, device=device)
    start = -memory.data_ptr() % HUGE
    return ask_for_huge_pages(memory[start : start + size].view(dtype).view(shape))


def ask_for_huge_pages(tensor: Tensor) -> Tensor:
    """Ask for huge pages in the memory of a tensor that has not been written yet; without effect elsewhere.

    Args:
        tensor: any; only whole huge pages of its storage on the CPU are asked for.

    Returns:
        The same tensor.
    """
    storage = tensor.untyped_storage()
    libc = _libc()
    if libc is not None and tensor.is_cpu:
        first, last = -(-storage.data_ptr() // HUGE), (storage.data_ptr() + storage.nbytes()) // HUGE
        if first < last:
            libc.madvise(first * HUGE, (last - first) * HUGE, MADV_HUGEPAGE)  # a refusal costs speed, nothing else
    return tensor


@cache
def _libc() -> Any:
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc
