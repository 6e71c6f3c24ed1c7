"""Keys and values of attention: what their fake quantizers did, and how an artifact says it.

    quantization_config.kv_cache_scheme    bits, element and strategy (`tensor`, or `attn_head` for heads)
    <attention>.k_scale, .v_scale          (1,), or (kv_heads, 1, 1) for heads; the spec's scale dtype
    qat.json, kv_cache                     the spec, of tokens too, whose scales are made as tokens come

`kv_cache_scheme` has a strategy `token`, but compressed-tensors 0.20 takes one scale for all tokens of a head that a
forward brings, and vLLM refuses it: for readers other than `load_packed` such keys and values stay in float.  vLLM's
code reads FP8 with a scale a tensor or a head; what it makes of INT8, which its check lets pass, was not tried.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qat.attention import FakeQuantKeyValues, KeyValueQuantizer, key_values
from qat.functional import scale_dtype, store_scale
from qat.scheme import QuantSpec, cache_name

# Of the first row of a batch: as many tokens as prove the arithmetic, of a model of any length.
SAMPLED_TOKENS = 256


@dataclass(frozen=True, eq=False)
class Sample:
    """Some keys, or values, before and after their fake quantizer; on the CPU.

    Attributes:
        x: (kv_heads, tokens, head_dim), the compute dtype.
        quantized: the same, quantized and dequantized.
        scale: (1,) or (kv_heads, 1, 1), float32, of static scales; None for tokens.
    """

    x: Tensor
    quantized: Tensor
    scale: Tensor | None


@dataclass(frozen=True, eq=False)
class RecordedKeyValues:
    """What the last active forward of one attention did to its keys and values."""

    key: Sample
    value: Sample


@dataclass(frozen=True, eq=False)
class FoldedKeyValues:
    """How the artifact says one attention's keys and values are quantized; on the CPU.

    Attributes:
        spec: of both.
        key_scale, value_scale: (1,) or (kv_heads, 1, 1), the spec's scale dtype; None for tokens.
    """

    spec: QuantSpec
    key_scale: Tensor | None
    value_scale: Tensor | None

    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors by their name within the attention."""
        named = {"k_scale": self.key_scale, "v_scale": self.value_scale}
        return {name: scale for name, scale in named.items() if scale is not None}


@contextmanager
def record_key_values(model: nn.Module, recorded: dict[str, Any]) -> Iterator[None]:
    """Within, every active forward of a quantized attention notes what it did in `recorded`; the last one counts."""
    handles = []
    for name, quantized in key_values(model).items():
        noted: dict[str, Sample] = {}
        for kind in ("key", "value"):
            quantizer = getattr(quantized, f"{kind}_quantizer")
            handles.append(quantizer.register_forward_hook(_recorder(recorded, noted, name, kind)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _recorder(recorded: dict[str, Any], noted: dict[str, Sample], name: str, kind: str) -> Any:
    def note(quantizer: KeyValueQuantizer, args: tuple[Tensor], output: Tensor) -> None:
        if not quantizer.active:
            return
        before, after = (x.detach()[0, :, :SAMPLED_TOKENS].to("cpu", copy=True) for x in (args[0], output))
        noted[kind] = Sample(before, after, _stored(quantizer))
        if len(noted) == 2:
            recorded[name] = RecordedKeyValues(**noted)

    return note


def fold_key_values(quantized: FakeQuantKeyValues, name: str) -> FoldedKeyValues:
    """The scales of an attention's keys and values, as its forward uses them.

    Raises:
        ValueError: a scale is not positive and finite; readers take others for absent.
    """
    scales = [_stored(quantized.key_quantizer), _stored(quantized.value_quantizer)]
    for what, scale in zip(("keys", "values"), scales, strict=True):
        if scale is not None and not (torch.isfinite(scale) & (scale > 0)).all():
            raise ValueError(f"{name}: a scale of its {what} is not positive and finite; training diverged")
    key, value = (None if scale is None else scale.to(scale_dtype(quantized.spec)) for scale in scales)
    return FoldedKeyValues(quantized.spec, key, value)


def _stored(quantizer: KeyValueQuantizer) -> Tensor | None:
    """The static scale that a forward uses now, float32, on the CPU."""
    return None if quantizer.scale is None else store_scale(quantizer.scale.detach(), quantizer.spec).to("cpu")


def the_spec(folded: Mapping[str, FoldedKeyValues]) -> QuantSpec | None:
    """How keys and values of a model are quantized; None for float."""
    return next((one.spec for one in folded.values()), None)


def cache_refusal(spec: QuantSpec | None, dtype: torch.dtype) -> str | None:
    """Why keys and values of `spec` cannot be stored in a model of `dtype` so that every reader agrees; None if so."""
    if spec is None or spec.dynamic or torch.promote_types(scale_dtype(spec), dtype) == dtype:
        return None
    return (
        f"kv_cache={cache_name(spec)}: {spec.scale_dtype} scales in a {str(dtype).removeprefix('torch.')} model: "
        "readers cast scales to the model's dtype, which cannot hold them; export with another dtype or use "
        f"kv_cache={cache_name(spec).partition('-')[0]}-token"
    )


def cache_scheme(spec: QuantSpec | None) -> dict[str, Any] | None:
    """The `kv_cache_scheme` of config.json; None where the format has none that means `spec`."""
    if spec is None or spec.dynamic:
        return None
    return {
        "num_bits": spec.bits,
        "type": spec.element,
        "symmetric": True,
        "group_size": None,
        "strategy": "attn_head" if spec.granularity == "head" else spec.granularity,
        "dynamic": False,
    }
