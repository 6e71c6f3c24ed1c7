"""Arguments of the functions in csrc/cpu/decode.h, as addresses: for a caller that runs the same work many times.

Each function here returns bytes in the layout of the struct of that name in csrc/cpu/common.h.  Tensors are contiguous
and stay alive as long as the bytes are used; `type` is a value of `qat.kernels.cpu.TYPES`.
"""

from dataclasses import dataclass
from struct import Struct

from torch import Tensor

from qat.kernels.cpu import TYPES

_NORM, _GATE = Struct("@3P2qif"), Struct("@2P2q2i")
_HEADS = "5q2P"
_ROTARY, _ATTEND = Struct(f"@6P{_HEADS}2i"), Struct(f"@4P{_HEADS}2i2f")


@dataclass(frozen=True)
class Heads:
    """Sizes of attention to one token of each row, and where the token goes.

    Attributes:
        batch, heads, kv_heads, head_dim, capacity: of query and cache.
        slot: (1,), int64, read when the work runs.
        start: (batch,), int64: the first slot of each row that is not padding.
    """

    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    capacity: int
    slot: Tensor
    start: Tensor

    def values(self) -> tuple[int, ...]:
        """In the order of the struct."""
        sizes = self.batch, self.heads, self.kv_heads, self.head_dim, self.capacity
        return (*sizes, self.slot.data_ptr(), self.start.data_ptr())


def norm(x: Tensor, weight: Tensor, y: Tensor, epsilon: float) -> bytes:
    """y (m, k) = weight (k,) * x (m, k) / rms(x)."""
    m, k = x.shape
    return _NORM.pack(x.data_ptr(), weight.data_ptr(), y.data_ptr(), m, k, TYPES[x.dtype], epsilon)


def rotary(qkv: Tensor, cos: Tensor, sin: Tensor, query: Tensor, keys: Tensor, values: Tensor, heads: Heads) -> bytes:
    """Turn queries and keys of qkv (batch, (heads + 2 kv_heads) * head_dim) by cos and sin (positions, head_dim).

    `query` (batch, heads * head_dim) and the token's slot of `keys` and `values` (batch, kv_heads, capacity, head_dim)
    are written.
    """
    pointers = (t.data_ptr() for t in (qkv, cos, sin, query, keys, values))
    return _ROTARY.pack(*pointers, *heads.values(), TYPES[qkv.dtype], 0)


def attend(query: Tensor, keys: Tensor, values: Tensor, out: Tensor, heads: Heads, threads: int) -> bytes:
    """out (batch, heads * head_dim) = softmax(query keys / sqrt(head_dim)) values, over the slots in use."""
    pointers = (t.data_ptr() for t in (query, keys, values, out))
    return _ATTEND.pack(*pointers, *heads.values(), TYPES[query.dtype], threads, heads.head_dim**-0.5, 0)


def gate(gate_up: Tensor, y: Tensor, threads: int) -> bytes:
    """y (m, n) = silu(gate) * up of gate_up (m, 2 n)."""
    m, n = y.shape
    return _GATE.pack(gate_up.data_ptr(), y.data_ptr(), m, n, TYPES[y.dtype], threads)
