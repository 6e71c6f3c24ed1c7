"""LightningDataModules for language models: plain text and chat, over the same four splits."""

import hashlib
import json
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch.utils.data import ConcatDataset, DataLoader

from qat.data import windows
from qat.data.documents import SPLITS, Document, Split, digest
from qat.data.resumable import ResumableData
from qat.data.windows import ResumableSampler, Windows


class LanguageData(ResumableData):
    """Text documents as windows of tokens.

    Training windows are cut from the concatenated documents of the training split.  Held-out windows
    never cross documents and know which document they are from, so that intervals can resample them.

    Args:
        source: returns the documents, or a ready list of them.
        name: how the summary calls this data.
        seq_len: tokens a window.
        batch_size: windows a training batch; held-out batches are as large.
        seed: of the order of the training windows.
        windows_per_document: windows of validation and test taken from each document at most, so that a few
            long documents do not decide the loss.
        calibration_windows: windows of the calibration split, at most: the first of every document, then the
            second of those that have one, and so on.
        extra: returns more documents for training only; `extra_share` is their share of the windows.

    Raises:
        ValueError: from `setup`, when a split has no usable token (with what to do about it).
    """

    unit = "token"  # what has a label, and a loss

    def __init__(
        self,
        source: Callable[[], list[Document]] | list[Document],
        name: str,
        seq_len: int = 256,
        batch_size: int = 16,
        seed: int = 0,
        windows_per_document: int = 4,
        calibration_windows: int = 128,
        extra: Callable[[], list[Document]] | None = None,
        extra_share: float = 0.0,
    ):
        super().__init__()
        self.source, self.name, self.seq_len, self.batch_size, self.seed = source, name, seq_len, batch_size, seed
        self.windows_per_document, self.calibration_windows = windows_per_document, calibration_windows
        self.extra, self.extra_share = extra, extra_share
        self.tokenizer: Any = None

    _remedy = "more documents or a smaller data.seq_len"

    @cached_property
    def documents(self) -> list[Document]:
        """All documents of the source (not the extra ones), read once."""
        return self.source() if callable(self.source) else list(self.source)

    @cached_property
    def corpus_digest(self) -> str:
        """Identifies the documents: equal digests mean equal texts in equal splits."""
        return digest(self.documents)

    @property
    def digest(self) -> str:
        """Identifies the exact sequence of training batches: corpus, tokenizer, lengths and order."""
        parts = [self.corpus_digest, self.seq_len, self.batch_size, self.seed, self.extra_share]
        total = hashlib.sha256(json.dumps(parts).encode())
        for cut in self._training:  # the tokens themselves: they hold the tokenizer, its template and the extra text
            total.update(cut.input_ids.numpy().tobytes())
            total.update(cut.labels.numpy().tobytes())
        return total.hexdigest()[:16]

    def setup(self, stage: str | None = None) -> None:
        """Tokenize and cut; called by Lightning, and harmless to call twice."""
        self._batches_done = 0  # a new fit; a resumed one is told by load_state_dict
        if self.tokenizer is None:
            raise ValueError(
                f"data {self.name} has no tokenizer: set `data.tokenizer` before use (image classifiers "
                "have none: data=digits)"
            )
        for split in SPLITS:
            self.split(split)

    def split(self, split: Split) -> Windows:
        """The windows of one split, built once."""
        return self._splits[split]

    @cached_property
    def _splits(self) -> dict[Split, Windows]:
        parts = {split: [d for d in self.documents if d.split == split] for split in SPLITS}
        built = {split: self._windows(split, documents) for split, documents in parts.items()}
        for split, cut in built.items():
            if not (cut.labels != windows.IGNORE).any():
                raise ValueError(
                    f"the {split} split of data {self.name} has no usable token ({len(parts[split])} of "
                    f"{len(self.documents)} documents, windows of {self.seq_len} tokens): "
                    f"give {self._remedy}"
                )
        return built

    def _windows(self, split: Split, documents: list[Document]) -> Windows:
        tokens = self._tokenize(documents)
        if split == "train":
            return windows.from_stream(_stream(tokens), self.seq_len)
        if split == "calibration":
            cut = windows.from_documents(tokens, self.seq_len, self._pad_id, None)
            return windows.spread(cut, self.calibration_windows)
        return windows.from_documents(tokens, self.seq_len, self._pad_id, self.windows_per_document)

    @property
    def _pad_id(self) -> int:
        """Padding is masked everywhere, so any valid id does for tokenizers that have none."""
        return self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0

    def _tokenize(self, documents: list[Document]) -> list[list[int]]:
        if not documents:
            return []
        ids = self.tokenizer([d.text for d in documents], add_special_tokens=False, verbose=False)["input_ids"]
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        start = [bos if bos is not None else eos] if (bos is not None or eos is not None) else []
        # Where the end token stands in for a start token, the next document's ends this one: never two in a row.
        end = [eos] if eos is not None and [eos] != start else []
        return [start + tokens + end for tokens in ids]

    def train_dataloader(self) -> DataLoader:
        """Endless batches; the number of steps ends the training, and a resumed run goes on where it was."""
        datasets = self._training
        shares = [1 - self.extra_share, self.extra_share] if len(datasets) > 1 else None
        sampler = ResumableSampler([len(d) for d in datasets], self.batch_size, self.seed, shares, self._batches_done)
        return DataLoader(ConcatDataset(datasets), batch_sampler=sampler)

    @cached_property
    def _training(self) -> list[Windows]:
        """The windows of the training split and, where there are any, those of the extra documents."""
        if self.extra is None or self.extra_share <= 0:
            return [self.split("train")]
        extra = windows.from_stream(_stream(self._tokenize(self.extra())), self.seq_len)
        if not len(extra):
            raise ValueError(f"data {self.name}: data.extra has no window of {self.seq_len} tokens")
        return [self.split("train"), extra]

    def _held_out(self, split: Split) -> DataLoader:
        return DataLoader(self.split(split), batch_size=self.batch_size)

    def val_dataloader(self) -> DataLoader:
        return self._held_out("validation")

    def test_dataloader(self) -> DataLoader:
        return self._held_out("test")

    def calibration_dataloader(self) -> DataLoader:
        """What calibration may look at: its own split, never seen in training or in any figure."""
        return self._held_out("calibration")


def _stream(tokens: list[list[int]]) -> torch.Tensor:
    return torch.tensor([i for document in tokens for i in document], dtype=torch.int64)
