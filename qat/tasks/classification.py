"""Image classification for any transformers image classifier.  Knows nothing of quantization."""

import torch
from torch import Tensor
from torch.nn import functional as F

from qat.evaluation.losses import Losses
from qat.tasks.adamw import AdamWTask


class ImageClassification(AdamWTask):
    """An image classifier, trained by cross-entropy; the model is called with `pixel_values`, and gives `logits`."""

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Logits (batch, classes).

        Raises:
            ValueError: the batch holds no images, or the model reads something else.
        """
        if "pixel_values" not in batch:
            raise ValueError("task=classification needs images, and this data has none: data=digits")
        reads = getattr(self.model, "main_input_name", "pixel_values")
        if reads != "pixel_values":
            kind = type(self.model).__name__
            raise ValueError(
                f"task=classification needs an image classifier, and {kind} reads {reads}: model=digits_cnn"
            )
        return self.model(pixel_values=batch["pixel_values"]).logits

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch).float(), batch["labels"])
        self.log("train/loss", loss, prog_bar=True)
        return loss

    @torch.no_grad()
    def losses(self, batch: dict[str, Tensor]) -> Losses:
        """Losses of one batch, an image each, every one with one label: what every figure of a run is computed from."""
        labels = batch["labels"]
        logits = self(batch).float()
        nll = F.cross_entropy(logits, labels, reduction="none")
        correct = logits.argmax(-1) == labels
        return Losses(nll.double(), correct.double(), torch.ones_like(labels), batch["document"])
