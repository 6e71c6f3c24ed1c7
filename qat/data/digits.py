"""Scikit-learn's handwritten digits: 1,797 real images of 8 by 8 pixels that come with a package, not a download.

An image plays the part of a document: splits are made of images, and intervals resample them.
"""

import hashlib
import json
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from qat.data.documents import SPLITS, Document, Split
from qat.data.resumable import ResumableData
from qat.data.windows import ResumableSampler


class Digits(ResumableData):
    """Images of the digits 0 to 9, as batches with `pixel_values` (batch, 1, size, size), `labels` and `document`.

    Args:
        size: pixels a side, a multiple of 8; each of the 8 by 8 is repeated.
        batch_size: images a training batch; held-out batches are as large.
        seed: of the order of the training images.

    Raises:
        ValueError: scikit-learn is not installed, or `size` is no multiple of 8.
    """

    name, unit = "digits", "image"
    seq_len = 1  # one label an image

    def __init__(self, size: int = 16, batch_size: int = 64, seed: int = 0):
        super().__init__()
        if size < 8 or size % 8:
            raise ValueError(f"data.size must be a multiple of 8, which is what the digits have, got {size}")
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.tokenizer: Any = None

    @cached_property
    def _images(self) -> tuple[Tensor, Tensor]:
        """(images, size, size) in [-1, 1] and (images,) classes."""
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise ValueError('data=digits needs scikit-learn: pip install "qat[vision]"') from error
        found: Any = load_digits()
        images = torch.tensor(found.images, dtype=torch.float32) / 8 - 1
        each = self.size // 8
        return images.repeat_interleave(each, 1).repeat_interleave(each, 2), torch.tensor(found.target)

    @cached_property
    def corpus_digest(self) -> str:
        """Identifies images, labels and their order."""
        images, labels = self._images
        return hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()[:16]

    @property
    def digest(self) -> str:
        """Identifies the exact sequence of training batches."""
        parts = [self.corpus_digest, self.batch_size, self.seed]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def setup(self, stage: str | None = None) -> None:
        """Read the images; called by Lightning, and harmless to call twice."""
        self._batches_done = 0  # a new fit; a resumed one is told by load_state_dict
        for split in SPLITS:
            self.split(split)

    def split(self, split: Split) -> "Images":
        """The images of one split; which one an image is in depends on its number alone."""
        images, labels = self._images
        numbers = torch.tensor([n for n in range(len(labels)) if Document(f"digit {n}", "").split == split])
        return Images(images[numbers].unsqueeze(1), labels[numbers])

    def train_dataloader(self) -> DataLoader:
        """Endless batches; the number of steps ends the training, and a resumed run goes on where it was."""
        images = self.split("train")
        sampler = ResumableSampler([len(images)], self.batch_size, self.seed, start=self._batches_done)
        return DataLoader(images, batch_sampler=sampler)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.split("validation"), self.batch_size)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.split("test"), self.batch_size)

    def calibration_dataloader(self) -> DataLoader:
        """What calibration may look at: its own split, never seen in training or in any figure."""
        return DataLoader(self.split("calibration"), self.batch_size)


class Images(Dataset):
    """Images (images, 1, size, size) with their classes (images,); `document` is an image's place in the split."""

    def __init__(self, pixels: Tensor, labels: Tensor):
        self.pixels, self.labels = pixels, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": self.pixels[index], "labels": self.labels[index], "document": torch.tensor(index)}
