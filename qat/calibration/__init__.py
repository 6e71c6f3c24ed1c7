"""What sets scales before training."""

from qat.calibration.ranges import RangeCalibration

CALIBRATIONS = {
    "absmax": RangeCalibration("absmax", weight="absmax"),
    "mse": RangeCalibration("mse"),
    "weighted_mse": RangeCalibration("weighted_mse", importance=0.5, signed=True),
}
"""Every calibration there is, by name; the strongest one on a model's validation split is its PTQ to beat."""

__all__ = ["CALIBRATIONS", "RangeCalibration"]
