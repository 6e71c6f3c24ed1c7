"""qat: quantization-aware training that ends in a verified packed model.

The names below are the public ones; everything else is found by its folder.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "QuantScheme": "qat.scheme",
    "QuantSpec": "qat.scheme",
    "SchemeMap": "qat.scheme",
    "uniform": "qat.scheme",
    "at_width": "qat.insertion",
    "insert": "qat.insertion",
    "layers": "qat.insertion",
    "remove": "qat.insertion",
    "fold_batch_norms": "qat.structure",
    "unfuse_experts": "qat.structure",
    "untie": "qat.structure",
    "DSQ": "qat.estimators",
    "LSQ": "qat.estimators",
    "LSQPlus": "qat.estimators",
    "PACT": "qat.estimators",
    "SEQ": "qat.estimators",
    "STE": "qat.estimators",
    "Stage": "qat.fake_quantizer",
    "AWQ": "qat.calibration",
    "GPTQ": "qat.calibration",
    "RangeCalibration": "qat.calibration",
    "Rotation": "qat.calibration",
    "SmoothQuant": "qat.calibration",
    "parameter_groups": "qat.training",
    "scale_parameters": "qat.training",
    "load_packed": "qat.inference",
}

__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    """Import a public name at first use: `qat --help` must not wait for torch."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'qat' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
