"""The canonical artifact: a Hugging Face directory in the compressed-tensors format.

    config.json         with `quantization_config`, which transformers and vLLM read
    model.safetensors   pack-quantized:  <m>.weight_packed (out, words) int32, <m>.weight_scale, <m>.weight_shape
                        int-quantized (w8a8):  <m>.weight (out, in) int8, <m>.weight_scale
                        static activations:    <m>.input_scale (1,), and where they are asymmetric
                                               <m>.input_zero_point (1,) int8
                        keys and values:       `qat.export.cache`
                        (qat.safetensors, where a layer is of a kind or on a grid that the format does not know)
    qat.json            qat's own scheme of each layer, of keys and values, provenance, size and SHA-256 of the weights

Scales are (out, groups) in the spec's scale dtype; symmetric weights have no zero points.
"""

import copy
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qat.attention import key_values as quantized_key_values
from qat.export.cache import FoldedKeyValues, cache_refusal, cache_scheme, the_spec
from qat.export.directory import OWN_WEIGHTS, WEIGHTS, atomic_directory, write_weights
from qat.export.fold import Folded
from qat.export.verify import VerificationError
from qat.functional import scale_dtype
from qat.insertion import layers
from qat.packing import pack, words_of
from qat.scheme import QuantScheme, QuantSpec

log = logging.getLogger(__name__)


def write(
    model: nn.Module,
    folded: Mapping[str, Folded],
    directory: str | Path,
    *,
    key_values: Mapping[str, FoldedKeyValues] | None = None,
    tokenizer: Any = None,
    dtype: torch.dtype | None = None,
    provenance: Mapping[str, Any] | None = None,
    check: Callable[[Path], object] | None = None,
) -> int:
    """Write `model` with the layers in `folded`, and `key_values`, quantized.

    Args:
        model: a transformers model; its linear layers that are not in `folded` stay in float.
        folded: by dotted name.
        key_values: of every attention, by dotted name; None where they stay in float.
        directory: must not exist; appears only when everything is written and checked.
        tokenizer: saved beside the model.
        dtype: of the tensors that stay in float; the model's by default.
        provenance: plain values for `qat.json`.
        check: called with the written directory before it takes its name; what it raises stops the export, and a
            VerificationError leaves the directory under another name.

    Returns:
        Bytes of all tensors that were written.

    Raises:
        ValueError: `directory` exists, or a scheme has no place in this format.
        OSError: the disk is full.
    """
    dtype = dtype or _dtype(model)
    key_values, cache = key_values or {}, the_spec(key_values or {})
    problems = [f"{name}: {why}" for name, f in folded.items() if (why := refusal(f.scheme, dtype)) is not None]
    problems += [why] if (why := cache_refusal(cache, dtype)) is not None else []
    if problems:
        raise ValueError("compressed-tensors cannot hold this model:\n  " + "\n  ".join(problems))
    tensors = _float_tensors(model, folded, dtype)
    for name, layer in folded.items():
        tensors |= {f"{name}.{key}": tensor for key, tensor in layer_tensors(layer).items()}
    for name, kept in key_values.items():
        tensors |= {f"{name}.{key}": tensor for key, tensor in kept.tensors().items()}
    described = {name: {"scheme": f.scheme.to_dict(), "shape": list(f.codes.shape)} for name, f in folded.items()}
    strange = unheld(model, folded)
    if strange is not None:
        what = "odd grid" if folded[strange].scheme.weight.grid == "odd" else layers(model)[strange].original.__name__
        log.info("compressed-tensors knows no %s (%s): written in qat's own form, for load_packed only", what, strange)
    if cache is not None and cache.dynamic:
        log.info("compressed-tensors knows no keys and values with a scale a token: in float but for load_packed")
    written = sum(tensor.nbytes for tensor in tensors.values())
    with atomic_directory(directory, written + (1 << 20), (VerificationError,)) as partial:
        _write_config(partial, model, folded, cache, dtype)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        weights = OWN_WEIGHTS if strange else WEIGHTS
        write_weights(
            partial, tensors, described, dict(provenance or {}), weights, None if cache is None else asdict(cache)
        )
        if check is not None:
            check(partial)
    return written


