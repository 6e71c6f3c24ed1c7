"""Packed layers on the C++ kernels for CPUs: w4a16, w8a16, w4a8, w8a8, straight from the exported bytes."""

import logging
from collections import Counter

import torch
from torch import nn

from qat.inference.packed import PackedLinear
from qat.kernels import cpu

log = logging.getLogger(__name__)


def use_cpu_kernels(model: nn.Module, dtype: torch.dtype) -> None:
    """Run the packed layers of `model` on the CPU kernels where these fit; one log line says which.

    Args:
        model: with `PackedLinear` layers.
        dtype: of its activations.

    Raises:
        BuildError: the kernels cannot be compiled; the model is as before.
    """
    names = ("portable", "AVX2", "AVX512-VNNI")
    own = f"cpu kernels ({names[cpu.kernels().isa]})"
    counts: Counter[str] = Counter()
    for layer in model.modules():
        if not isinstance(layer, PackedLinear):
            continue
        reason = layer.beyond_operator
        reason = reason or cpu.unsupported(layer.bits, layer.group_size, layer.in_features, layer.input_bits)
        if dtype not in cpu.TYPES:
            reason = f"activations of {dtype}"
        if reason is None:
            layer.backend = "cpu"
        counts[own if reason is None else f"the slower reference (no kernel for {reason})"] += 1
    log.info("backend cpu: %s", ", ".join(f"{n} layers on {where}" for where, n in counts.items()))
