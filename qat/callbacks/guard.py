"""Stop before damage: at NaN before the weights take it in, at Ctrl-C after the step that is under way."""

import logging
import signal
import threading
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from qat.callbacks.batches import tensors

log = logging.getLogger(__name__)


class NaNGuard(L.Callback):
    """Raises ValueError at the first batch, loss or gradient that is not finite, before the weights change.

    Gradients are left to the gradient scaler where there is one (float16): it skips such steps by itself.
    """

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        for name, value in tensors(batch):
            if value.is_floating_point() and not torch.isfinite(value).all():
                raise ValueError(
                    f"batch {batch_idx} (step {trainer.global_step}): field {name} holds NaN or infinite values. The "
                    "data is at fault; the weights are those before this batch"
                )

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        if not torch.isfinite(loss):
            raise ValueError(
                f"the loss of step {trainer.global_step} is {loss.item()}; the weights are those before it. "
                "Start again with a lower learning rate, of the weights or of the scales"
            )

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if trainer.scaler is not None:
            return
        named = [(n, p.grad) for n, p in pl_module.named_parameters() if p.grad is not None]
        if not named:
            return
        norms = torch._foreach_norm([g for _, g in named])
        finite = torch.stack([norm.to(norms[0].device) for norm in norms]).isfinite()
        if not finite.all():
            bad, gradient = named[int(finite.int().argmin())]
            what = "has a norm beyond its dtype" if torch.isfinite(gradient).all() else "holds NaN or infinite values"
            raise ValueError(
                f"the gradient of {bad} at step {trainer.global_step} {what}; the weights are those before it. "
                "Start again with a lower learning rate, of the weights or of the scales"
            )


class SafeExit(L.Callback):
    """On Ctrl-C or SIGTERM finishes the step under way, saves, and says how to resume; a second one stops at once.

    Args:
        path: the checkpoint that is written (atomically).
        command: what the user types to go on.
    """

    def __init__(self, path: str | Path, command: str):
        self.path, self.command = Path(path), command
        self.asked = False
        self._between = True  # optimizer steps: a checkpoint holds no gradients, and amid a step would lose them
        self._step = 0  # optimizer steps before the batch under way
        self._previous: dict[int, Any] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._ask)

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        log.warning("stopping after this step (once more: at once, losing what came after the last checkpoint)")

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._between = trainer.global_step != self._step
        if not self.asked or not self._between:
            return
        trainer.save_checkpoint(self.path)
        log.warning("saved step %d to %s; go on with\n  %s", trainer.global_step, self.path, self.command)
        raise KeyboardInterrupt

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if isinstance(exception, ValueError) and trainer.global_step and not self.asked:
            if self._between and all(torch.isfinite(p).all() for p in pl_module.parameters()):
                trainer.save_checkpoint(self.path)
            if self.path.exists():
                log.warning("%s holds the last good state; go on from it with\n  %s", self.path, self.command)
        self._restore()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.save_checkpoint(self.path)  # whatever fails after training, a full disk at export say, loses nothing
        if 0 < trainer.max_steps <= trainer.global_step:  # no step is left that Ctrl-C could wait for
            self._restore()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
