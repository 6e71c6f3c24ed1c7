"""How much of what quantization costs is recovered, measured while training and at its end."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import lightning as L
import torch

from qat.calibration import Calibration, RangeCalibration
from qat.callbacks.batches import step_losses
from qat.callbacks.measure import Measure, Measured
from qat.callbacks.quantization import quantization_of
from qat.evaluation import DocumentLosses, Estimate, Losses, difference, recovered
from qat.evaluation.losses import by_document
from qat.insertion import widths


@dataclass(frozen=True)
class Control:
    """The float model fine-tuned for the same steps on the same batches, measured.

    Attributes:
        control: its losses in float.
        ptq: its losses after post-training quantization by `calibration`, the best on the validation split.
        calibration: name of that calibration.
    """

    control: Measured
    ptq: Measured
    calibration: str


def measure_untrained(measure: Measure, calibrations: Mapping[str, Calibration]) -> dict[str, Measured]:
    """Losses of the model as it is: `float`, each calibration by its name, and nested widths as `sliced_int<bits>`."""
    found = {"float": measure.in_float("float")}
    for name, calibration in calibrations.items():
        found[name] = measure.post_training(name, calibration)
    if widths(measure.module):  # what the high bits of the codes are worth before anything is trained
        found |= measure.calibrated(measure.quantization.calibration, lambda: measure.narrower("sliced"))
    return found


class Recovery(L.Callback):
    """Measures float, PTQ, PTQ with better scales, and QAT at every validation and at the end.

    Comes after `QuantizationAwareTraining` in the trainer's callbacks.  Logs `recovery/*` to all loggers.  Nested
    widths are measured too, as `qat_int4` and, before training, `sliced_int4`; recovery is that of the widest.

    Args:
        calibrations: post-training quantizations to compare with, by the names of their losses; `ptq` is
            what recovery is measured from.
        control: the measured control, or None for no recovery over control.
        untrained: what `measure_untrained` found of the float model, where training starts from other weights; None
            for those that the module has when `fit` begins.
    """

    def __init__(
        self,
        calibrations: Mapping[str, Calibration] | None = None,
        control: Control | None = None,
        untrained: Mapping[str, Measured] | None = None,
    ):
        if calibrations is None:
            calibrations = {"ptq": RangeCalibration("absmax", weight="absmax"), "ptq_mse": RangeCalibration("mse")}
        if "ptq" not in calibrations:
            raise ValueError(f"calibrations need one called ptq, which recovery is measured from: {list(calibrations)}")
        self.calibrations, self.control = calibrations, control
        self.models: dict[str, Measured] = dict(untrained or {})
        self.history: list[dict[str, float | None]] = []
        self._outputs: list[Losses] = []

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.control is not None:
            self.models |= {"control": self.control.control, "control_ptq": self.control.ptq}
        if "float" in self.models:
            return  # or resumed: the weights are trained ones by now
        measure = Measure(trainer, pl_module, quantization_of(trainer, "Recovery"))
        self.models |= measure_untrained(measure, self.calibrations)

    # -- while training -----------------------------------------------------------------------------

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._outputs = []

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        self._outputs.append(step_losses(outputs, batch, batch_idx))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or "float" not in self.models or not trainer.fit_loop.epoch_loop.global_step:
            return
        figures = self.figures("validation", by_document(self._outputs))
        row = {name: figure.value for name, figure in figures.items()}
        narrower = Measure(trainer, pl_module, quantization_of(trainer, "Recovery")).narrower("qat", ("validation",))
        row |= {f"{name}_loss": measured["validation"].loss for name, measured in narrower.items()}
        self.history.append({"step": trainer.global_step, **row})
        known = {f"recovery/{name}": value for name, value in row.items() if value is not None}
        for logger in trainer.loggers:
            logger.log_metrics(known, step=trainer.global_step)

    def figures(self, split: str, qat: DocumentLosses | None) -> dict[str, Estimate]:
        """Every figure that compares `qat` with what was measured on the same split, by its name in the summary."""
        at = {name: measured[split] for name, measured in self.models.items() if split in measured}
        found = {f"{name}_loss": Estimate(losses.loss) for name, losses in at.items()}
        if qat is None:
            nothing = Estimate(None, reason="nothing was trained (trainer.max_steps=0)")
            return found | dict.fromkeys(("recovery", "recovery_over_control", "qat_minus_control_ptq"), nothing)
        found |= {"qat_loss": Estimate(qat.loss), "recovery": recovered(at["ptq"], qat, at["float"])}
        if "control" in at:
            found["qat_minus_control_ptq"] = difference(qat, at["control_ptq"])
            found["recovery_over_control"] = recovered(at["control_ptq"], qat, at["control"])
        else:
            nothing = Estimate(None, reason="no control was trained (control=none)")
            found |= {"qat_minus_control_ptq": nothing, "recovery_over_control": nothing}
        return found

    # -- at the end ---------------------------------------------------------------------------------

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        measure = Measure(trainer, pl_module, quantization_of(trainer, "Recovery"))
        self.models |= {"qat": measure("qat"), **measure.narrower("qat")}

    def measure_calibrated(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Instead of `on_train_end` where nothing is trained: losses of the calibrated model, logged too."""
        measure = Measure(trainer, pl_module, quantization_of(trainer, "Recovery"))
        self.models |= {"calibrated": measure("calibrated"), **measure.narrower("sliced")}
        for logger in trainer.loggers:
            losses = {f"recovery/{name}_loss": m["validation"].loss for name, m in self.models.items()}
            logger.log_metrics(losses, step=0)
            logger.save()

    def state_dict(self) -> dict[str, Any]:
        """What was measured so far, as plain tensors: a resumed run cannot measure the untrained model again."""
        measured = {
            name: {split: {k: torch.from_numpy(v) for k, v in asdict(losses).items()} for split, losses in m.items()}
            for name, m in self.models.items()
        }
        return {"models": measured, "history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.models = {
            name: {split: DocumentLosses(**{k: v.numpy() for k, v in d.items()}) for split, d in m.items()}
            for name, m in state_dict["models"].items()
        }
        self.history = state_dict["history"]
