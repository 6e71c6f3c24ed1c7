"""Layers that read the same input, as one layer: a launch instead of several, and the input prepared once.

Rows of packed weights, of their scales and of biases concatenate along `out`.  The original layers are kept, and their
tensors become views of the concatenated ones: a fused model has every weight once, and still runs unfused.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qat.inference.cuda_backend import CudaLinear
from qat.inference.packed import PackedLinear
from qat.kernels import pages
from qat.kernels.plan import TILE_N


class Separate(nn.Module):
    """Layers that cannot be concatenated, called one after the other; results side by side on the last dimension."""

    def __init__(self, layers: Sequence[nn.Module]):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out of all layers)."""
        return torch.cat([layer(input) for layer in self.layers], -1)


def side_by_side(layers: Sequence[nn.Module]) -> nn.Module:
    """One module whose output is that of all `layers`, side by side.

    Args:
        layers: linear layers of the same input; where they are of one kind and scheme, their tensors are moved into
            concatenated ones, of which they keep views.

    Returns:
        A layer of the same kind that owns the concatenated tensors; else `Separate`.
    """
    if why_separate(layers) is not None:
        return Separate(layers)
    first = layers[0]
    if isinstance(first, PackedLinear):
        return _packed(layers)
    return _tiled(layers) if isinstance(first, CudaLinear) else _float(layers)


def why_separate(layers: Sequence[Any]) -> str | None:
    """What keeps `layers` from being concatenated, or None."""
    kind, first = type(layers[0]), layers[0]
    if kind not in (PackedLinear, CudaLinear, nn.Linear):
        return f"{kind.__name__} has an order of its own"
    if any(type(layer) is not kind for layer in layers):
        return "layers of several kinds"
    if any((layer.bias is None) != (first.bias is None) for layer in layers):
        return "some have a bias and some do not"
    same: set[tuple[Any, ...]]
    if kind is nn.Linear:
        same = {(layer.in_features, layer.weight.dtype) for layer in layers}
    elif kind is CudaLinear:
        # the last tile of rows of any other layer is padded
        if any(layer.out_features % TILE_N for layer in layers[:-1]):
            return f"outputs that are no multiple of {TILE_N}"
        same = {(layer.in_features, layer.bits, layer.group_size, layer.scale.dtype) for layer in layers}
    else:
        scales = [None if layer.input_scale is None else float(layer.input_scale) for layer in layers]
        same = {(layer.in_features, layer.scheme, layer.backend, s) for layer, s in zip(layers, scales, strict=True)}
    return None if len(same) == 1 else "several schemes or static scales"


def _packed(layers: Sequence[Any]) -> PackedLinear:
    first = layers[0]
    outputs = sum(layer.out_features for layer in layers)
    fused = PackedLinear(first.in_features, outputs, first.scheme, first.bias is not None, device="meta")
    fused.backend = first.backend
    fused.input_scale = first.input_scale
    for name in ("packed", "scale") if first.bias is None else ("packed", "scale", "bias"):
        setattr(fused, name, _joined(layers, name))
    return fused


def _tiled(layers: Sequence[Any]) -> CudaLinear:
    fused = CudaLinear.__new__(CudaLinear)
    nn.Module.__init__(fused)
    first = layers[0]
    fused.in_features, fused.out_features = first.in_features, sum(layer.out_features for layer in layers)
    fused.bits, fused.group_size = first.bits, first.group_size
    for name in ("tiles", "scale"):  # both outermost by tiles of rows
        fused.register_buffer(name, _joined(layers, name))
    fused.register_buffer("bias", None if first.bias is None else _joined(layers, "bias"))
    return fused


def _float(layers: Sequence[Any]) -> nn.Linear:
    first = layers[0]
    outputs = sum(layer.out_features for layer in layers)
    fused = nn.Linear(first.in_features, outputs, first.bias is not None, device="meta", dtype=first.weight.dtype)
    for name in ("weight",) if first.bias is None else ("weight", "bias"):
        setattr(fused, name, nn.Parameter(_joined(layers, name), requires_grad=False))
    return fused


@torch.no_grad()
def _joined(layers: Sequence[Any], name: str) -> Tensor:
    """The layers' tensors `name`, concatenated; theirs become views of it."""
    parts = [getattr(layer, name).detach() for layer in layers]
    shape = sum(map(len, parts)), *parts[0].shape[1:]
    joined = torch.cat(parts, out=pages.empty(*shape, dtype=parts[0].dtype, device=parts[0].device))
    start = 0
    for layer in layers:
        old = getattr(layer, name)
        part = joined[start : start + len(old)]
        start += len(old)
        setattr(layer, name, nn.Parameter(part, requires_grad=False) if isinstance(old, nn.Parameter) else part)
    return joined
