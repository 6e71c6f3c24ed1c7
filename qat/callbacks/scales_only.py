"""Scales-only training as a callback: packed codes are held, and nothing but the scales learns."""

import logging
from collections.abc import Mapping
from typing import Any

import lightning as L
from torch import nn

from qat.callbacks.batches import after, restore
from qat.callbacks.quantization import QuantizationAwareTraining, quantization_of
from qat.callbacks.trainable import Trainable
from qat.estimators import LSQ
from qat.insertion import layers
from qat.nn import LAYERS, FakeQuantLinear
from qat.scheme import QuantScheme
from qat.training import scale_parameters

log = logging.getLogger(__name__)


class ScalesOnly(Trainable):
    """Trains the scales of codes that calibration chose, all else frozen (PEQA, arXiv 2305.14152; E2E-QP, 2407.11062).

    Right after calibration the float weights of quantized layers are dropped, layer by layer, for their packed codes:
    what is held while training is about the exported model, and gradients and optimizer state of the scales alone.
    Where inputs have a learned scale, it learns, too.
    """

    @property
    def weights_learn(self) -> bool:
        return False

    def check(
        self, model: nn.Module, chosen: Mapping[str, QuantScheme], quantization: QuantizationAwareTraining
    ) -> None:
        """As `Trainable.check`.

        Raises:
            ValueError: a layer is not a plain linear one, has an adapter or nested widths, the estimator learns no
                scale of held codes, scales would freeze, or training would start in float.
        """
        modules = {name: model.get_submodule(name) for name in chosen}
        other = [n for n, m in modules.items() if LAYERS.get(type(m), type(m)) is not FakeQuantLinear]
        if other:
            raise ValueError(
                f"scales-only training holds the codes of plain linear layers, and {len(other)} quantized layers are "
                f"of other kinds, such as {other[0]} ({type(modules[other[0]]).__name__}): leave them in float (a rule "
                "with null, quant.kinds=[linear]), or use trainable=all"
            )
        if adapted := [n for n, m in modules.items() if getattr(m, "lora_A", None) is not None]:
            raise ValueError(f"{adapted[0]} has an adapter, which scales-only training cannot hold: use LoRA or it")
        if nested := [n for n, scheme in chosen.items() if scheme.weight.nested]:
            raise ValueError(f"{nested[0]} has nested widths, and codes are held at one: use trainable=all or lora")
        if not isinstance(quantization.estimator, LSQ):
            raise ValueError(
                f"{quantization.estimator} learns no scale of held codes, and nothing else learns under scales-only "
                "training: use estimator=lsq or lsq_log"
            )
        if quantization.freeze_share:
            raise ValueError(
                f"freeze_share={quantization.freeze_share} freezes the scales at the end, and under scales-only "
                "training nothing else learns: callbacks.quantization.freeze_share=0"
            )
        if quantization.start_step:
            raise ValueError(
                f"start_step={quantization.start_step} trains in float first, and under scales-only training no float "
                "weight learns: callbacks.quantization.start_step=0"
            )

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        quantization_of(trainer, "ScalesOnly")
        if layers(pl_module):
            self._freeze(trainer, pl_module)
        else:
            after(pl_module, "configure_model", lambda _: self._freeze(trainer, pl_module))

    def _freeze(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        quantization = quantization_of(trainer, "ScalesOnly")
        model = quantization.quantized(pl_module)
        self.check(model, {name: layer.scheme for name, layer in layers(model).items()}, quantization)
        scales = {id(p) for p in scale_parameters(model)}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in scales)
        log.info("scales only: %d scales learn", sum(p.numel() for p in scale_parameters(model)))

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        for layer in layers(pl_module).values():
            if layer.weight_quantizer.packed is None:  # a checkpoint brings its own
                layer.hold()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        restore(pl_module, "configure_model")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")
