"""Keys and values kept as bytes.

    one token of one head, (head_dim) bytes      code 0 | code 1 | ... | code head_dim - 1
    with a scale of its own, 2 bytes more        code 0 | ...          | code head_dim - 1 | scale, low byte first

A code is int8, or the bits of an e4m3 number.  Caches are handed uint8 tensors of these rows and need not know more:
they append, crop, reorder and slide rows.  What attention reads is dequantized anew in each forward, a layer at a time.
"""

from typing import Any

import torch
from torch import Tensor

from qat.attention import QuantizedKeyValues, attentions, kv_heads, quantize_key_values, scale_shape
from qat.functional import cache_scale, code_dtype, dequantize, quantize, scale_dtype
from qat.scheme import QuantSpec, cache_name


class PackedKeyValues(QuantizedKeyValues):
    """What trained `FakeQuantKeyValues` become: the same numbers, a byte each in the cache.

    State: `k_scale` and `v_scale`, (1,) or (kv_heads, 1, 1), in the spec's scale dtype whatever the model's; absent
    for tokens.  They are allocated, not filled.

    Args:
        spec: how both are quantized.
        kv_heads: of the attention.
    """

    k_scale: Tensor | None
    v_scale: Tensor | None

    def __init__(self, spec: QuantSpec, kv_heads: int):
        super().__init__()
        self.spec = spec
        for name in ("k_scale", "v_scale"):
            scale = None if spec.dynamic else torch.empty(scale_shape(spec, kv_heads), dtype=scale_dtype(spec))
            self.register_buffer(name, scale)

    def update(self, cache: Any, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        rows = self.write(key, value)
        if cache is not None:
            rows = cache.update(*rows, *args, **kwargs)
        return self.read(*rows, key.dtype)

    def write(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of keys and values (batch, kv_heads, tokens, head_dim)."""
        return to_rows(key, self.k_scale, self.spec), to_rows(value, self.v_scale, self.spec)

    def read(self, keys: Tensor, values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """What rows stand for, (batch, kv_heads, tokens, head_dim), `dtype`."""
        return from_rows(keys, self.k_scale, self.spec, dtype), from_rows(values, self.v_scale, self.spec, dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> "PackedKeyValues":
        """Follow the model to another device, never to another dtype: a rounded scale is another model."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(move, recurse)
        return self

    def extra_repr(self) -> str:
        return cache_name(self.spec)


def row_bytes(spec: QuantSpec, head_dim: int) -> int:
    """Of one token of one head, its scale included."""
    return head_dim + (scale_dtype(spec).itemsize if spec.dynamic else 0)


def to_rows(x: Tensor, scale: Tensor | None, spec: QuantSpec) -> Tensor:
    """Quantize keys, or values.

    Args:
        x: (batch, kv_heads, tokens, head_dim), floating.
        scale: (1,) or (kv_heads, 1, 1); None where each token of a head gets its own.
        spec: how.

    Returns:
        (batch, kv_heads, tokens, `row_bytes`), uint8.
    """
    used = cache_scale(x, spec) if scale is None else _of_tokens(scale, x)
    codes = quantize(x, used, spec).to(code_dtype(spec)).view(torch.uint8)
    return codes if scale is not None else torch.cat((codes, used.to(scale_dtype(spec)).view(torch.uint8)), -1)


def from_rows(rows: Tensor, scale: Tensor | None, spec: QuantSpec, dtype: torch.dtype) -> Tensor:
    """What `to_rows` wrote, dequantized: (batch, kv_heads, tokens, head_dim), `dtype`."""
    if scale is None:
        codes, kept = rows.split([rows.shape[-1] - scale_dtype(spec).itemsize, scale_dtype(spec).itemsize], -1)
        return dequantize(codes.view(code_dtype(spec)), kept.contiguous().view(scale_dtype(spec))).to(dtype)
    return dequantize(rows.view(code_dtype(spec)), _of_tokens(scale, rows)).to(dtype)


def _of_tokens(scale: Tensor, like: Tensor) -> Tensor:
    """A static scale as one of each token, (batch, kv_heads, tokens, 1) float32."""
    return scale.float().expand(*like.shape[:-1], 1)


def pack_key_values(model: Any, spec: QuantSpec) -> None:
    """Let every attention of `model` keep its keys and values as bytes, with scales that are yet to be filled.

    Raises:
        ValueError: the model has none, or one whose keys and values cannot be quantized.
    """
    for attention in attentions(model).values():
        quantize_key_values(attention, PackedKeyValues(spec, kv_heads(attention)))
