"""LoRA as a callback: adapters that are quantized with the weights, on any LightningModule."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from torch import nn

from qat.callbacks.batches import after, restore
from qat.callbacks.quantization import QuantizationAwareTraining, quantization_of
from qat.callbacks.trainable import Trainable
from qat.export.directory import atomic_directory
from qat.insertion import layers
from qat.nn import LAYERS
from qat.scheme import QuantScheme
from qat.structure import owners
from qat.training.lora import add_adapters, check_rank, save_adapter, targeted

log = logging.getLogger(__name__)


class LoRA(Trainable):
    """Trains low-rank adapters and scales, all else frozen: fq(W + (lora_alpha / r) B A) (arXiv 2106.09685).

    What is exported are the codes of that sum, bit for bit as trained.  Comes after `QuantizationAwareTraining` in the
    trainer's callbacks.  The parameters have peft's names and meaning; peft's `lora_dropout` does not exist here, since
    an adapter whose inputs are dropped is not a change of the weight, which alone can be quantized with it.

    Args:
        r: rank; 0 trains all weights, and this callback does nothing.
        lora_alpha: the adapter's product is multiplied by lora_alpha / r.
        target_modules: `all-linear`; last parts of dotted names; or a regular expression for whole names.
        folder: where the adapter is written after training, as peft reads it; None writes none, and nor is one written
            that belongs to other weights than the float model's, which GPTQ and `start_step` change.
        base: name or path of the float model, for that folder.
    """

    def __init__(
        self,
        r: int = 16,
        lora_alpha: float = 32,
        target_modules: str | Sequence[str] = "all-linear",
        folder: Path | None = None,
        base: str = "",
    ):
        if r < 0:
            raise ValueError(f"the rank of LoRA cannot be negative, got r={r}")
        self.r, self.lora_alpha, self.target_modules = r, lora_alpha, target_modules
        self.folder, self.base = folder, base

    @property
    def weights_learn(self) -> bool:
        return self.r == 0

    def check(
        self, model: nn.Module, chosen: Mapping[str, QuantScheme], quantization: QuantizationAwareTraining
    ) -> None:
        """As `Trainable.check`.

        Raises:
            ValueError: a target is not there, or a rank is too large.
        """
        if not self.r:
            return
        modules: dict[str, Any] = {n: model.get_submodule(n) for n in chosen}
        kinds = {n: LAYERS.get(type(m), type(m)).kind for n, m in modules.items()}  # type: ignore[attr-defined]
        linear = {n: m.weight for n, m in modules.items() if kinds[n] == "linear"}
        shapes = {n: weight.shape for n, weight in linear.items() if len(owners(model, weight)) == 1}
        check_rank(self.r, {n: shapes[n] for n in targeted(shapes, self.target_modules)})

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if not self.r:
            return
        quantization_of(trainer, "LoRA")
        if layers(pl_module):
            self._add(trainer, pl_module)
        else:
            after(pl_module, "configure_model", lambda _: self._add(trainer, pl_module))

    def _add(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        model = quantization_of(trainer, "LoRA").quantized(pl_module)
        if any(layer.lora_A is not None for layer in layers(model).values()):
            return  # of an earlier fit
        before = sum(p.numel() for p in model.parameters() if p.requires_grad)
        chosen = add_adapters(model, self.r, self.lora_alpha, self.target_modules)
        now = sum(p.numel() for p in model.parameters() if p.requires_grad)
        log.info("LoRA: %d layers, rank %d: %d of %d parameters learn", len(chosen), self.r, now, before)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self.r or self.folder is None or not trainer.is_global_zero:
            return
        quantization = quantization_of(trainer, "LoRA")
        model, calibration = quantization.quantized(pl_module), quantization.calibration
        if calibration.changes_weights:
            log.info("no adapter is written: %s changed the weights that it belongs to", calibration.name)
            return
        if start := quantization.start_step:
            log.info("no adapter is written: what it learned before step %d went into the weights there", start)
            return
        with atomic_directory(self.folder, sum(p.nbytes for p in model.parameters() if p.requires_grad)) as partial:
            save_adapter(model, partial, self.base)
        log.info("adapter  %s", self.folder)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        restore(pl_module, "configure_model")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")
