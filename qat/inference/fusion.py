"""Layers that read the same input, as one layer: a launch instead of several, and the input prepared once.

Rows of packed weights, of their scales and of biases concatenate along `out`.  Side by side, the original layers are
kept and their tensors become views of the concatenated ones: a fused model has every weight once, and still runs
unfused.  A layer's class says in `rows` which of its tensors have rows, and in `kin` what layers must share.
"""

from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

from qat.kernels import pages
from qat.kernels.tiles import interleave_rows


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
        layers: of the same input; where they are of one kind and scheme, their tensors are moved into concatenated
            ones, of which they keep views.

    Returns:
        A layer of the same kind that owns the concatenated tensors; else `Separate`.
    """
    if why_separate(layers) is not None:
        return Separate(layers)
    return _of_rows(layers, {name: _joined(layers, name) for name in _rows(layers[0])})


def by_turns(gate: Any, up: Any) -> Any:
    """A new layer whose row 2 j is `gate`'s row j, and row 2 j + 1 `up`'s: what a SwiGLU epilogue wants.

    Raises:
        ValueError: they cannot be one layer.
    """
    reason = why_separate([gate, up]) or (None if gate.out_features == up.out_features else "several sizes")
    if reason:
        raise ValueError(f"these layers cannot be one ({reason}): {gate.extra_repr()} and {up.extra_repr()}")
    return _of_rows([gate, up], {n: interleave_rows(getattr(gate, n), getattr(up, n)) for n in _rows(gate)})


def why_separate(layers: Sequence[Any]) -> str | None:
    """What keeps `layers` from being one, or None."""
    kind, first = type(layers[0]), layers[0]
    if kind is not nn.Linear and not hasattr(kind, "rows"):
        return f"{kind.__name__} has an order of its own"
    if any(type(layer) is not kind for layer in layers):
        return "layers of several kinds"
    if any((layer.bias is None) != (first.bias is None) for layer in layers):
        return "some have a bias and some do not"
    multiple = getattr(kind, "row_multiple", 1)
    if any(layer.out_features % multiple for layer in layers[:-1]):
        return f"outputs that are no multiple of {multiple}"
    kin = {(l.in_features, l.weight.dtype) if kind is nn.Linear else l.kin() for l in layers}  # noqa: E741
    return None if len(kin) == 1 else "several schemes or static scales"


def _rows(layer: Any) -> list[str]:
    names = getattr(layer, "rows", ("weight", "bias"))
    return [name for name in names if getattr(layer, name) is not None]


def _of_rows(layers: Sequence[Any], tensors: Mapping[str, Tensor]) -> Any:
    """A layer as the first one, but for the tensors that have rows."""
    fused = copy(layers[0])
    fused._buffers, fused._parameters = dict(fused._buffers), dict(fused._parameters)
    fused.out_features = sum(layer.out_features for layer in layers)
    for name, tensor in tensors.items():
        setattr(fused, name, nn.Parameter(tensor, requires_grad=False) if name in fused._parameters else tensor)
    return fused


@torch.no_grad()
def _joined(layers: Sequence[Any], name: str) -> Tensor:
    """The layers' tensors `name`, concatenated; theirs become views of it."""
    parts = [getattr(layer, name).detach() for layer in layers]
    shape = sum(map(len, parts)), *parts[0].shape[1:]
    joined = torch.cat(parts, out=pages.empty(*shape, dtype=parts[0].dtype, device=parts[0].device))
    for layer, part in zip(layers, joined.split([len(part) for part in parts]), strict=True):
        setattr(layer, name, nn.Parameter(part, requires_grad=False) if name in layer._parameters else part)
    return joined
