"""From a trained model to a verified artifact: fold, write, verify."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qat.attention import key_values
from qat.export import compressed_tensors
from qat.export.cache import FoldedKeyValues, RecordedKeyValues, cache_refusal, fold_key_values
from qat.export.compressed_tensors import refusal, write_float
from qat.export.fold import Folded, Recorded, fold, record
from qat.export.verify import VerificationError, verify
from qat.functional import dequantize
from qat.insertion import layers, nested_widths
from qat.nn import FakeQuantLayer
from qat.scheme import QuantScheme, SchemeMap

__all__ = [
    "Artifact",
    "ExportedLayer",
    "Folded",
    "FoldedKeyValues",
    "Recorded",
    "RecordedKeyValues",
    "VerificationError",
    "check_exportable",
    "export",
    "fold",
    "record",
    "verify",
    "write_float",
]


def check_exportable(
    schemes: SchemeMap, chosen: Mapping[str, QuantScheme], dtype: torch.dtype, bits: int | None = None
) -> None:
    """Refuse, before anything is trained, what no artifact could hold.

    Args:
        schemes: of the model.
        chosen: those of its layers, by dotted name.
        dtype: of what is not quantized.
        bits: the only one of nested widths that is to be exported; None for all.

    Raises:
        ValueError: names what cannot be exported, and the remedy.
    """
    if (why := cache_refusal(schemes.kv_cache, dtype)) is not None:
        raise ValueError(f"quantized keys and values could not be exported after training: {why}")
    nested = nested_widths(chosen.values())
    if bits not in (None, *nested):
        known = list(nested) or "none: quant=nested has some"
        raise ValueError(f"export_bits={bits} is none of the nested widths, which are {known}; null exports all")
    stored = [(name, scheme.at(width)) for name, scheme in chosen.items() for width in scheme.weight.widths]
    if problems := [f"{name}: {why}" for name, s in stored if (why := refusal(s, dtype)) is not None]:
        raise ValueError(f"{len(problems)} layers could not be exported after training, such as {problems[0]}")


@dataclass(frozen=True)
class ExportedLayer:
    """One quantized layer of an artifact.

    Attributes:
        name: dotted.
        scheme: as summaries write it, `w4a16-g128`.
        shape: (out, in).
        bytes: of its codes and scales.
        weight_error: ||W - Wq|| / ||W||, W in the dtype that training saw; None where only codes were left of W.
    """

    name: str
    scheme: str
    shape: tuple[int, int]
    bytes: int
    weight_error: float | None


@dataclass(frozen=True)
class Artifact:
    """An artifact that was written and verified.

    Attributes:
        directory: where.
        float_bytes: of the quantized layers' weights in bfloat16.
        packed_bytes: of their codes and scales.
        model_packed_bytes: of the whole model: of all tensors that were written.
        layers: in the model's order.
        attentions: dotted names of those whose keys and values are quantized.
    """

    directory: Path
    float_bytes: int
    packed_bytes: int
    model_packed_bytes: int
    layers: tuple[ExportedLayer, ...]
    attentions: tuple[str, ...]

    @property
    def sizes(self) -> dict[str, int]:
        """The fields of bytes, by name."""
        return {name: getattr(self, name) for name in ("float_bytes", "packed_bytes", "model_packed_bytes")}


def export(
    model: nn.Module,
    recorded: Mapping[str, Recorded | RecordedKeyValues],
    directory: str | Path,
    tokenizer: Any = None,
    dtype: torch.dtype | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Artifact:
    """Fold `model`, write it as compressed-tensors, and compare the written file with what training used.

    Args:
        model: a transformers model with trained quantizers.
        recorded: what `record(model)` noted around a forward in training's dtype.
        directory: must not exist; appears only when it passed verification.
        tokenizer: saved beside the model.
        dtype: of the tensors that stay in float; the model's by default.
        provenance: plain values for `qat.json`.

    Raises:
        VerificationError: the written file is not what was trained; names the layers.
        ValueError: a layer, or an attention, was not recorded, is not finite, or has no place in the format; or
            `directory` exists.
        OSError: the disk is full.
    """
    quantized, attentions = layers(model), key_values(model)
    if not quantized and not attentions:
        raise ValueError("the model has no quantized layer; write_float writes float models")
    if missing := [name for name in (*quantized, *attentions) if name not in recorded]:
        raise ValueError(
            f"{len(missing)} quantized layers were not recorded ({', '.join(missing[:3])}): run a forward through "
            "all layers with the quantizers active, inside qat.export.record(model)"
        )
    dtypes = {name: used.weight_dtype for name, used in recorded.items() if isinstance(used, Recorded)}
    folded = {name: fold(layer, dtypes[name], name) for name, layer in quantized.items()}
    written = compressed_tensors.write(
        model,
        folded,
        directory,
        key_values={name: fold_key_values(one, name) for name, one in attentions.items()},
        tokenizer=tokenizer,
        dtype=dtype,
        provenance=provenance,
        check=lambda written: verify(written, recorded),
    )
    described = tuple(
        _describe(name, folded[name], _float_weight(layer, dtypes[name])) for name, layer in quantized.items()
    )
    return Artifact(
        directory=Path(directory),
        float_bytes=sum(2 * layer.shape[0] * layer.shape[1] for layer in described),
        packed_bytes=sum(layer.bytes for layer in described),
        model_packed_bytes=written,
        layers=described,
        attentions=tuple(attentions),
    )


def _float_weight(layer: FakeQuantLayer, dtype: torch.dtype) -> torch.Tensor | None:
    return layer.adapted.detach().to(dtype) if layer.weight_quantizer.packed is None else None


def _describe(name: str, folded: Folded, weight: torch.Tensor | None) -> ExportedLayer:
    stored = compressed_tensors.layer_tensors(folded)
    counted = [tensor for key, tensor in stored.items() if key != "weight_shape"]
    error = None
    if weight is not None:
        weight = weight.cpu().float()
        error = float((weight - dequantize(folded.codes, folded.scale)).norm() / weight.norm().clamp(min=1e-30))
    return ExportedLayer(
        name=name,
        scheme=str(folded.scheme),
        shape=(folded.codes.shape[0], folded.codes.shape[1]),
        bytes=sum(tensor.numel() * tensor.element_size() for tensor in counted),
        weight_error=error,
    )
