"""What a training went through, whichever logger there is: its losses, what it saw, how long it took."""

import time
from collections.abc import Mapping
from typing import Any

import lightning as L
import torch


class TrainHistory(L.Callback):
    """Counts through checkpoints, so that a resumed run has the figures of all its sessions.

    Args:
        started: when this session did, by `time.monotonic`.

    Attributes:
        rows: {"step", "loss"} every `log_every_n_steps` steps; the mean loss of the step's batches.
        earlier: seconds of the sessions before this one, up to the checkpoint it went on from.
    """

    def __init__(self, started: float) -> None:
        self.rows: list[dict[str, float]] = []
        self.started, self.earlier = started, 0.0
        self._seen: int | torch.Tensor = 0
        self._step = 0  # optimizer steps before the batch under way
        self._losses: list[torch.Tensor] = []  # of the batches of the step under way

    @property
    def seconds(self) -> float:
        """Of all sessions."""
        return self.earlier + time.monotonic() - self.started

    @property
    def seen(self) -> int:
        """Labels that were trained on, in this process: those of tokens that are not masked, or of images."""
        return int(self._seen)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        labels = batch.get("labels") if isinstance(batch, Mapping) else None
        if isinstance(labels, torch.Tensor):
            # -100 is torch's ignore_index.  The sum stays a tensor: to read it would be to wait for the device.
            self._seen = self._seen + (labels != -100).sum()
        self._losses.append(outputs["loss"] * trainer.accumulate_grad_batches)  # Lightning has divided it by them
        if trainer.global_step == self._step:
            return
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self.rows.append({"step": trainer.global_step, "loss": float(torch.stack(self._losses).mean())})
        self._losses = []

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "seen": self.seen, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows, self._seen, self.earlier = state_dict["rows"], state_dict["seen"], state_dict["seconds"]
