"""Keys and values of the tokens so far, written in place, and which of them a pass over a model reads."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from qat.inference.key_values import PackedKeyValues


@dataclass(frozen=True)
class Span:
    """What one pass writes to the cache and attends to.

    Attributes:
        slots: where its tokens go, as a slice, or int64 (tokens,) on the device.
        positions: (batch, tokens), int64: of the rotary embedding; 0 for padding.
        length: slots that it attends to, from the first.
        mask: (batch, 1, tokens, length), bool, False for what a token does not see; None where the causal mask is all.
    """

    slots: slice | Tensor
    positions: Tensor
    length: int
    mask: Tensor | None


class KeyValueCache:
    """Preallocated keys and values of all layers.

    `keys` and `values` are (layers, batch, kv_heads, capacity, head_dim), or rows of bytes in the place of head_dim
    (`qat.inference.key_values`).  Sequences are aligned on the right: row b is
    padding before slot `start[b]`.  `length` counts the slots in use.

    Args:
        layers, batch, kv_heads, capacity, head_dim: the shape.
        dtype: of keys and values.
        device: of all tensors.
    """

    def __init__(
        self,
        layers: int,
        batch: int,
        kv_heads: int,
        capacity: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ):
        shape = (layers, batch, kv_heads, capacity, head_dim)
        # Zeros and not empty: a masked slot is multiplied by a probability of 0, and 0 * NaN is NaN.
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.start = torch.zeros(batch, dtype=torch.int64, device=device)
        self.length, self.padded = 0, False

    @property
    def batch(self) -> int:
        """Rows."""
        return self.keys.shape[1]

    @property
    def capacity(self) -> int:
        """Slots of a row."""
        return self.keys.shape[3]

    @property
    def nbytes(self) -> int:
        """Of keys and values."""
        return self.keys.nbytes + self.values.nbytes

    def reset(self, padding: Tensor | None = None) -> None:
        """Forget everything.

        Args:
            padding: (batch,), integers: tokens of each row of the next prompt that are padding, on its left.
        """
        self.length = 0
        self.start.zero_() if padding is None else self.start.copy_(padding)
        self.padded = padding is not None and bool(padding.any())

    def require(self, tokens: Tensor) -> None:
        """Check the next tokens of each row, (batch, tokens): a wrong batch would be broadcast, or resize a buffer.

        Raises:
            ValueError: another batch, or they do not fit.
        """
        if len(tokens) != self.batch:
            raise ValueError(f"the cache has {self.batch} rows, the tokens {len(tokens)}: make it for that batch")
        if (needed := self.length + tokens.shape[1]) > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} tokens, {needed} are needed: make it with that capacity")

    def span(self, tokens: int) -> Span:
        """Of the next `tokens` tokens of each row, which fit."""
        begin, end = self.length, self.length + tokens
        slots = torch.arange(begin, end, device=self.start.device)
        mask = None
        if self.padded or (begin and tokens > 1):
            seen = torch.arange(end, device=slots.device)
            mask = (seen <= slots[:, None]) & (seen >= self.start[:, None, None])
            # A padding token sees itself: a softmax over nothing would be NaN.
            mask = (mask | (seen == slots[:, None]))[:, None]
        return Span(slice(begin, end), (slots - self.start[:, None]).clamp_(min=0), end, mask)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    span: Span,
    packed: PackedKeyValues | None = None,
) -> Tensor:
    """Store a layer's keys and values, and attend to all of the span.

    Query heads that share a key head stay a dimension of their own: keys are never repeated.

    Args:
        query: (batch, tokens, heads, head_dim).
        key, value: (batch, tokens, kv_heads, head_dim).
        keys, values: (batch, kv_heads, capacity, head_dim), one layer of a cache; written.
        span: where.
        packed: what turns keys and values into rows of bytes and back, of a cache that holds those.

    Returns:
        (batch, tokens, heads * head_dim).
    """
    key, value = key.transpose(1, 2), value.transpose(1, 2)
    if packed is not None:
        key, value = packed.write(key, value)
    for new, stored in ((key, keys), (value, values)):
        if isinstance(span.slots, slice):
            stored[:, :, span.slots] = new
        else:
            stored.index_copy_(2, span.slots, new)
    batch, tokens, heads, head_dim = query.shape
    keys, values = keys[:, :, : span.length], values[:, :, : span.length]
    if packed is not None:
        keys, values = packed.read(keys, values, query.dtype)
    if tokens == 1:  # the heads of a group are the queries of its key head
        grouped = query.view(batch, keys.shape[1], -1, head_dim)
        return F.scaled_dot_product_attention(grouped, keys, values, span.mask).reshape(batch, 1, -1)
    out = F.scaled_dot_product_attention(
        query.transpose(1, 2), keys, values, span.mask, is_causal=span.mask is None, enable_gqa=heads != keys.shape[1]
    )
    return out.transpose(1, 2).reshape(batch, tokens, -1)
