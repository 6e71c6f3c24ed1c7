"""The health of training as a callback: logged, warned about, kept for the report."""

import logging
from typing import Any

import lightning as L
import torch
from torch import Tensor

from qat.diagnosis.health import Health, gradient_ratio, unusual
from qat.insertion import layers

log = logging.getLogger(__name__)


class TrainingHealth(L.Callback):
    """Looks at the quantized weights every few steps and says what is out of the ordinary (`qat.diagnosis.health`).

    Comes after `QuantizationAwareTraining` in the trainer's callbacks, and after `Oscillation`.  Logs `health/*` to all
    loggers; changes no bit of what is trained.  Costs 0.8 % of a step of the embedded model
    (`benchmarks/step_extras.py`).

    Args:
        every: steps between looks.

    Raises:
        ValueError: `every` is not positive.
    """

    def __init__(self, every: int = 10):
        if every < 1:
            raise ValueError(f"health looks every so many steps, at least 1, got every={every}")
        self.every = every
        self.health = Health()
        self.rows: list[dict[str, float | None]] = []
        self._ratio: Tensor | None = None
        self._step = 0  # optimizer steps before the batch under way

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._step = trainer.global_step
        self.health.start(pl_module)

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if (trainer.global_step + 1) % self.every == 0:
            self._ratio = gradient_ratio(pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step or not self.health.turns:
            return
        self.health.step(pl_module)
        if trainer.global_step % self.every:
            return
        ratio, self._ratio = self._ratio, None
        figures: dict[str, float | None] = {
            **self.health.look(pl_module), "gradient_ratio": None if ratio is None else float(ratio),
        }  # fmt: skip
        bits = {layer.weight_quantizer.spec.bits for layer in layers(pl_module).values()}
        warned = {name for row in self.rows for name in unusual(row, bits)}
        self.rows.append({"step": trainer.global_step, **figures})
        known = {f"health/{name}": value for name, value in figures.items() if value is not None}
        for logger in trainer.loggers:
            logger.log_metrics(known, step=trainer.global_step)
        for name, sentence in unusual(figures, bits).items():
            if name not in warned:  # once a run
                log.warning("step %d: %s", trainer.global_step, sentence)

    def state_dict(self) -> dict[str, Any]:
        return {"health": self.health.state_dict(), "rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.health.load_state_dict(state_dict["health"])
        self.rows = list(state_dict["rows"])
