"""Somebody else's LightningModule: a classifier of scikit-learn's digits that has never heard of quantization."""

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from qat.callbacks import QuantizationAwareTraining
from qat.scheme import QuantSpec, uniform

STEPS = 12


def digits(batch_size: int = 64) -> tuple[DataLoader, DataLoader]:
    """Training and validation batches of (image (batch, 64) in [0, 1], class (batch,)), in a fixed order."""
    data = load_digits()
    images = torch.tensor(data.data, dtype=torch.float32) / 16
    labels = torch.tensor(data.target)
    train, validation = TensorDataset(images[:1500], labels[:1500]), TensorDataset(images[1500:], labels[1500:])
    return DataLoader(train, batch_size), DataLoader(validation, batch_size)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


class Classifier(L.LightningModule):
    """Plain: builds its network at once, logs its loss, returns it from validation."""

    def __init__(self, scheduler: str = "none"):
        super().__init__()
        self.network = network()
        self.scheduler = scheduler

    def forward(self, images):
        return self.network(images)

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("val/loss", loss)
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1)
        schedulers = {
            "lambda": lambda: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
            "onecycle": lambda: torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=STEPS + 1),
            "cosine": lambda: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS),
            "cyclic": lambda: torch.optim.lr_scheduler.CyclicLR(
                optimizer, 1e-3, 1e-2, cycle_momentum=False, step_size_up=4
            ),
        }
        if self.scheduler == "none":
            return optimizer
        return [optimizer], [{"scheduler": schedulers[self.scheduler](), "interval": "step"}]


class LateClassifier(Classifier):
    """Builds its network in configure_model, as sharded training does."""

    def __init__(self, scheduler: str = "none"):
        super().__init__(scheduler)
        self.network = None

    def configure_model(self):
        if self.network is None:
            self.network = network()


def int4(ignore: tuple[str, ...] = ("*network.4",), **settings) -> QuantizationAwareTraining:
    """INT4 in groups of 32, the last layer of `network()` in float."""
    schemes = uniform(QuantSpec(bits=4, granularity="group", group_size=32), ignore=ignore)
    return QuantizationAwareTraining(schemes, **{"scale_lr": 1e-3, **settings})


def trainer(*callbacks, steps: int = STEPS, **settings) -> L.Trainer:
    defaults = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
    }
    return L.Trainer(max_steps=steps, callbacks=list(callbacks), **{**defaults, **settings})
