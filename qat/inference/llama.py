"""A Llama-like model as a short list of launches, built from the layers of a loaded model.

    one block     x ─ norm ─ qkv ─ rotary, cache, attention ─ out ─ + ─ norm ─ gate_up ─ SwiGLU ─ down ─ + ─
    multiplied        └──1──┘                                └──2──┘    └────────3──────────┘   └──4──┘

q, k and v are one packed layer, and so are gate and up, so that their input is normalized, and quantized where the
scheme says so, once.  The tensors of the model's own layers become views of the concatenated ones (`fusion`).

On CUDA a `CudaLinear` does more in its launch: 1 and 3 quantize each token behind the norm, 3 ends with SwiGLU, 2 and 4
with the sum.  Elsewhere torch computes the same in steps of its own; one token on the CPU kernels: `cpu_step`.

Numerics: the operations are those of transformers' model in the same order and dtype.  Where a linear layer computes
each output on its own (the CPU kernels below 32 tokens), q, k, v, gate and up have the same bits as unfused; attention
to one token groups the query heads, and is the same up to the order of its sums.  On CUDA the norm's squares are summed
in another order, too.
"""

import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qat.attention import key_values
from qat.inference.cache import KeyValueCache, Span, attend
from qat.inference.cuda_backend import CudaLinear, GatedMlp
from qat.inference.fusion import Separate, side_by_side
from qat.inference.key_values import PackedKeyValues, row_bytes
from qat.insertion import layers

log = logging.getLogger(__name__)

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
# Their frequencies depend on the positions seen; a table cannot hold them.
MOVING_ROTARY = ("dynamic", "longrope")


class Block(nn.Module):
    """One decoder layer, its tensors shared with transformers' `layer`."""

    def __init__(self, layer: Any, heads: int, kv_heads: int):
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        self.heads, self.kv_heads = heads, kv_heads
        self.norm, self.mlp_norm = layer.input_layernorm, layer.post_attention_layernorm
        self.qkv = side_by_side([attention.q_proj, attention.k_proj, attention.v_proj])
        self.gated = isinstance(mlp, GatedMlp)
        self.gate_up = mlp.gate_up if self.gated else side_by_side([mlp.gate_proj, mlp.up_proj])
        self.out, self.down = attention.o_proj, mlp.down_proj
        self.packed: PackedKeyValues | None = getattr(attention, "kv_cache", None)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], keys: Tensor, values: Tensor, span: Span) -> Tensor:
        """(batch, tokens, hidden) -> the same; `rotary` is cos and sin, (batch, tokens, 1, head_dim) each."""
        qkv = of_norm(self.qkv, self.norm, x).unflatten(-1, (self.heads + 2 * self.kv_heads, -1))
        rotated, value = qkv.split([self.heads + self.kv_heads, self.kv_heads], 2)
        query, key = rotate(rotated, *rotary).split([self.heads, self.kv_heads], 2)
        x = plus(x, self.out, attend(query, key, value, keys, values, span, self.packed))
        gate_up = of_norm(self.gate_up, self.mlp_norm, x)
        return plus(x, self.down, gate_up if self.gated else swiglu(gate_up))


