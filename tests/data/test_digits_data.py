"""Scikit-learn's digits as data of a run."""

import builtins

import pytest
import torch
from sklearn.datasets import load_digits

from qat.data.digits import Digits
from qat.data.documents import SPLITS


def test_the_splits_partition_the_images():
    data, found = Digits(), load_digits()
    images = torch.cat([data.split(split).pixels for split in SPLITS])
    assert images.shape == (1797, 1, 16, 16)
    # Every pixel stands for one of 8 by 8, scaled from 0..16 to -1..1.
    originals = ((images[:, 0, ::2, ::2] + 1) * 8).flatten(1)
    assert sorted(originals.tolist()) == sorted(torch.tensor(found.data, dtype=torch.float32).tolist())
    shares = [len(data.split(split)) / 1797 for split in SPLITS]
    # A share of 1,797 hashed images has a standard deviation of 0.010 at most; three of them.
    assert shares == pytest.approx([0.76, 0.04, 0.08, 0.12], abs=0.03)


def test_labels_belong_to_their_images():
    data, found = Digits(size=8), load_digits()
    known = {tuple(pixels): int(label) for pixels, label in zip(found.data.tolist(), found.target, strict=True)}
    for row in data.split("test"):
        assert known[tuple(((row["pixel_values"] + 1) * 8).flatten().tolist())] == row["labels"]


def test_a_resumed_loader_goes_on_where_it_was():
    data = Digits(seed=3)
    loader = iter(data.train_dataloader())
    batches = [next(loader)["document"] for _ in range(5)]
    data.load_state_dict({"batches": 3})
    assert torch.equal(next(iter(data.train_dataloader()))["document"], batches[3])


def test_the_digest_knows_the_order_and_not_what_is_held_out():
    assert Digits().digest == Digits().digest != Digits(seed=1).digest
    assert Digits().digest != Digits(batch_size=32).digest and Digits().corpus_digest != Digits(size=8).corpus_digest


def test_a_size_that_repeats_no_whole_pixel_is_refused():
    with pytest.raises(ValueError, match=r"data\.size must be a multiple of 8"):
        Digits(size=20)


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    real = builtins.__import__

    def missing(name, *rest):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ValueError, match=r'pip install "qat\[vision\]"'):
        Digits().setup()
