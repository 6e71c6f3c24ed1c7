"""Dropout draws the same numbers in a run that was stopped and in one that was not, and in a run and its control."""

import lightning as L
import torch
from digits import Classifier, digits, int4, trainer
from torch import nn

from qat.callbacks import RandomState


class Dropped(Classifier):
    def __init__(self):
        super().__init__()
        self.network.insert(2, nn.Dropout(0.5))


class SaveAt(L.Callback):
    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


def fit(*callbacks, draws: int = 0, **more):
    module = Dropped()
    torch.rand(draws)  # what a measurement before training takes
    trainer(int4(ignore=()), RandomState(7), *callbacks, max_epochs=-1).fit(module, digits(batch_size=1500)[0], **more)
    return module.state_dict()


def equal(a, b) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a | b)


def test_a_resumed_run_with_dropout_ends_with_the_same_bits(tmp_path):
    fit(SaveAt(5, tmp_path / "x.ckpt"))
    resumed = fit(draws=3, ckpt_path=tmp_path / "x.ckpt", weights_only=False)
    assert equal(fit(), resumed)


def test_what_is_measured_before_training_does_not_move_the_dropout():
    assert equal(fit(), fit(draws=11))


def test_another_seed_is_another_run():
    module = Dropped()
    trainer(int4(ignore=()), RandomState(8), max_epochs=-1).fit(module, digits(batch_size=1500)[0])
    assert not equal(fit(), module.state_dict())
