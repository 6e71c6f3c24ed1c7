"""Keys and values pass through fake quantizers on their way to the cache.

    k_proj ─ rotary ─ keys ──┐                                            ┌── attention
                             ├─ past_key_values.update ─ (all) keys, values
    v_proj ───────── values ─┘

Attention of transformers hands new keys, turned by the rotary embedding as servers store them, and values to `update`
of its cache and goes on with what that returns.  A quantized attention finds a stand-in in the place of its cache,
`update` of which quantizes first and then asks the cache, if there is one.  So training (without a cache), evaluation
and generation quantize alike, under every implementation of attention, and `forward` stays as it is.

Of the inputs of attention's products these are the ones that are kept: queries and probabilities stay in the compute
dtype.
"""

import inspect
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qat.estimators import Estimator
from qat.fake_quantizer import FakeQuantizer, unmasked
from qat.functional import cache_scale
from qat.scheme import QuantSpec


class KeyValueQuantizer(FakeQuantizer):
    """The fake quantizer of keys, or of values, (batch, kv_heads, tokens, head_dim).

    State: `scale` (1,) for the tensor, (kv_heads, 1, 1) for heads, absent for tokens.
    """

    def rows(self, x: Tensor) -> Tensor:
        heads = x.shape[1]
        tokens = unmasked(x.transpose(1, 2).flatten(-2))  # (tokens, kv_heads * head_dim)
        if self.spec.granularity == "head":
            return tokens.unflatten(-1, (heads, -1)).transpose(0, 1).flatten(1)
        return tokens.reshape(1, -1)

    def dynamic_scale(self, x: Tensor) -> Tensor:
        return cache_scale(x, self.spec)


class QuantizedKeyValues(nn.Module):
    """What a quantized attention has as its submodule `kv_cache`; a subclass says how keys and values are quantized."""

    handles: tuple[RemovableHandle, ...] = ()

    def update(self, cache: Any, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Quantize new keys and values.

        Args:
            cache: that of transformers, or None where tokens are not kept.
            key, value: (batch, kv_heads, tokens, head_dim), floating.
            args, kwargs: of `cache.update`.

        Returns:
            All keys and values to attend to, quantized and dequantized: (batch, kv_heads, all tokens, head_dim), the
            dtype of the new ones.
        """
        raise NotImplementedError


class FakeQuantKeyValues(QuantizedKeyValues):
    """The fake quantizers of an attention's keys and values.

    Args:
        spec: how both are quantized.
        kv_heads: of the attention.
        estimator: the gradient.
        device: of the scales.
    """

    def __init__(self, spec: QuantSpec, kv_heads: int, estimator: Estimator, device: Any = None):
        super().__init__()
        self.spec = spec
        shape = scale_shape(spec, kv_heads)
        self.key_quantizer = KeyValueQuantizer(spec, shape, estimator, device)
        self.value_quantizer = KeyValueQuantizer(spec, shape, estimator, device)

    def update(self, cache: Any, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        key, value = self.key_quantizer(key), self.value_quantizer(value)
        return (key, value) if cache is None else cache.update(key, value, *args, **kwargs)


def scale_shape(spec: QuantSpec, kv_heads: int) -> tuple[int, ...]:
    """Of the static scale of keys, or of values."""
    return (kv_heads, 1, 1) if spec.granularity == "head" else (1,)


def kv_heads(attention: Any) -> int:
    """Key heads of an attention."""
    return attention.k_proj.out_features // attention.head_dim


def key_values(model: nn.Module) -> dict[str, FakeQuantKeyValues]:
    """The fake quantizers of keys and values in `model`, by the dotted name of their attention."""
    found = ((n, m) for n, m in model.named_modules() if isinstance(m, FakeQuantKeyValues))
    return {name.removesuffix(".kv_cache"): module for name, module in found}


def attentions(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of `model` that hand keys and values to a cache, by dotted name.

    Raises:
        ValueError: there is none, or `model` has one whose keys and values cannot be quantized; names it.
    """
    found = {n: m for n, m in model.named_modules() if "Attention" in type(m).__name__ and _takes_cache(m)}
    strange = {name: why for name, module in found.items() if (why := _refusal(module)) is not None}
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        strange = dict.fromkeys(found, "of an encoder and a decoder, whose caches differ")
    if not found or strange:
        name, why = next(iter(strange.items()), (type(model).__name__, "no attention that takes past_key_values"))
        raise ValueError(f"kv_cache: {name}: {why}; leave keys and values in float (kv_cache=null)")
    return found


def quantize_key_values(attention: nn.Module, quantized: QuantizedKeyValues) -> None:
    """Make `attention` quantize its keys and values from now on; `release_key_values` takes it back."""
    attention.kv_cache = quantized
    quantized.handles = (
        attention.register_forward_pre_hook(_stand_in, with_kwargs=True),
        attention.register_forward_hook(_check_used, with_kwargs=True),
    )


def release_key_values(model: nn.Module) -> None:
    """Let every attention of `model` keep its keys and values in float again."""
    for attention in list(model.modules()):
        quantized = getattr(attention, "kv_cache", None)
        if isinstance(quantized, QuantizedKeyValues):
            for handle in quantized.handles:
                handle.remove()
            del attention.kv_cache


class _StandIn:
    """What an attention takes for its cache in one forward."""

    def __init__(self, quantized: QuantizedKeyValues, cache: Any):
        self.quantized, self.cache, self.used = quantized, cache, False

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.used = True
        return self.quantized.update(self.cache, key, value, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)


def _stand_in(attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, {**kwargs, "past_key_values": _StandIn(attention.kv_cache, kwargs.get("past_key_values"))}


def _check_used(attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    if not kwargs["past_key_values"].used:
        raise ValueError(
            f"{type(attention).__name__} of layer {attention.layer_idx} did not hand its keys and values to its cache, "
            "so that they were not quantized; leave them in float (kv_cache=null)"
        )


def _takes_cache(module: nn.Module) -> bool:
    return hasattr(module, "layer_idx") and "past_key_values" in inspect.signature(module.forward).parameters


def _refusal(attention: Any) -> str | None:
    widths = [getattr(getattr(attention, name, None), "out_features", None) for name in ("k_proj", "v_proj")]
    head_dim = getattr(attention, "head_dim", None)
    if not head_dim or not widths[0] or widths[0] != widths[1] or widths[0] % head_dim:
        return f"{type(attention).__name__} has no k_proj and v_proj of whole heads"
    return None
