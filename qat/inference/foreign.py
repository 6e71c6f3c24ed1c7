"""Schemes of compressed-tensors directories that other tools wrote, from their config.json."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open

from qat.scheme import QuantScheme, QuantSpec, SchemeMap

_SCALE_DTYPES: dict[str, Any] = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


def foreign_schemes(files: Sequence[Path], settings: Mapping[str, Any]) -> dict[str, QuantScheme]:
    """The scheme of each quantized layer, by dotted name.

    Dynamic activations are quantized by the rule `qmax`, as servers do; the config does not say which.

    Args:
        files: of weights, safetensors.
        settings: the `quantization_config`.

    Raises:
        ValueError: a layer is quantized in a way that packed layers cannot hold.
    """
    schemes = {}
    for weights in files:
        for key, dtype in _dtypes(weights).items():
            layer, _, kind = key.rpartition(".")
            if kind in ("weight_zero_point", "weight_g_idx", "output_scale"):
                raise ValueError(f"{weights}: {key}: only symmetric weights in their own order can be loaded")
            if kind == "weight_scale":
                group = _group_of(layer, settings)
                try:
                    schemes[layer] = _scheme(group, _SCALE_DTYPES.get(dtype))
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(
                        f"{weights}: {layer} is quantized in a way that qat cannot load: {error}"
                    ) from error
    return schemes


def _dtypes(weights: Path) -> dict[str, str]:
    """What a safetensors file calls the dtype of each of its tensors, by name, in order."""
    with safe_open(weights, "pt") as file:
        return {key: file.get_slice(key).get_dtype() for key in sorted(file.keys())}


def foreign_cache(files: Sequence[Path], scheme: Mapping[str, Any] | None) -> QuantSpec | None:
    """How keys and values are quantized; None for float.

    Args:
        files: of weights, safetensors.
        scheme: the `kv_cache_scheme`.

    Raises:
        ValueError: in a way that a packed cache cannot hold.
    """
    if scheme is None:
        return None
    weights = files[0].parent
    stored = next((d for path in files for key, d in _dtypes(path).items() if key.endswith(".k_scale")), "")
    dtype = _SCALE_DTYPES.get(stored)
    strategy, dynamic, bits = (scheme.get(key) for key in ("strategy", "dynamic", "num_bits"))
    granularity = {"tensor": "tensor", "attn_head": "head"}.get(strategy or "")
    if dynamic or granularity is None or bits != 8 or dtype is None:
        raise ValueError(
            f"{weights}: keys and values are quantized in a way that qat cannot load (strategy {strategy}, dynamic "
            f"{dynamic}, {bits} bits, scales {dtype}): only 8 bits with static scales of a tensor or head can be"
        )
    try:
        spec = _spec({**scheme, "strategy": granularity}, scale_dtype=dtype, absmax_rule="qmax")
        return SchemeMap(name="foreign", kv_cache=spec).kv_cache  # which checks it
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{weights}: keys and values are quantized in a way that qat cannot load: {error}") from error


def _scheme(group: Mapping[str, Any], scale_dtype: Any) -> QuantScheme:
    inputs = group.get("input_activations")
    rule = {} if inputs is None else {"absmax_rule": "qmax"}
    return QuantScheme(
        weight=_spec(group["weights"], scale_dtype=scale_dtype),
        input=None if inputs is None else _spec(inputs, scale_dtype=scale_dtype, **rule),
    )


def _spec(arguments: Mapping[str, Any], **more: Any) -> QuantSpec:
    return QuantSpec(
        bits=arguments["num_bits"],
        element=arguments["type"],
        symmetric=arguments["symmetric"],
        granularity=arguments["strategy"],
        group_size=arguments["group_size"],
        dynamic=bool(arguments["dynamic"]),
        **more,
    )


def _group_of(layer: str, settings: Mapping[str, Any]) -> Mapping[str, Any]:
    for group in settings["config_groups"].values():
        for target in group["targets"]:
            # Their regular expressions match a prefix of the name.
            if target in (layer, "Linear") or (target.startswith("re:") and re.match(target[3:], layer)):
                return group
    raise ValueError(f"{layer} has scales, but no group of quantization_config targets it")
