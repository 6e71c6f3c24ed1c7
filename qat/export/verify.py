"""Read an artifact back with a decoder of its own, and compare it with what training used.

Numpy, json and struct only (`verify_cache` too): no code is shared with what wrote the file, so a mistake there cannot
hide here.
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from qat.export.verify_cache import differing

if TYPE_CHECKING:
    from qat.export.cache import RecordedKeyValues
    from qat.export.fold import Recorded

_NUMPY = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2",
    "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "|i1", "U8": "|u1", "BOOL": "|b1",
}  # fmt: skip


class VerificationError(ValueError):
    """An artifact differs from what training used."""


@dataclass(frozen=True)
class LayerCheck:
    """The comparison of one layer, or of one attention's keys and values.

    Attributes:
        name: dotted.
        shape: (out, in); of an attention (kv_heads, tokens compared, head_dim).
        codes_differing: of out * in; of an attention, quantized keys and values.
        scales_differing: of out * groups, and a static input's scale and zero point; of an attention's scales.
        problem: what prevented a comparison, or None.
    """

    name: str
    shape: tuple[int, ...]
    codes_differing: int = 0
    scales_differing: int = 0
    problem: str | None = None

    @property
    def passed(self) -> bool:
        """Whether everything was compared and equal."""
        return self.problem is None and not self.codes_differing and not self.scales_differing

    def __str__(self) -> str:
        if self.problem is not None:
            return f"{self.name}: {self.problem}"
        return f"{self.name}: {self.codes_differing} codes and {self.scales_differing} scales differ"


def verify(directory: str | Path, recorded: Mapping[str, "Recorded | RecordedKeyValues"]) -> list[LayerCheck]:
    """Compare codes and scales in a compressed-tensors directory with those that training used, bit for bit.

    Keys and values have no codes in a file: those that training saw are quantized again, by what the directory says.

    Args:
        directory: with `config.json`, `qat.json` and the weights; only read.
        recorded: of every quantized layer and attention, as `qat.export.record` notes it.

    Returns:
        One result a layer, all passed.

    Raises:
        VerificationError: a layer differs, is missing, or is quantized without a record; or the file is damaged.
    """
    directory = Path(directory)
    settings = json.loads((directory / "config.json").read_text()).get("quantization_config")
    side = json.loads((directory / "qat.json").read_text()) if (directory / "qat.json").is_file() else {}
    cache = side.get("kv_cache")
    if settings is None and not (cache and cache["dynamic"]):
        raise VerificationError(f"{directory / 'config.json'} has no quantization_config")
    settings = settings or {"quant_method": "compressed-tensors", "config_groups": {}, "ignore": []}
    own = settings["quant_method"] == "qat"
    tensors = read_safetensors(directory / ("qat.safetensors" if own else "model.safetensors"))
    checks = [
        _check_key_values(name, tensors, settings, cache, cast("RecordedKeyValues", used))
        if hasattr(used, "key")
        else _check(name, tensors, settings, cast("Recorded", used))
        for name, used in recorded.items()
    ]
    stored = {n.rpartition(".")[0] for n in tensors if n.endswith((".weight_scale", ".k_scale", ".v_scale"))}
    for name in sorted(stored - set(recorded)):
        checks.append(LayerCheck(name, (), problem="quantized in the file, but training recorded nothing"))
    failed = [check for check in checks if not check.passed]
    if failed:
        more = f"\n  ... and {len(failed) - 5} more" if len(failed) > 5 else ""
        raise VerificationError(
            f"{len(failed)} of {len(checks)} layers are not what was trained:\n  "
            + "\n  ".join(map(str, failed[:5]))
            + more
        )
    return checks


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a safetensors file; bfloat16 as float32.

    Raises:
        VerificationError: the file is shorter or longer than its header says.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = struct.unpack("<Q", file.read(8))[0] if size >= 8 else size
        if 8 + length > size:
            raise VerificationError(f"{path}: truncated inside its header ({size} bytes)")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    expected = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if expected != size:
        raise VerificationError(f"{path}: {size} bytes, but its header promises {expected}")
    data = np.memmap(path, np.uint8, "r", offset=8 + length) if header else np.zeros(0, np.uint8)
    return {name: _tensor(data, entry) for name, entry in header.items()}


def decode(name: str, tensors: Mapping[str, np.ndarray], settings: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Codes (out, in) int8 and scales (out, groups) float32 of the layer called `name`.

    Raises:
        VerificationError: tensors are missing, or contradict `settings`, the file's quantization_config.
    """
    weights = _group_of(name, settings)["weights"]
    if f"{name}.weight_packed" in tensors:
        packed, (rows, columns) = tensors[f"{name}.weight_packed"], tensors[f"{name}.weight_shape"]
        codes = _unpack(packed, weights["num_bits"], int(columns))
        if weights.get("grid") == "odd":
            codes = 2 * codes + 1
        if codes.shape != (rows, columns):
            raise VerificationError(f"{packed.shape[0]} rows are stored of {rows}")
    elif f"{name}.weight" in tensors and tensors[f"{name}.weight"].dtype == np.int8:
        codes = tensors[f"{name}.weight"]
    else:
        raise VerificationError("has neither weight_packed nor an int8 weight in the file")
    scale = tensors[f"{name}.weight_scale"].astype(np.float32)
    groups = 1 if weights["strategy"] == "channel" else codes.shape[1] // weights["group_size"]
    if scale.shape != (codes.shape[0], groups):
        raise VerificationError(f"scales have shape {scale.shape}, its config says {(codes.shape[0], groups)}")
    return codes, scale


