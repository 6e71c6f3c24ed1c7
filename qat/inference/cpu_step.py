"""One token of each row on the CPU kernels, recorded once as a list of calls.

A step does the same work on the same memory each time: what changes are the tokens, which are looked up into the first
buffer, and the slot of the cache, which the calls read from memory.  So every call is a function and the bytes of its
arguments, and a step is a loop over them: a microsecond a call, where the modules of the decoder need ten to fifty.

Of a cache of bytes the kernels know nothing: one layer after the other is dequantized into a buffer of floats that all
share, by torch, and the call between the kernels' is a Python one.

Numerics: `csrc/cpu/decode.h` rounds to the model's dtype where the decoder's modules do.  Its sums (the norm's, scores
and values of attention) are float32 in another order, and probabilities stay float32; the modules' are torch's.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qat.inference.cache import KeyValueCache
from qat.inference.key_values import PackedKeyValues
from qat.inference.llama import Block, LlamaDecoder
from qat.inference.packed import PackedLinear
from qat.kernels import cpu, cpu_decode
from qat.kernels.cpu_layer import CpuLayer

# Below this many tokens at once the own kernels multiply, for more the modules of the decoder are as fast.
MOST_ROWS = cpu.MANY_TOKENS - 1


def why_not(decoder: LlamaDecoder, batch: int = 1) -> str | None:
    """Why a step is not recorded, or None where it is: the layers are on backend cpu, some of them packed."""
    if decoder.dtype not in cpu.TYPES:
        return f"activations of {decoder.dtype}"
    if batch > MOST_ROWS:
        return f"a batch of {batch}"
    layers = [layer for block in decoder.blocks for layer in _linears(block)]
    if not any(isinstance(layer, PackedLinear) and layer.backend == "cpu" for layer in layers):
        return "no layer on backend cpu"
    strange = [layer for layer in layers if cpu_layer(layer, decoder.dtype) is None]
    return f"a layer of {type(strange[0]).__name__}" if strange else None


def cpu_layer(layer: nn.Module, dtype: torch.dtype) -> CpuLayer | None:
    """The kernel's view of a packed layer, or of a float one in bfloat16; None where no kernel computes it."""
    if isinstance(layer, PackedLinear):
        return layer.resolved(dtype) if layer.backend == "cpu" else None
    if type(layer) is nn.Linear and layer.weight.dtype == torch.bfloat16:
        inputs = layer.in_features
        return CpuLayer(layer.weight.detach(), None, layer.bias, 16, inputs, in_features=inputs, dtype=dtype)
    return None


def _linears(block: Any) -> list[nn.Module]:
    return [block.qkv, block.out, block.gate_up, block.down]


