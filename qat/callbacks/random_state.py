"""Random numbers, dropout's among them, are the same in a run that was stopped and in one that was not."""

from typing import Any

import lightning as L


class RandomState(L.Callback):
    """Seeds all generators before every training batch, by the run's seed and the number of the batch.

    What a batch draws then depends on nothing that happened before it: a resumed run needs no stored state, and
    a run and its control draw alike though they measure different things in between.

    Args:
        seed: of the run.
    """

    def __init__(self, seed: int):
        self.seed, self.batches = seed, 0

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        number = self.batches * trainer.world_size + trainer.global_rank
        L.seed_everything((1_000_003 * self.seed + number) % 2**32, verbose=False)
        self.batches += 1

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.batches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.batches = state_dict["batches"]
