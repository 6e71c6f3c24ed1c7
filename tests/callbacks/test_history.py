"""A training's own record of itself."""

import time
from itertools import islice

import pytest
import torch
from digits import Classifier, digits, trainer
from torch.nn import functional as F

from qat.callbacks.history import TrainHistory


class Trainer:
    global_step, log_every_n_steps, accumulate_grad_batches = 1, 10, 1


def seen_after(history: TrainHistory, *labels: torch.Tensor) -> int:
    for batch in labels:
        history.on_train_batch_end(Trainer(), None, {"loss": 0.0}, {"labels": batch}, 0)
    return history.seen


def test_what_is_counted_has_a_label():
    masked = torch.tensor([[1, 2, -100], [-100, -100, 3]])
    assert seen_after(TrainHistory(0.0), masked, torch.tensor([7, 8])) == 5


def test_a_resumed_training_counts_all_its_sessions(monkeypatch):
    monkeypatch.setattr(time, "monotonic", lambda: 500.0)
    first = TrainHistory(started=400.0)
    seen_after(first, torch.ones(4))
    second = TrainHistory(started=490.0)
    second.load_state_dict(first.state_dict())
    assert seen_after(second, torch.ones(3)) == 7
    assert second.seconds == 110.0


def test_a_step_of_several_batches_has_one_row_with_their_mean_loss():
    losses = []

    class Noting(Classifier):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            losses.append(loss.item())
            return loss

    history = TrainHistory(0.0)
    run = trainer(history, steps=4, accumulate_grad_batches=3, log_every_n_steps=2)
    run.fit(Noting(), digits()[0])
    assert [row["step"] for row in history.rows] == [2, 4]
    means = [sum(losses[first : first + 3]) / 3 for first in (3, 9)]
    assert [row["loss"] for row in history.rows] == pytest.approx(means, rel=1e-6)


def test_the_last_step_of_an_epoch_may_have_fewer_batches():
    history = TrainHistory(0.0)
    run = trainer(history, steps=2, limit_train_batches=4, accumulate_grad_batches=3, log_every_n_steps=1)
    module = Classifier()
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.0)
    run.fit(module, digits()[0])
    with torch.no_grad():
        losses = [float(F.cross_entropy(module(x), y)) for x, y in islice(digits()[0], 4)]
    assert [row["loss"] for row in history.rows] == pytest.approx([sum(losses[:3]) / 3, losses[3]], rel=1e-6)
