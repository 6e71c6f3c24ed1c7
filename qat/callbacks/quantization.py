"""Quantization-aware training as a callback: insert, calibrate, schedule, freeze.

The module it works on knows nothing of it.  All state is in the quantizers' buffers and parameters, so a
checkpoint carries it, and every phase is chosen by `step >= border`, so a resumed run is in the right one.
"""

import functools
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from qat.calibration import Calibration, RangeCalibration
from qat.callbacks.batches import after, forward_batch, muted, restore
from qat.callbacks.optimizers import check_optimizers, scale_groups
from qat.estimators import LSQ, Estimator
from qat.evaluation.losses import to_device
from qat.fake_quantizer import Stage, token_mask
from qat.insertion import insert, layers, prepare, quantizers, set_stage
from qat.scheme import SchemeMap
from qat.structure import keep_modes, untie
from qat.training import scale_steps

log = logging.getLogger(__name__)


class QuantizationAwareTraining(L.Callback):
    """Trains a LightningModule through fake quantizers.

    Inserts in `setup` where the model exists by then, after `configure_model` where that builds it, or
    adopts a model into which `configure_model` inserted by itself (`qat.insert`).  Trains in one process only.

    Args:
        schemes: which layers are quantized, and how.
        calibration: sets the scales when quantization starts, and prepares the weights; MSE by default.
        estimator: the gradient; LSQ by default.
        input_estimator: that of activations, where it differs (PACT).
        scale_lr: learning rate of the scales; by default 1e-4, or 5e-3 where the estimator learns log2 of them.
        scale_decay: weight decay of the scales; PACT's regularizer.
        start_step: optimizer steps in float before quantization starts; those of all optimizers, where several are.
        freeze_share: share of the steps, at the end, in which the scales no longer move.
        submodule: dotted name of the part of the LightningModule to quantize; patterns match names
            inside it.  Empty: all of it.
        untie: give an output layer that shares the embedding's weight its own copy first.
        calibration_loader: batches for calibrations that need data; by default the datamodule's
            `calibration_dataloader()`.
        forward: (module, batch) -> anything; how one such batch runs, and the last training batch for an export.
        calibration_folder: where a calibration keeps finished blocks, so that a killed one goes on; None: nowhere.
    """

    def __init__(
        self,
        schemes: SchemeMap,
        calibration: Calibration | None = None,
        estimator: Estimator | None = None,
        input_estimator: Estimator | None = None,
        scale_lr: float | None = None,
        scale_decay: float = 0.0,
        start_step: int = 0,
        freeze_share: float = 0.1,
        submodule: str = "",
        untie: bool = False,
        calibration_loader: Iterable[Any] | None = None,
        forward: Callable[[Any, Any], Any] = forward_batch,
        calibration_folder: Path | None = None,
    ):
        if not 0 <= freeze_share < 1:
            raise ValueError(f"freeze_share must be in [0, 1), got {freeze_share}")
        self.schemes, self.estimator = schemes, estimator if estimator is not None else LSQ()
        self.calibration: Calibration = calibration if calibration is not None else RangeCalibration("mse")
        self.input_estimator, self.scale_decay = input_estimator, scale_decay
        if scale_decay and any(e is not None and e.relative for e in (self.estimator, input_estimator)):
            raise ValueError("scale_decay shrinks scales, and a relative estimator learns their logarithms: use one")
        self.scale_lr = scale_lr if scale_lr is not None else 5e-3 if self.estimator.relative else 1e-4
        self.start_step, self.freeze_share = start_step, freeze_share
        self.submodule, self.untie = submodule, untie
        self.calibration_loader, self.forward = calibration_loader, forward
        self.calibration_folder = calibration_folder
        self._handles: list[RemovableHandle] = []

    def quantized(self, module: nn.Module) -> nn.Module:
        """The part of `module` that is quantized."""
        return module.get_submodule(self.submodule)

    # -- insertion ----------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit" and trainer.world_size > 1:
            raise ValueError(
                f"the trainer has {trainer.world_size} processes, and quantization is trained in one: DDP breaks where "
                "scales start late or freeze. Use devices=1, and accumulate_grad_batches for larger batches"
            )
        built_later = type(pl_module).configure_model is not L.LightningModule.configure_model
        if any(isinstance(m, nn.Linear) for m in pl_module.modules()) or not built_later:
            self._insert(pl_module)
        else:
            after(pl_module, "configure_model", lambda _: self._insert(pl_module))
        if stage != "fit":  # validating or testing a checkpoint needs the quantizers, and no optimizer
            return
        original = pl_module.configure_optimizers

        @functools.wraps(original)
        def configure_optimizers() -> Any:
            with scale_groups(pl_module, self.scale_lr, self.scale_decay):
                built = original()
            check_optimizers(pl_module, built, self.scale_lr)
            return built

        pl_module.configure_optimizers = configure_optimizers  # type: ignore[method-assign]

    def _insert(self, pl_module: L.LightningModule) -> None:
        model = self.quantized(pl_module)
        if quantizers(model):
            return  # the user's configure_model, or an earlier fit, has inserted
        prepare(model, self.schemes)
        if self.untie:
            untie(model)
        inserted = insert(model, self.schemes, self.estimator, self.input_estimator)
        self.calibration.check(model)
        log.info("%s: %d layers quantized", self.schemes.name, len(inserted))

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        restore(pl_module, "configure_optimizers", "configure_model")
        for handle in self._handles:
            handle.remove()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")

    # -- training -----------------------------------------------------------------------------------

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not quantizers(pl_module):
            raise ValueError(
                f"{type(pl_module).__name__} has no fake quantizer: its configure_model builds the model after "
                "insertion. Call qat.insert(self.model, schemes) at the end of configure_model"
            )
        if trainer.max_steps > 0:  # epochs may end it sooner: on_train_start knows
            self.check_schedule(trainer.max_steps)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._handles = [h for optimizer in trainer.optimizers for h in scale_steps(optimizer, pl_module)]
        if len(trainer.optimizers) > 1 and trainer.max_epochs != -1:
            raise ValueError(
                f"{len(trainer.optimizers)} optimizers share trainer.global_step, so epochs do not say at which step "
                "training ends: give the trainer max_steps, which counts the steps of all, and no max_epochs"
            )
        self.check_schedule(trainer.estimated_stepping_batches)
        if math.isinf(trainer.estimated_stepping_batches) and self.estimator.at(1.0) != self.estimator:
            raise ValueError(f"{self.estimator} changes until training ends: tell the trainer when, by max_steps")

    def stage_at(self, step: int, total: float) -> Stage:
        """The stage of a run of `total` optimizer steps before step `step` (from 0)."""
        if step < self.start_step:
            return Stage.FLOAT
        return Stage.FROZEN if self.freeze_share and step >= self._freeze(total) else Stage.TRAIN

    def _freeze(self, total: float) -> float:
        return math.inf if math.isinf(total) else math.ceil(total * (1 - self.freeze_share))

    def check_schedule(self, total: float) -> None:
        """Refuse a run of `total` optimizer steps of which none trains through the quantizers.

        Raises:
            ValueError: `start_step` is not before the step at which the scales freeze, or training ends.
        """
        if self.start_step >= self._freeze(total):
            raise ValueError(
                f"start_step={self.start_step} leaves no step that trains through the quantizers: of {total} steps the "
                f"first {self._freeze(total)} come before the scales freeze (freeze_share={self.freeze_share:g}). "
                "Start earlier, freeze less, or train longer"
            )

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        wanted = self.stage_at(trainer.global_step, trainer.estimated_stepping_batches)
        current = quantizers(pl_module)[0].current_stage
        if wanted >= Stage.TRAIN:
            self._schedule(trainer, pl_module)
        if wanted == current:
            return
        if current == Stage.FLOAT:
            self.calibrate(trainer, pl_module)
        if wanted == Stage.FROZEN:
            self._settle(pl_module)
        set_stage(pl_module, wanted)
        log.info("step %d: quantizers %s", trainer.global_step, wanted.name.lower())

    def _schedule(self, trainer: L.Trainer, pl_module: nn.Module) -> None:
        total = trainer.estimated_stepping_batches
        progress = (trainer.global_step - self.start_step) / max(total - self.start_step, 1)
        for quantizer in quantizers(pl_module):
            quantizer.estimator = quantizer.estimator.at(progress)

    @staticmethod
    def _settle(pl_module: nn.Module) -> None:
        """Store the scales that the last forward used: an estimator may follow the weights instead."""
        for layer in layers(pl_module).values():
            layer.weight_quantizer.set_scale(layer.weight_quantizer.weight_scale(layer.adapted.detach()))

    # -- calibration --------------------------------------------------------------------------------

    def calibrate(
        self, trainer: L.Trainer, pl_module: L.LightningModule, calibration: Calibration | None = None
    ) -> None:
        """Set all scales, and weights where the calibration does, from the weights as they are and from data."""
        chosen = calibration if calibration is not None else self.calibration
        model = self.quantized(pl_module)
        for layer in layers(model).values():
            layer.merge()
        chosen(model, lambda: self._run(trainer, pl_module), self.calibration_folder)

    @torch.no_grad()
    def _run(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        loader = self.calibration_loader
        if loader is None:
            source = getattr(trainer.datamodule, "calibration_dataloader", None)  # type: ignore[attr-defined]
            if source is None:
                raise ValueError(
                    f"calibration {self.calibration.name} needs data: give the datamodule a "
                    "calibration_dataloader(), or QuantizationAwareTraining a calibration_loader"
                )
            loader = source()
        with keep_modes(pl_module):
            pl_module.eval()
            for batch in loader:
                mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
                with trainer.precision_plugin.forward_context(), token_mask(mask), muted(pl_module):
                    self.forward(pl_module, trainer.precision_plugin.convert_input(to_device(batch, pl_module)))


def quantization_of(trainer: L.Trainer, wanted_by: str) -> QuantizationAwareTraining:
    """The callback of `trainer` that quantizes.

    Raises:
        ValueError: there is none; names the callback that wants it.
    """
    found = [c for c in trainer.callbacks if isinstance(c, QuantizationAwareTraining)]  # type: ignore[attr-defined]
    if not found:
        raise ValueError(f"{wanted_by} needs a QuantizationAwareTraining callback before it in the trainer's callbacks")
    return found[0]
