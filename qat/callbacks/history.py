"""The training loss, for plots that do not depend on a logger."""

from typing import Any

import lightning as L


class TrainHistory(L.Callback):
    """Keeps {"step", "loss"} every `log_every_n_steps` steps, through checkpoints too."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step, last = trainer.global_step, self.rows[-1]["step"] if self.rows else 0
        # Once a step, whose batches may be several.
        if step > last and step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self.rows.append({"step": step, "loss": float(outputs["loss"])})

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = state_dict["rows"]