def write_float(
    model: nn.Module,
    directory: str | Path,
    *,
    tokenizer: Any = None,
    dtype: torch.dtype | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Write a model without quantizers, as atomically as a quantized one.

    Args:
        model: a transformers model.
        directory: must not exist.
        tokenizer: saved beside the model.
        dtype: of its tensors; the model's by default.
        provenance: plain values for `qat.json`.

    Raises:
        ValueError: the model has quantized layers, or `directory` exists.
        OSError: the disk is full.
    """
    if quantized := [*layers(model), *quantized_key_values(model)]:
        raise ValueError(f"{len(quantized)} layers are quantized ({quantized[0]}, ...): export them, or remove first")
    write(model, {}, directory, tokenizer=tokenizer, dtype=dtype, provenance=provenance)


def refusal(scheme: QuantScheme, dtype: torch.dtype) -> str | None:
    """Why `scheme` cannot be stored in a model of `dtype` so that every reader agrees; None if it can."""
    weight, inputs = scheme.weight, scheme.input
    if inputs is not None and inputs.bits != 8:
        return f"{inputs.bits}-bit activations: servers run 8; use 8 bits or leave the input in float"
    specs = [weight] if inputs is None or inputs.dynamic else [weight, inputs]
    for spec in specs:
        # Readers cast scales to the model's dtype, so that must hold every value of the scale's.
        if torch.promote_types(scale_dtype(spec), dtype) != dtype:
            return (
                f"{spec.scale_dtype} scales in a {str(dtype).removeprefix('torch.')} model: readers cast scales to "
                "the model's dtype, which cannot hold them; export with another dtype or train with another scale_dtype"
            )
    return None


def stored_bytes(scheme: QuantScheme, shape: tuple[int, int]) -> int:
    """Bytes of the codes and scales of a layer with weight `shape` (out, in): what `layer_tensors` of it would take."""
    rows, inputs = shape
    row = inputs if format_of(scheme) == "int-quantized" else 4 * words_of(inputs, scheme.weight.bits)
    row += scale_dtype(scheme.weight).itemsize * scheme.weight.groups(inputs)
    static = scheme.input is not None and not scheme.input.dynamic
    return rows * row + (scale_dtype(scheme.input).itemsize if static else 0)  # type: ignore[arg-type]


def unheld(model: nn.Module, folded: Mapping[str, Folded]) -> str | None:
    """The first layer of `folded` that compressed-tensors knows no form of; None where it can hold all of them.

    Then the directory has the same tensors in a file of another name, and says `"quant_method": "qat"`: for qat alone.
    Odd codes of b bits would be exact there as plain ones of b + 1 bits, half as large again at 2: no use for 2 bits.
    """
    for name, layer in folded.items():
        if layer.scheme.weight.grid == "odd" or not isinstance(model.get_submodule(name), nn.Linear):
            return name
    return None


def format_of(scheme: QuantScheme) -> str:
    """`int-quantized` for 8-bit weights with quantized activations, else `pack-quantized`."""
    return "int-quantized" if scheme.weight.bits == 8 and scheme.input is not None else "pack-quantized"


def layer_tensors(layer: Folded) -> dict[str, Tensor]:
    """The stored tensors of one layer, by their name within it (its bias is stored with the float tensors)."""
    if format_of(layer.scheme) == "int-quantized":
        tensors = {"weight": layer.codes}
    else:
        shape = torch.tensor(layer.codes.shape, dtype=torch.int64)
        spec = layer.scheme.weight
        tensors = {"weight_packed": pack(layer.codes, spec.bits, spec.spacing), "weight_shape": shape}
    tensors["weight_scale"] = layer.scale
    if layer.input_scale is not None:
        tensors["input_scale"] = layer.input_scale
    if layer.input_zero_point is not None:
        tensors["input_zero_point"] = layer.input_zero_point
    return tensors


def quantization_config(
    model: nn.Module, folded: Mapping[str, Folded], cache: QuantSpec | None = None
) -> dict[str, Any]:
    """The `quantization_config` of config.json, `cache` being the spec of keys and values."""
    by_scheme: dict[QuantScheme, list[str]] = {}
    for name, layer in folded.items():
        by_scheme.setdefault(layer.scheme, []).append(name)
    own = unheld(model, folded) is not None
    formats = {format_of(scheme) for scheme in by_scheme} or {"dense"}
    return {
        "quant_method": "qat" if own else "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "ignore": [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in folded],
        "kv_cache_scheme": cache_scheme(cache),
        "config_groups": {
            f"group_{i}": _group(scheme, names if own or len(by_scheme) > 1 else ["Linear"])
            for i, (scheme, names) in enumerate(by_scheme.items())
        },
    }


def _group(scheme: QuantScheme, targets: list[str]) -> dict[str, Any]:
    strategy = "group" if scheme.weight.group_size else "channel"
    return {
        "targets": targets,
        # Always named: without it readers infer int-quantized wherever activations are quantized.
        "format": format_of(scheme),
        "weights": _arguments(scheme.weight, strategy),
        "input_activations": None if scheme.input is None else _arguments(scheme.input, scheme.input.granularity),
        "output_activations": None,
    }


def _arguments(spec: QuantSpec, strategy: str) -> dict[str, Any]:
    own = {"grid": spec.grid} if spec.grid == "odd" else {}
    return own | {
        "num_bits": spec.bits,
        "type": "int",
        "symmetric": spec.symmetric,
        "group_size": spec.group_size,
        "strategy": strategy,
        "dynamic": spec.dynamic,
    }


def _float_tensors(model: nn.Module, folded: Mapping[str, Folded], dtype: torch.dtype) -> dict[str, Tensor]:
    """Everything that is not quantized, a tied tensor once, by the first of its names."""
    seen = {id(layer.weight) for name, layer in layers(model).items() if name in folded}
    seen |= {id(tensor) for layer in layers(model).values() for tensor in layer.added()}
    for quantized in quantized_key_values(model).values():
        seen |= {id(tensor) for tensor in quantized.state_dict(keep_vars=True).values()}
    tensors = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        stored = tensor.detach().to("cpu", dtype if tensor.is_floating_point() else tensor.dtype).contiguous()
        # Experts are parts of one tensor, which safetensors would take for shared.
        tensors[name] = stored.clone() if stored.untyped_storage().nbytes() > stored.nbytes else stored
    return tensors


def _write_config(
    directory: Path, model: Any, folded: Mapping[str, Folded], cache: QuantSpec | None, dtype: torch.dtype
) -> None:
    config = copy.deepcopy(model.config)
    config.dtype, config.architectures = dtype, [type(model).__name__]
    config.save_pretrained(directory)
    if folded or cache_scheme(cache) is not None:
        path = directory / "config.json"
        values = json.loads(path.read_text()) | {"quantization_config": quantization_config(model, folded, cache)}
        path.write_text(json.dumps(values, indent=2) + "\n")
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(directory)


def _dtype(model: nn.Module) -> torch.dtype:
    """Of the model's parameters; scales of quantizers are float32 in every model and do not count."""
    return next(p.dtype for n, p in model.named_parameters() if p.is_floating_point() and "_quantizer." not in n)
