"""Export at the end of training, proven against the last training forward."""

import logging
from pathlib import Path
from typing import Any

import lightning as L
import torch

from qat.callbacks.batches import muted
from qat.callbacks.quantization import QuantizationAwareTraining
from qat.evaluation.losses import to_device
from qat.export import Artifact, export
from qat.export.fold import record
from qat.insertion import at_width, widths
from qat.structure import keep_modes

log = logging.getLogger(__name__)


class Export(L.Callback):
    """Folds, packs, writes and verifies the quantized model when training has ended.

    Args:
        directory: of the artifact; must not exist.  A model with nested widths has one a width in it, `int4` and so on.
        tokenizer: saved beside the model, or None.
        dtype: of the tensors that are not quantized (`bfloat16`, ...), or None for the trained one.
        bits: the only one of nested widths that is written; None writes all.

    After training `artifacts` says what was written: `packed`, or `packed_int4` at a narrower width that is nested;
    `exported` is the widest.
    """

    def __init__(self, directory: str | Path, tokenizer: Any = None, dtype: str | None = None, bits: int | None = None):
        self.directory, self.tokenizer, self.bits = Path(directory), tokenizer, bits
        self.dtype = getattr(torch, dtype) if dtype is not None else None
        self.artifacts: dict[str, Artifact] = {}
        self._batch: Any = None

    @property
    def exported(self) -> Artifact | None:
        """The widest that was written; None before training has ended."""
        return next(iter(self.artifacts.values()), None)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._batch = batch

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        quantization = next(c for c in trainer.callbacks if isinstance(c, QuantizationAwareTraining))  # type: ignore[attr-defined]
        model = quantization.quantized(pl_module)
        if not (chosen := widths(model)):
            self.artifacts["packed"] = self._export(trainer, pl_module, quantization, self.directory)
            return
        for bits in chosen if self.bits is None else (self.bits,):
            name = "packed" if bits == chosen[0] else f"packed_int{bits}"
            with at_width(model, bits):
                self.artifacts[name] = self._export(trainer, pl_module, quantization, self.directory / f"int{bits}")

    def _export(
        self, trainer: L.Trainer, pl_module: L.LightningModule, quantization: QuantizationAwareTraining, directory: Path
    ) -> Artifact:
        model = quantization.quantized(pl_module)
        # The weights moved once more after the last batch (if there was any), so one more training-mode forward, with
        # the precision and the code path of training, is what the artifact has to equal.
        with record(model) as recorded, keep_modes(pl_module):
            batch = self._batch if self._batch is not None else next(iter(trainer.datamodule.train_dataloader()))  # type: ignore[attr-defined]
            pl_module.train()
            for norm in (m for m in pl_module.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)):
                norm.eval()  # the statistics of one batch more would be no part of what was measured
            with torch.no_grad(), trainer.precision_plugin.forward_context(), muted(pl_module):
                quantization.forward(pl_module, trainer.precision_plugin.convert_input(to_device(batch, pl_module)))
        exported = export(model, recorded, directory, tokenizer=self.tokenizer, dtype=self.dtype)
        cached = f" and keys and values of {len(of)} attentions" if (of := exported.attentions) else ""
        log.info("exported to %s, proven bit-exact for %d layers%s", directory, len(exported.layers), cached)
        return exported
