"""Data that a resumed run goes on with where it was."""

from typing import Any

import lightning as L


class ResumableData(L.LightningDataModule):
    """Counts the training batches used, in every checkpoint; a subclass starts its sampler at `_batches_done`."""

    def __init__(self) -> None:
        super().__init__()
        self._batches_done = 0

    def state_dict(self) -> dict[str, int]:
        """How many training batches the run has used; part of every checkpoint."""
        # Not `completed`: a checkpoint saved in on_train_batch_end has its last batch processed, not completed.
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.total if self.trainer else None
        return {"batches": progress.processed if progress is not None else 0}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Where the next loader starts.  Lightning calls this after `setup` and before it builds any loader."""
        self._batches_done = state_dict["batches"]
