"""Nested widths (MatQuant) as a callback: a step trains the same weights at each (arXiv 2502.06786, eq. 7).

    sum over widths r of lambda_r * loss(model whose weights are the r high bits of the codes)

The module it works on knows nothing of it.  Lightning calls `training_step` at the weights' own width; when it has gone
backward, and its graph is freed, `training_step` runs again with the same batch at the next width, and so on: gradients
add up, and only one width's graph is in memory at a time.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
from torch import Tensor

from qat.callbacks.batches import muted, restore
from qat.callbacks.quantization import quantization_of
from qat.insertion import at_width, layers, nested_widths, widths
from qat.scheme import QuantScheme


class Nested(L.Callback):
    """Trains at all widths of a scheme with `nested` ones; does nothing where no layer has any.

    Comes after `QuantizationAwareTraining` in the trainer's callbacks; a loss that another callback puts into
    `training_step` before (`Distillation`) is that of every width.  Logs `train/loss_int4`, ...

    Args:
        weights: lambda of each width, the scheme's own among them; one that is not named has 1.

    Raises:
        ValueError: a weight is negative.
    """

    def __init__(self, weights: Mapping[int, float] | None = None):
        self.weights = {int(bits): float(weight) for bits, weight in (weights or {}).items()}
        if any(weight < 0 for weight in self.weights.values()):
            raise ValueError(f"weights of widths must not be negative, got {self.weights}")
        self._losses: dict[int, Tensor] = {}

    def check(self, chosen: Mapping[str, QuantScheme]) -> None:
        """Refuse weights that say nothing about `chosen`, the schemes of the layers, before anything long.

        Raises:
            ValueError: a weight is of a width that no layer has, or no width has a weight.
        """
        known = nested_widths(chosen.values())
        if strange := [bits for bits in self.weights if bits not in known]:
            have = f"the widths are {list(known)}" if known else "no layer has nested widths (quant=nested has)"
            raise ValueError(f"callbacks.nested.weights has {strange[0]} bits, and {have}")
        if known and not any(self.weight(bits) for bits in known):
            raise ValueError(f"callbacks.nested.weights is 0 for all of {list(known)}, so nothing would be trained")

    def weight(self, bits: int) -> float:
        """lambda of a width."""
        return self.weights.get(bits, 1.0)

    # -- hooks --------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        quantization_of(trainer, "Nested")
        self.check({name: layer.scheme for name, layer in layers(pl_module).items()})
        if not widths(pl_module):
            return
        if not pl_module.automatic_optimization:
            raise ValueError(
                f"{type(pl_module).__name__} optimizes manually, and nested widths are trained by going backward once "
                "for each: do so in training_step, within qat.at_width(model, bits)"
            )
        self._wrap(trainer, pl_module)

    def _wrap(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        step, backward = pl_module.training_step, pl_module.backward
        own, *narrower = widths(pl_module)
        again: list[Callable[[], Any]] = []

        @functools.wraps(step)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            again[:] = [functools.partial(step, *args, **kwargs)]
            return self._weighted(step(*args, **kwargs), own, 1) if self._active(pl_module) else step(*args, **kwargs)

        @functools.wraps(backward)
        def backward_each(loss: Tensor, *args: Any, **kwargs: Any) -> None:
            backward(loss, *args, **kwargs)
            precision = trainer.precision_plugin
            for bits in (b for b in narrower if self.weight(b) and self._active(pl_module)):
                with at_width(pl_module, bits), precision.train_step_context(), muted(pl_module):
                    result = self._weighted(again[0](), bits, trainer.accumulate_grad_batches)
                    if result is not None:
                        backward(precision.pre_backward(_loss(result), pl_module), *args, **kwargs)

        pl_module.training_step = training_step  # type: ignore[method-assign]
        pl_module.backward = backward_each  # type: ignore[method-assign]

    @staticmethod
    def _active(pl_module: L.LightningModule) -> bool:
        return next(iter(layers(pl_module).values())).weight_quantizer.active

    def _weighted(self, result: Any, bits: int, accumulated: int) -> Any:
        """What `training_step` returned, its loss noted, and then its share of what the step minimises."""
        if result is None:
            return None
        loss = _loss(result)
        self._losses[bits] = loss.detach()
        loss = loss * (self.weight(bits) / accumulated)
        return {**result, "loss": loss} if isinstance(result, dict) else loss

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        for bits, loss in self._losses.items():
            pl_module.log(f"train/loss_int{bits}", loss)
        self._losses = {}

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        restore(pl_module, "training_step", "backward")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")


def _loss(result: Any) -> Tensor:
    return result["loss"] if isinstance(result, dict) else result
