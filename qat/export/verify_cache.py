"""Quantize the keys and values that training saw again, by what an artifact says, and compare.

Numpy only, as `verify`: no code is shared with what wrote the file, nor with what quantized in training.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from qat.export.cache import RecordedKeyValues, Sample

# Sign aside: 4 exponent bits of bias 7, 3 mantissa bits; the last code is NaN.
_E4M3 = np.array([(c % 8) / 512 if c < 8 else (1 + c % 8 / 8) * 2.0 ** (c // 8 - 7) for c in range(127)])
_STRATEGIES = {"tensor": "tensor", "head": "attn_head"}


def differing(
    name: str,
    tensors: Mapping[str, np.ndarray],
    scheme: Mapping[str, Any] | None,
    spec: Mapping[str, Any] | None,
    used: "RecordedKeyValues",
) -> tuple[int, int]:
    """How many quantized keys and values, and how many scales, of the attention called `name` differ from training's.

    Args:
        name: dotted.
        tensors: of the file.
        scheme: `kv_cache_scheme` of config.json.
        spec: `kv_cache` of qat.json.
        used: in training.

    Raises:
        LookupError: tensors or entries are missing, or contradict each other; the message says which.
    """
    if spec is None:
        raise LookupError("qat.json has no kv_cache")
    stored = None if spec["dynamic"] else (spec["bits"], spec["element"], _STRATEGIES.get(spec["granularity"]), False)
    said = scheme and tuple(scheme[key] for key in ("num_bits", "type", "strategy", "dynamic"))
    if said != stored:
        raise LookupError(f"config.json says {said} of keys and values, qat.json {stored}")
    values = scales = 0
    for kind, sample in (("k", used.key), ("v", used.value)):
        scale = tensors.get(f"{name}.{kind}_scale")
        if (scale is None) != (sample.scale is None):
            raise LookupError(f"{kind}_scale is {'missing' if scale is None else 'unexpected'}")
        if scale is not None and sample.scale is not None:
            if scale.shape != tuple(sample.scale.shape):
                raise LookupError(f"{kind}_scale has shape {scale.shape}, training's {tuple(sample.scale.shape)}")
            scales += int((scale.astype(np.float32) != sample.scale.numpy()).sum())
        values += _differing(sample, scale, spec)
    return values, scales


def _differing(sample: "Sample", scale: np.ndarray | None, spec: Mapping[str, Any]) -> int:
    x, dtype = sample.x.float().numpy(), str(sample.x.dtype).removeprefix("torch.")
    if scale is None:
        limit = 448 if spec["element"] == "float" else 127.5 if spec["absmax_rule"] == "half_range" else 127
        floor = 2.0**-14 if spec["scale_dtype"] == "float16" else 2.0**-64
        covered = np.abs(x).max(-1, keepdims=True) / np.float32(limit)
        scale = _rounded(np.maximum(covered, np.float32(floor)), spec["scale_dtype"])
    ratio = x / scale.astype(np.float32)
    codes = _nearest_e4m3(ratio) if spec["element"] == "float" else np.clip(np.rint(ratio), -128, 127)
    return int((_rounded(codes.astype(np.float32) * scale, dtype) != sample.quantized.float().numpy()).sum())


def _nearest_e4m3(ratio: np.ndarray) -> np.ndarray:
    """The nearest number of e4m3, the even code where two are; the largest one for all beyond."""
    size = np.minimum(np.abs(ratio).astype(np.float64), 448)
    above = np.searchsorted(_E4M3, size)
    below = np.maximum(above - 1, 0)
    side = 2 * size - (_E4M3[below] + _E4M3[above])  # exact: of which neighbour, and 0 in the middle
    code = np.where((side > 0) | ((side == 0) & (above % 2 == 0)), above, below)
    return np.copysign(_E4M3[code], ratio)


def _rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values rounded to `dtype`, half to even."""
    if dtype != "bfloat16":
        return x.astype(dtype).astype(np.float32)
    bits = np.ascontiguousarray(x).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)