def _check(name: str, tensors: Mapping[str, np.ndarray], settings: Mapping[str, Any], used: "Recorded") -> LayerCheck:
    shape = tuple(used.codes.shape)
    try:
        codes, scale = decode(name, tensors, settings)
    except (VerificationError, KeyError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        return LayerCheck(name, shape, problem=what)
    if codes.shape != shape or scale.shape != tuple(used.scale.shape):
        return LayerCheck(name, shape, problem=f"stored as {codes.shape} with scales {scale.shape}")
    differing = _differing(scale, used.scale)
    static = {"input_scale": used.input_scale, "input_zero_point": used.input_zero_point}
    for kind, wanted in static.items():
        found = tensors.get(f"{name}.{kind}")
        if (found is None) != (wanted is None):
            what = f"static {kind.replace('_', ' ')} is {'missing' if found is None else 'unexpected'}"
            return LayerCheck(name, shape, problem=f"a {what}")
        if found is not None and wanted is not None:
            differing += _differing(found.astype(np.float32), wanted.float())
    return LayerCheck(name, shape, int((codes != used.codes.numpy()).sum()), differing)


def _check_key_values(
    name: str, tensors: Mapping[str, np.ndarray], settings: Mapping[str, Any], spec: Any, used: "RecordedKeyValues"
) -> LayerCheck:
    shape = tuple(used.key.x.shape)
    try:
        values, scales = differing(name, tensors, settings.get("kv_cache_scheme"), spec, used)
    except LookupError as error:
        return LayerCheck(name, shape, problem=str(error))
    return LayerCheck(name, shape, values, scales)


def _differing(stored: np.ndarray, used: Any) -> int:
    """How many float32 values differ in their bits: NaN equals itself, and the sign of a zero counts."""
    return int((np.ascontiguousarray(stored).view(np.uint32) != used.numpy().view(np.uint32)).sum())


def _group_of(name: str, settings: Mapping[str, Any]) -> Mapping[str, Any]:
    if name in settings["ignore"]:
        raise VerificationError("is on the config's ignore list")
    for group in settings["config_groups"].values():
        if name in group["targets"] or "Linear" in group["targets"]:
            return group
    raise VerificationError("is in no group of the config")


def _tensor(data: np.ndarray, entry: Mapping[str, Any]) -> np.ndarray:
    begin, end = entry["data_offsets"]
    values = np.frombuffer(data[begin:end].tobytes(), _NUMPY[entry["dtype"]]).reshape(entry["shape"])
    if entry["dtype"] == "BF16":  # the upper half of a float32
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values


def _unpack(packed: np.ndarray, bits: int, columns: int) -> np.ndarray:
    """Little-endian words are bytes in order; a byte holds one 8-bit code, or two 4-bit codes, the even one low.

    Codes of other widths are runs of bits, the low ones first, across the borders of bytes.
    """
    stored = np.ascontiguousarray(packed).view(np.uint8)
    if bits == 4:
        stored = np.stack([stored & 15, stored >> 4], -1).reshape(len(stored), -1)
    elif bits != 8:
        run = np.unpackbits(stored, axis=1, count=columns * bits, bitorder="little")
        stored = np.packbits(run.reshape(len(stored), columns, bits), axis=2, bitorder="little")[..., 0]
    return (stored[:, :columns].astype(np.int16) - 2 ** (bits - 1)).astype(np.int8)