class LlamaDecoder(nn.Module):
    """Logits of the next tokens, over a static cache.

    Args:
        model: loaded, where it will stay: moving it afterwards would separate what is shared.

    Raises:
        ValueError: an architecture that this is not; see `unsupported`.
    """

    def __init__(self, model: Any):
        super().__init__()
        if reason := unsupported(model):
            raise ValueError(f"no fused decoder for {reason}")
        config = model.config
        self.embedding, self.norm, self.head = model.model.embed_tokens, model.model.norm, model.lm_head
        self.blocks = nn.ModuleList(
            Block(layer, config.num_attention_heads, config.num_key_value_heads) for layer in model.model.layers
        )
        self.head_dim: int = model.model.layers[0].self_attn.head_dim
        self.window: int | None = getattr(config, "sliding_window", None)
        self.rotary_embedding = model.model.rotary_emb
        self._table: tuple[Tensor, Tensor] | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of activations, and of a cache that does not hold bytes."""
        return self.norm.weight.dtype  # of what is never packed

    @property
    def device(self) -> torch.device:
        """Of weights and cache."""
        return self.norm.weight.device

    def new_cache(self, batch: int, capacity: int) -> KeyValueCache:
        """An empty cache.

        Args:
            batch: sequences.
            capacity: tokens of each, prompt included.

        Raises:
            ValueError: longer than the model's attention window, which this decoder does not slide.
        """
        if self.window is not None and capacity > self.window:
            raise ValueError(f"the model's attention slides over {self.window} tokens, {capacity} are asked for")
        first = self.blocks[0]
        assert isinstance(first, Block)
        row, dtype = self.head_dim, self.dtype
        if first.packed is not None:
            row, dtype = row_bytes(first.packed.spec, row), torch.uint8
        return KeyValueCache(len(self.blocks), batch, first.kv_heads, capacity, row, dtype, self.device)

    def rotary(self, positions: int) -> tuple[Tensor, Tensor]:
        """cos and sin of the first positions, (at least `positions`, head_dim) each, as transformers computes them."""
        if self._table is None or len(self._table[0]) < positions:
            like = torch.empty(0, dtype=self.dtype, device=self.device)
            cos, sin = self.rotary_embedding(like, torch.arange(positions, device=self.device)[None])
            self._table = cos[0], sin[0]
        return self._table

    def forward(self, tokens: Tensor, cache: KeyValueCache, last: bool = False) -> Tensor:
        """Read the next tokens of each row.

        Args:
            tokens: (batch, tokens), int64.
            cache: of this batch; grows by `tokens`.
            last: whether only the last token's logits are wanted.

        Returns:
            (batch, tokens or 1, vocabulary), the model's dtype.

        Raises:
            ValueError: the cache is full, or has another batch.
        """
        cache.require(tokens)
        span = cache.span(tokens.shape[1])
        logits = self.run(tokens, cache, span, last)
        cache.length += tokens.shape[1]
        return logits

    def run(self, tokens: Tensor, cache: KeyValueCache, span: Span, last: bool = False) -> Tensor:
        """As `forward`, over a given span, leaving `cache.length` alone: the same launches for a CUDA graph."""
        cos, sin = self.rotary(cache.capacity)
        rotary = cos[span.positions].unsqueeze(2), sin[span.positions].unsqueeze(2)
        x = self.embedding(tokens)
        for block, keys, values in zip(self.blocks, cache.keys, cache.values, strict=True):
            x = block(x, rotary, keys, values, span)
        return self.head(self.norm(x[:, -1:] if last else x))


def of_norm(linear: nn.Module, norm: nn.Module, x: Tensor) -> Tensor:
    """linear(norm(x)), in one launch where there is one."""
    return linear.of_norm(x, norm) if isinstance(linear, CudaLinear) else linear(norm(x))


def plus(residual: Tensor, linear: nn.Module, x: Tensor) -> Tensor:
    """residual + linear(x), in one launch where there is one."""
    return linear(x, residual) if isinstance(linear, CudaLinear) else residual + linear(x)


def swiglu(gate_up: Tensor) -> Tensor:
    """(..., 2 n) -> (..., n): silu of the first half times the second, each rounded to the dtype."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotary embedding of x (batch, tokens, heads, head_dim); halves of a head are the coordinates of a plane."""
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat((-high, low), -1) * sin


def unsupported(model: Any) -> str | None:
    """Why a model has no fused decoder, or None where it has one.

    Float layers that may be trained keep it from one: fusing moves their weights into new parameters.
    """
    name = type(model).__name__
    if name not in ARCHITECTURES:
        return f"{name} (only {', '.join(ARCHITECTURES)})"
    config = model.config
    if config.hidden_act != "silu":
        return f"{name} with the activation {config.hidden_act}"
    if layers(model):
        return f"{name} with fake-quantized layers"
    if key_values(model):
        return f"{name} with fake-quantized keys and values"
    blocks = model.model.layers.modules()
    if any(isinstance(layer, nn.Linear) and layer.weight.requires_grad for layer in blocks):
        # Their parameters would be replaced, under an optimizer that has the old ones.
        return f"{name} whose layers require gradients (requires_grad_(False) says that they are not trained)"
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        return f"{name} with sliding attention in some layers"
    if (kind := model.model.rotary_emb.rope_type) in MOVING_ROTARY:
        return f"{name} with {kind} rotary embedding"
    return None


def fused_decoder(model: Any) -> LlamaDecoder | None:
    """The decoder of a loaded model, made once and kept with it; one log line says what is fused, or why it is not.

    Args:
        model: a transformers model, packed or not, where it will stay.
    """
    kept = model.__dict__.get("_qat_decoder")
    if kept is not None and kept.device == model.device:
        return kept
    if reason := unsupported(model):
        log.info("no fused decoder for %s: transformers generates, layer by layer", reason)
        return None
    decoder = LlamaDecoder(model).eval()
    separate = sum(isinstance(module, Separate) for module in decoder.modules())
    log.info("fused decoder: %d blocks, %d groups of layers not concatenated", len(decoder.blocks), separate)
    model.__dict__["_qat_decoder"] = decoder  # not a submodule: the weights are the model's
    return decoder
