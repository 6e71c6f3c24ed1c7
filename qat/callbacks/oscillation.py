"""Damping and freezing of oscillating weights, as a callback on any LightningModule."""

import math
from typing import Any

import lightning as L
import torch

from qat.callbacks.trainable import Trainable
from qat.estimators import STE, Estimator
from qat.insertion import layers
from qat.training.oscillation import Freezing, damping_gradient


class Oscillation(L.Callback):
    """Keeps weights from jumping to and fro between two codes (arXiv 2203.11086; `qat.training.oscillation`).

    Comes after `QuantizationAwareTraining` in the trainer's callbacks.  The damping joins the gradient once a step,
    whatever the accumulation and the loss scaling, and before gradients are clipped.

    Args:
        damping: lambda of the last step; it grows from 0 by half a cosine over the run.  0: no damping.
        freezing: how often a weight may turn back, as the moving average of 0 and 1 a step, before it is frozen.
            None: no freezing, and no memory.
        momentum: m of the moving averages, 1 / m being the steps they remember.

    Raises:
        ValueError: a number out of its range.
    """

    def __init__(self, damping: float = 0.0, freezing: float | None = None, momentum: float = 0.01):
        if not damping >= 0:
            raise ValueError(f"damping must not be negative, got {damping}")
        if freezing is not None and not 0 < freezing < 1:
            raise ValueError(f"freezing is a frequency between 0 and 1, or null, got {freezing}")
        if not 0 < momentum <= 1:
            raise ValueError(f"momentum must be in (0, 1], got {momentum}")
        self.damping, self.freezing, self.momentum = damping, freezing, momentum
        self._layers: dict[str, Freezing] = {}
        self._loaded: dict[str, Any] = {}
        self._step = 0  # optimizer steps before the batch under way

    def check(self, estimator: Estimator, weights_learn: bool) -> None:
        """Refuse what cannot be damped or frozen before anything long.

        Args:
            estimator: of the weights.
            weights_learn: whether weights do: not under LoRA or scales-only training.

        Raises:
            ValueError: the estimator's scales follow the weights: holding the largest at its code shrinks its scale;
                or weights do not learn.
        """
        if not weights_learn and (self.damping or self.freezing is not None):
            raise ValueError(
                "damping and freezing move weights, and under LoRA or scales-only training weights stay as they are: "
                "use trainable=all, or callbacks.oscillation.damping=0 and callbacks.oscillation.freezing=null"
            )
        if self.freezing is not None and isinstance(estimator, STE) and estimator.follow is not None:
            raise ValueError(
                f"freezing holds codes under a scale, and {estimator} takes its scales from the weights: use "
                "estimator=lsq or ste, or damping"
            )

    @property
    def frozen_share(self) -> float:
        """Share of the quantized weights that are frozen."""
        masks = [layer.frozen for layer in self._layers.values()]
        return float(sum(int(m.sum()) for m in masks) / max(sum(m.numel() for m in masks), 1))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        learn = all(c.weights_learn for c in trainer.callbacks if isinstance(c, Trainable))  # type: ignore[attr-defined]
        for layer in layers(pl_module).values():
            self.check(layer.weight_quantizer.estimator, weights_learn=learn and layer.lora_A is None)
        if self.damping and math.isinf(trainer.estimated_stepping_batches):
            raise ValueError("damping grows until training ends: tell the trainer when, by max_steps")

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._step = trainer.global_step
        if self.freezing is None:
            return
        for name, layer in layers(pl_module).items():
            if name not in self._layers and layer.weight_quantizer.active and layer.weight.requires_grad:
                self._layers[name] = Freezing(layer, self.freezing, self.momentum)
                if name in self._loaded:
                    self._layers[name].load_state_dict(self._loaded.pop(name))

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if not self.damping:
            return
        progress = trainer.global_step / trainer.estimated_stepping_batches
        strength = self.damping * (1 - math.cos(math.pi * progress)) / 2
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for layer in layers(pl_module).values():
            weight = layer.weight
            if layer.weight_quantizer.active and weight.grad is not None and id(weight) in held:
                layer.as_matrix(weight.grad).add_(damping_gradient(layer).to(weight.grad.dtype), alpha=strength)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step > self._step:
            for layer in self._layers.values():
                layer.step()

    def state_dict(self) -> dict[str, Any]:
        return {"layers": {name: layer.state_dict() for name, layer in self._layers.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._layers, self._loaded = {}, dict(state_dict["layers"])
