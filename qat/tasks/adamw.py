"""What all tasks train with: AdamW and its schedule."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor

from qat.evaluation.losses import Losses


class AdamWTask(L.LightningModule):
    """A model with AdamW and a warm-up / constant / linear-decay schedule; a subclass has `losses` and a step.

    Args:
        model: what is trained.
        lr: peak learning rate.
        betas, weight_decay: of AdamW; decay applies to matrices only.
        warmup: share of the steps over which the rate rises linearly from 0.
        decay: share of the steps, at the end, over which it falls linearly to `final * lr`.
        final: the last rate as a share of the peak.
    """

    def __init__(
        self,
        model: Any,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.1,
        warmup: float = 0.05,
        decay: float = 0.5,
        final: float = 0.0,
    ):
        super().__init__()
        self.model = model.train()  # transformers loads in evaluation mode, and Lightning leaves it so
        beta1, beta2 = betas  # a list, where a config gave it
        self.lr, self.betas, self.weight_decay = lr, (beta1, beta2), weight_decay
        self.warmup, self.decay, self.final = warmup, decay, final

    def losses(self, batch: dict[str, Tensor]) -> Losses:
        """Sums of one batch: what every figure of a run is computed from."""
        raise NotImplementedError

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> Losses:  # type: ignore[override]
        sums = self.losses(batch)
        self.log("val/loss", sums.nll.sum().float() / sums.tokens.sum(), batch_size=int(sums.tokens.sum()))
        return sums

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        named = [(n, p) for n, p in self.named_parameters() if p.requires_grad]
        groups = [
            {"params": [p for _, p in named if p.dim() >= 2], "weight_decay": self.weight_decay},
            {"params": [p for _, p in named if p.dim() < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def rate(self, step: int) -> float:
        """The learning rate at `step` as a share of the peak."""
        total = max(int(self.trainer.estimated_stepping_batches), 1)
        up = max(self.warmup * total, 1)
        down = max(self.decay * total, 1)
        left = (total - step) / down
        return min((step + 1) / up, 1.0, self.final + (1 - self.final) * max(left, 0.0))
