from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from qat.data.windows import IGNORE
from qat.tasks.causal_lm import CausalLM


def batch(labels, mask=None):
    labels = torch.tensor(labels)
    return {
        "input_ids": torch.arange(labels.numel()).view(labels.shape) % 200,
        "labels": labels,
        "attention_mask": torch.ones(labels.shape, dtype=torch.bool) if mask is None else torch.tensor(mask).bool(),
        "document": torch.arange(len(labels)),
    }


def test_losses_are_sums_over_labelled_positions(tiny_llama):
    task = CausalLM(tiny_llama(), lr=1e-3)
    given = batch([[5, 6, IGNORE, 7], [IGNORE, 8, IGNORE, IGNORE]])
    sums = task.losses(given)
    logits = task(given).double()
    expected = [
        sum(-F.log_softmax(logits[i, j], -1)[t] for j, t in enumerate(row) if t != IGNORE).item()
        for i, row in enumerate(given["labels"].tolist())
    ]
    assert sums.tokens.tolist() == [3, 1]
    # float32 log-softmax over 256 logits, three terms of about 6 nats.
    assert sums.nll.tolist() == pytest.approx(expected, abs=3 * 6 * 2**-20)
    best = logits.argmax(-1)
    assert sums.correct.tolist() == ((best == given["labels"]) & (given["labels"] != IGNORE)).sum(1).tolist()


def test_the_most_likely_tokens_are_counted(tiny_llama):
    task = CausalLM(tiny_llama(), lr=1e-3)
    given = batch([[0, 0, 0, 0]])
    given["labels"] = task(given).argmax(-1)
    assert task.losses(given).correct.tolist() == [4]


def test_padding_changes_no_loss(tiny_llama):
    task = CausalLM(tiny_llama(), lr=1e-3)
    short = batch([[5, 6, 7]])
    padded = batch([[5, 6, 7, IGNORE, IGNORE]], [[1, 1, 1, 0, 0]])
    # With a mask attention takes another kernel: float32 sums in another order.
    assert task.losses(padded).nll.item() == pytest.approx(task.losses(short).nll.item(), rel=1e-5)
    padded["input_ids"][0, 3:] = 99
    changed = task.losses(padded).nll.item()
    assert changed == pytest.approx(task.losses(short).nll.item(), rel=1e-5)


def test_the_training_loss_is_the_mean_over_labels(tiny_llama):
    task = CausalLM(tiny_llama(), lr=1e-3)
    task.log = lambda *args, **kwargs: None
    given = batch([[5, 6, IGNORE, 7], [IGNORE, 8, IGNORE, IGNORE]])
    sums = task.losses(given)
    mean = (sums.nll.sum() / sums.tokens.sum()).item()
    assert task.training_step(given, 0).item() == pytest.approx(mean, rel=1e-5)


def test_the_rate_rises_holds_and_falls(tiny_llama):
    task = CausalLM(tiny_llama(), lr=1e-3, warmup=0.1, decay=0.5, final=0.2)
    task._trainer = SimpleNamespace(estimated_stepping_batches=100)
    rates = [task.rate(step) for step in range(101)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10:51] == pytest.approx([1.0] * 41)
    assert rates[75] == pytest.approx(0.6)
    assert rates[100] == pytest.approx(0.2)
    assert all(a >= b for a, b in pairwise(rates[50:]))


def test_only_matrices_decay(tiny_llama):
    task = CausalLM(tiny_llama(), lr=1e-3, weight_decay=0.1)
    task._trainer = SimpleNamespace(estimated_stepping_batches=100)
    matrices, vectors = task.configure_optimizers()["optimizer"].param_groups
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)
    assert {p.dim() for p in matrices["params"]} == {2}
    assert {p.dim() for p in vectors["params"]} == {1}
    assert len(matrices["params"]) + len(vectors["params"]) == len(list(task.parameters()))
