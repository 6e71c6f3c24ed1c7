"""What sets scales, and prepares weights, before training or instead of it.

Every calibration is a `Calibration`: called with a model and a way to run data through it.
"""

from qat.calibration.awq import AWQ, ClipSearch
from qat.calibration.coverage import Coverage
from qat.calibration.gptq import GPTQ
from qat.calibration.method import Calibration
from qat.calibration.ranges import RangeCalibration
from qat.calibration.reconstruction import Reconstruction
from qat.calibration.rotation import Rotation
from qat.calibration.smoothquant import SmoothQuant

CALIBRATIONS: dict[str, Calibration] = {
    "absmax": RangeCalibration("absmax", weight="absmax"),
    "mse": RangeCalibration("mse"),
    "weighted_mse": RangeCalibration("weighted_mse", importance=0.5, signed=True),
    "gptq": GPTQ(),
}
"""Calibrations for any model, by name; the strongest one on a model's validation split is its PTQ to beat."""

__all__ = [
    "AWQ", "CALIBRATIONS", "GPTQ", "Calibration", "ClipSearch", "Coverage", "RangeCalibration", "Reconstruction",
    "Rotation",
    "SmoothQuant",
]  # fmt: skip
