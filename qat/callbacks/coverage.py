"""What a run's calibration data reaches, before anything long is done with it."""

import logging
from collections.abc import Mapping
from typing import Any

import lightning as L

from qat.calibration import Coverage, Rotation
from qat.calibration.coverage import OUTLIER, Reached
from qat.calibration.equalization import Equalization
from qat.callbacks.quantization import QuantizationAwareTraining
from qat.export import Artifact

log = logging.getLogger(__name__)


def measure_coverage(
    pl_module: L.LightningModule, trainer: L.Trainer, quantization: QuantizationAwareTraining
) -> dict[str, Reached]:
    """What each quantized layer sees of the calibration data; nothing where the calibration needs none.

    Args:
        pl_module: with fake quantizers inserted; they stay in float.
        trainer: with data attached.
        quantization: whose scheme and calibration it is about.

    Raises:
        ValueError: some layer sees nothing.
    """
    if not quantization.calibration.needs_data(quantization.quantized(pl_module)):
        return {}
    trainer.precision_plugin.convert_module(pl_module)
    pl_module.to(trainer.strategy.root_device)
    coverage = Coverage()
    try:
        quantization.calibrate(trainer, pl_module, coverage)
    except ValueError as error:
        raise ValueError(f"calibration {quantization.calibration.name}: {error}") from error
    _say_outliers(coverage.reached, quantization)
    return coverage.reached


def _say_outliers(reached: Mapping[str, Reached], quantization: QuantizationAwareTraining) -> None:
    """Warn where large channels set the steps of all others, and the calibration does nothing about it."""
    if isinstance(quantization.calibration, (Rotation, Equalization)):
        return
    found = {
        name: r.outliers
        for name, r in reached.items()
        if r.outliers and (scheme := quantization.schemes.scheme_of(name)) is not None and scheme.input is not None
    }
    if found:
        worst = max(found, key=lambda name: found[name])
        log.warning(
            "%d input channels in %d layers are over %d times as large as the median one, most of them in %s (%d of "
            "%d): at %s they leave the others few steps; calibration=rotation spreads them, awq and smoothquant move "
            "them into the weights",
            sum(found.values()), len(found), OUTLIER, worst, found[worst], reached[worst].inputs,
            quantization.schemes.name,
        )  # fmt: skip


def layer_rows(artifact: Artifact, reached: Mapping[str, Reached]) -> list[dict[str, Any]]:
    """The layers of an artifact and what each saw of the calibration data, as the summary has them."""
    return [
        {
            "name": layer.name,
            "scheme": layer.scheme,
            "shape": list(layer.shape),
            "bytes": layer.bytes,
            "float_bytes": 2 * layer.shape[0] * layer.shape[1],
            "error": layer.weight_error,
            "tokens": reached[layer.name].tokens if layer.name in reached else None,
            "dead_inputs": reached[layer.name].dead if layer.name in reached else None,
            "outlier_inputs": reached[layer.name].outliers if layer.name in reached else None,
        }
        for layer in artifact.layers
    ]