class CpuStep:
    """Runs one token of each row.

    Args:
        decoder: for which `why_not` is None; or one of float layers in bfloat16.
        cache: of it; the calls read and write its tensors.
    """

    def __init__(self, decoder: LlamaDecoder, cache: KeyValueCache):
        self.decoder, self.cache = decoder, cache
        self.kernels = cpu.kernels()
        self.slot = torch.zeros(1, dtype=torch.int64)
        self.threads = 0
        self.calls: list[tuple[Callable[..., int], tuple[Any, ...]]] = []

    def __call__(self, tokens: Tensor) -> Tensor:
        """(batch, 1), int64 -> logits (batch, 1, vocabulary), overwritten by the next call.

        Raises:
            ValueError: the cache is full, or has another batch.
            MemoryError: there is none for temporaries.
        """
        cache = self.cache
        cache.require(tokens)
        if self.threads != torch.get_num_threads():
            self._record()
        self.slot[0] = cache.length
        if self.table is None:
            self.x.copy_(self.decoder.embedding(tokens[:, 0]))
        else:
            torch.index_select(self.table, 0, tokens[:, 0], out=self.x)
        for function, arguments in self.calls:
            if function(*arguments):
                raise MemoryError("no memory for a step's temporaries")
        cache.length += 1
        return (self.logits if self.logits is not None else self.decoder.head(self.normed))[:, None]

    def _record(self) -> None:
        decoder, cache, dtype = self.decoder, self.cache, self.decoder.dtype
        self.threads, self.calls = torch.get_num_threads(), []
        # Without the autograd state that parameters have; None where rows are packed.
        self.table = decoder.embedding.weight.detach() if type(decoder.embedding) is nn.Embedding else None
        self.x = torch.empty(cache.batch, len(decoder.norm.weight), dtype=dtype)
        self.normed = torch.empty_like(self.x)
        self.cos, self.sin = (table.contiguous() for table in decoder.rotary(cache.capacity))
        shape = (*cache.keys.shape[1:-1], decoder.head_dim)
        # Zeros as a cache's: a masked slot is multiplied by a probability of 0.
        self.floats = [torch.zeros(shape, dtype=dtype) for _ in range(2 if cache.keys.dtype == torch.uint8 else 0)]
        for number, block in enumerate(decoder.blocks):
            assert isinstance(block, Block)
            self._record_block(block, cache.keys[number], cache.values[number])
        self._norm(decoder.norm)
        head = cpu_layer(decoder.head, dtype)
        self.logits = None if head is None else self._linear(head, self.normed)

    def _record_block(self, block: Block, keys: Tensor, values: Tensor) -> None:
        qkv, out, gate_up, down = (cpu_layer(layer, self.x.dtype) for layer in _linears(block))
        assert qkv is not None and out is not None and gate_up is not None and down is not None
        kernels, isa, cache = self.kernels, self.kernels.isa, self.cache
        sizes = cache.batch, block.heads, block.kv_heads, self.decoder.head_dim, cache.capacity
        heads = cpu_decode.Heads(*sizes, self.slot, cache.start)

        self._norm(block.norm)
        packed = self._linear(qkv, self.normed)
        query = self.x.new_empty(cache.batch, out.in_features)
        stored, (keys, values) = (keys, values), self.floats or (keys, values)
        turn = cpu_decode.rotary(packed, self.cos, self.sin, query, keys, values, heads)
        self.calls.append((kernels.rotary, (turn, isa)))
        if block.packed is not None:
            self.calls.append((self._through_bytes, (block.packed, *stored)))
        attended = torch.empty_like(query)
        look = cpu_decode.attend(query, keys, values, attended, heads, self.threads)
        self.calls.append((kernels.attend, (look, isa)))
        self._linear(out, attended, add_to=self.x)

        self._norm(block.mlp_norm)
        both = self._linear(gate_up, self.normed)
        gated = self.x.new_empty(cache.batch, down.in_features)
        self.calls.append((kernels.gate, (cpu_decode.gate(both, gated, self.threads), isa)))
        self._linear(down, gated, add_to=self.x)
        self._keep(packed, query, attended, both, gated)

    def _through_bytes(self, packed: PackedKeyValues, keys: Tensor, values: Tensor) -> int:
        """Keep the newest keys and values of a layer as bytes, and dequantize all of them; 0 as kernels return."""
        newest = slice(int(self.slot), int(self.slot) + 1)
        written = packed.write(*(floats[:, :, newest] for floats in self.floats))
        for rows, new in zip((keys, values), written, strict=True):
            rows[:, :, newest] = new
        seen = packed.read(keys[:, :, : newest.stop], values[:, :, : newest.stop], self.x.dtype)
        for floats, read in zip(self.floats, seen, strict=True):
            floats[:, :, : newest.stop] = read
        return 0

    def _norm(self, norm: Any) -> None:
        arguments = cpu_decode.norm(self.x, norm.weight, self.normed, norm.variance_epsilon)
        self.calls.append((self.kernels.norm, (arguments, self.kernels.isa)))

    def _linear(self, layer: CpuLayer, x: Tensor, add_to: Tensor | None = None) -> Tensor:
        y = x.new_empty(len(x), layer.out_features) if add_to is None else add_to
        residual = 0 if add_to is None else y.data_ptr()
        self.calls.append((self.kernels.linear, (layer.arguments(x.data_ptr(), y.data_ptr(), len(x), residual),)))
        self._keep(layer, y)
        return y

    def _keep(self, *owners: Any) -> None:
        """The calls hold addresses alone: what they point to must live as long."""
        self.kept = [*getattr(self, "kept", []), *owners]
