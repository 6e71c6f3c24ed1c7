"""Measure a LightningModule on held-out splits, in float and after post-training quantization."""

from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import Any, TypeVar

import lightning as L
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import RandomSampler

from qat.calibration import Calibration
from qat.callbacks.batches import muted, step_losses
from qat.callbacks.quantization import QuantizationAwareTraining
from qat.evaluation.losses import DocumentLosses, evaluate
from qat.fake_quantizer import Stage
from qat.insertion import at_width, insert, quantizers, set_stage, widths

T = TypeVar("T")

Measured = dict[str, DocumentLosses]
"""Losses of one model by split: `validation` (watched while training) and `test` (the figures)."""


class Measure:
    """Runs `validation_step` over the held-out splits of a trainer's data.

    Args:
        trainer: whose datamodule, or validation loader, and precision are used.
        pl_module: is restored to the state it was in after every measurement.
        quantization: the callback that knows what is quantized and how calibration data is run.
    """

    def __init__(self, trainer: L.Trainer, pl_module: L.LightningModule, quantization: QuantizationAwareTraining):
        self.trainer, self.module, self.quantization = trainer, pl_module, quantization

    @classmethod
    def before_fit(
        cls, trainer: L.Trainer, pl_module: L.LightningModule, quantization: QuantizationAwareTraining
    ) -> "Measure":
        """Of a float module that no `fit` has made ready; fake quantizers are inserted into it."""
        trainer.precision_plugin.convert_module(pl_module)
        pl_module.to(trainer.strategy.root_device)
        insert(
            quantization.quantized(pl_module),
            quantization.schemes,
            quantization.estimator,
            quantization.input_estimator,
        )
        return cls(trainer, pl_module, quantization)

    def loaders(self) -> dict[str, Iterable[Any]]:
        """The held-out batches by split; a module without a datamodule has only `validation`.

        As many as `limit_val_batches` and `limit_test_batches` let Lightning see; 0 turns its loops off, and limits
        nothing that is measured around them.

        Raises:
            ValueError: a split has no loader, several, or one that shuffles, or a share of it comes to no batch.
        """
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if data is None:
            loop = self.trainer.fit_loop.epoch_loop.val_loop
            loop.setup_data()
            return {"validation": self._limited("val", self.trainer.val_dataloaders)}
        found = {"validation": self._limited("val", data.val_dataloader())}
        if type(data).test_dataloader is not L.LightningDataModule.test_dataloader:
            found["test"] = self._limited("test", data.test_dataloader())
        return found

    def _limited(self, split: str, loader: Any) -> Iterable[Any]:
        name = f"limit_{split}_batches"
        limit = getattr(self.trainer, name)
        if loader is None:
            raise ValueError(f"no {split}_dataloader to measure on: give fit one, and {name} (it is {limit}) above 0")
        if isinstance(loader, (list, tuple)) and len(loader) == 1:
            loader = loader[0]
        if isinstance(loader, (list, tuple, Mapping, CombinedLoader)):
            raise ValueError(
                f"{split}_dataloader gives several loaders, and documents are numbered through one: join their "
                "datasets (torch.utils.data.ConcatDataset)"
            )
        if isinstance(getattr(loader, "sampler", None), RandomSampler):
            raise ValueError(f"{split}_dataloader shuffles, and models are compared batch by batch: shuffle=False")
        if limit == 0 or (limit == 1 and isinstance(limit, float)):  # 1.0 is all, 1 is one
            return loader
        count = limit if isinstance(limit, int) else int(len(loader) * limit)
        if not count:
            raise ValueError(f"{name}={limit} of {len(loader)} batches is none: raise it")
        return islice(loader, count)

    def __call__(self, label: str, splits: tuple[str, ...] = ("validation", "test")) -> Measured:
        """Losses of the module as it is; `label` names the progress bar."""
        return {
            split: evaluate(
                self.module,
                enumerate(loader),
                losses=self._losses,
                context=self.trainer.precision_plugin.forward_context,
                progress=f"{label}, {split}",
            )
            for split, loader in self.loaders().items()
            if split in splits
        }

    def narrower(self, label: str, splits: tuple[str, ...] = ("validation", "test")) -> dict[str, Measured]:
        """Losses of the module at each nested width below the weights' own, as `<label>_int<bits>`."""
        found = {}
        for bits in widths(self.module)[1:]:
            with at_width(self.module, bits):
                found[f"{label}_int{bits}"] = self(f"{label}, {bits} bits", splits)
        return found

    def _losses(self, module: Any, numbered: tuple[int, Any]) -> Any:
        index, batch = numbered[0], self.trainer.precision_plugin.convert_input(numbered[1])
        with muted(module):
            return step_losses(module.validation_step(batch, index), batch, index)

    def in_float(self, label: str) -> Measured:
        """Losses with all quantizers off."""
        return self._at(Stage.FLOAT, lambda: self(label))

    def post_training(self, label: str, calibration: Calibration) -> Measured:
        """Losses after quantizing the weights as they are with `calibration`, without training.

        A calibration that changes weights costs a copy of them for as long as it is measured.
        """
        return self.calibrated(calibration, lambda: self(label))

    def calibrated(self, calibration: Calibration, measure: Callable[[], T]) -> T:
        """`measure()` after quantizing the weights as they are; they and the scales are put back."""

        def run() -> T:
            self.quantization.calibrate(self.trainer, self.module, calibration)
            set_stage(self.module, Stage.FROZEN)
            return measure()

        weights = {p: p.detach().clone() for p in self._weights()} if calibration.changes_weights else {}
        try:
            return self._at(Stage.FLOAT, run)
        finally:
            with torch.no_grad():
                for parameter, before in weights.items():
                    parameter.copy_(before)

    def _weights(self) -> list[torch.nn.Parameter]:
        scales = {id(part) for q in quantizers(self.module) for part in q.learned}
        return [p for p in self.module.parameters() if id(p) not in scales]

    def _at(self, stage: Stage, run: Callable[[], T]) -> T:
        """`run()` with all quantizers at `stage`; their stages and scales are put back afterwards."""
        assert quantizers(self.module), "quantizers are inserted before anything is measured"
        kept = [(q, q.current_stage, [part.detach().clone() for part in q.learned]) for q in quantizers(self.module)]
        set_stage(self.module, stage)
        try:
            return run()
        finally:
            for quantizer, before, learned in kept:
                quantizer.set_stage(before)
                if learned:
                    quantizer.set_scale(*learned)
