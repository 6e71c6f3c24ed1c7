"""From token ids to batches: windows of a fixed length, and a sampler that knows where it stopped."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

IGNORE = -100  # the label of a position that has no loss (torch's and transformers' convention)


@dataclass(frozen=True)
class Windows(Dataset):
    """Equally long token windows.

    Attributes:
        input_ids: (windows, tokens), int64.
        labels: (windows, tokens), int64; `labels[t]` is the token predicted *at* position t (already
            shifted by one), or -100 where there is no loss.
        attention_mask: (windows, tokens), bool; False on padding.
        document: (windows,), int64; the index of the document a window is cut from, or -1 where
            a window spans several.
    """

    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor
    document: Tensor

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {
            "input_ids": self.input_ids[index],
            "labels": self.labels[index],
            "attention_mask": self.attention_mask[index],
            "document": self.document[index],
        }


def from_stream(stream: Tensor, length: int) -> Windows:
    """Cut one long stream of tokens (tokens,) into windows of `length` without overlap; a tail is dropped."""
    count = max(len(stream) - 1, 0) // length
    ids = stream[: count * length].view(count, length)
    labels = stream[1 : count * length + 1].view(count, length)
    return Windows(ids, labels, torch.ones_like(ids, dtype=torch.bool), torch.full((count,), -1))


def from_documents(documents: list[list[int]], length: int, pad_id: int, most: int | None) -> Windows:
    """Cut each document on its own, padding its last window; at most `most` windows of each document."""
    rows, origin = [], []
    for index, ids in enumerate(documents):
        starts = range(0, len(ids) - 1, length)
        for start in starts[:most]:
            rows.append((ids[start : start + length], ids[start + 1 : start + length + 1]))
            origin.append(index)
    return from_pairs(rows, origin, length, pad_id)


def from_pairs(rows: list[tuple[list[int], list[int]]], origin: list[int], length: int, pad_id: int) -> Windows:
    """Pad (input ids, shifted labels) pairs on the right to `length`."""
    ids = torch.full((len(rows), length), pad_id)
    labels = torch.full((len(rows), length), IGNORE)
    mask = torch.zeros((len(rows), length), dtype=torch.bool)
    for row, (inputs, targets) in enumerate(rows):
        ids[row, : len(inputs)] = torch.tensor(inputs)
        mask[row, : len(inputs)] = True
        labels[row, : len(targets)] = torch.tensor(targets)
    return Windows(ids, labels, mask, torch.tensor(origin, dtype=torch.int64))


def spread(cut: Windows, most: int) -> Windows:
    """At most `most` windows, as evenly from all documents as these are long: the first of each, the second of each...

    Args:
        cut: the windows of a document beside each other, in order.
        most: how many.
    """
    first = torch.searchsorted(cut.document, cut.document)
    place = torch.arange(len(cut)) - first
    chosen = place.sort(stable=True).indices[:most]
    return Windows(cut.input_ids[chosen], cut.labels[chosen], cut.attention_mask[chosen], cut.document[chosen])


class ResumableSampler(Sampler[list[int]]):
    """Endless shuffled batches; batch number b is a pure function of (seed, b), so a run resumes anywhere.

    Args:
        sizes: how many windows each source has; sources are numbered through in this order.
        shares: the share of every batch that each source gets in expectation; None: by size.
        batch_size: windows a batch.
        seed: of the order.
        start: the number of the first batch to yield.
    """

    def __init__(
        self,
        sizes: list[int],
        batch_size: int,
        seed: int,
        shares: list[float] | None = None,
        start: int = 0,
    ):
        self.sizes, self.batch_size, self.seed, self.start = sizes, batch_size, seed, start
        self.shares = torch.tensor(shares if shares else [float(s) for s in sizes])

    def _permutation(self, source: int, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed + 7_919 * source + 104_729 * epoch)
        return torch.randperm(self.sizes[source], generator=generator)

    def __iter__(self) -> Iterator[list[int]]:
        offsets = [sum(self.sizes[:i]) for i in range(len(self.sizes))]
        taken = [0] * len(self.sizes)
        cached: dict[int, tuple[int, Tensor]] = {}
        chooser = torch.Generator().manual_seed(self.seed)
        batch = 0
        while True:  # earlier batches are replayed without loading their data: microseconds each
            indices = []
            for source in torch.multinomial(self.shares, self.batch_size, True, generator=chooser).tolist():
                epoch, position = divmod(taken[source], self.sizes[source])
                if cached.get(source, (-1,))[0] != epoch:
                    cached[source] = (epoch, self._permutation(source, epoch))
                indices.append(offsets[source] + int(cached[source][1][position]))
                taken[source] += 1
            if batch >= self.start:
                yield indices
            batch += 1
