"""NaN stops a run before the weights take it in; Ctrl-C saves and a resumed run ends with the same bits."""

import os
import signal

import lightning as L
import pytest
import torch
from digits import Classifier, digits, int4, trainer
from torch.utils.data import DataLoader

from qat.callbacks import NaNGuard, SafeExit


def poisoned(at: int) -> DataLoader:
    """One batch an epoch; epoch `at` (from 0) holds a NaN pixel."""

    class Data(torch.utils.data.IterableDataset):
        epoch = -1

        def __iter__(self):
            Data.epoch += 1
            images, labels = next(iter(digits(batch_size=1500)[0]))
            images = images.clone()
            if Data.epoch == at:
                images[3, 7] = torch.nan
            yield images, labels

    return DataLoader(Data(), batch_size=None)


def test_a_batch_with_nan_is_named_and_the_weights_are_saved_as_they_were_before_it(tmp_path):
    module, clean = Classifier(), Classifier()
    path = tmp_path / "last.ckpt"
    with pytest.raises(ValueError, match=r"\(step 3\): field batch\[0\] holds NaN"):
        trainer(NaNGuard(), SafeExit(path, "again"), max_epochs=-1).fit(module, poisoned(at=3))
    trainer(steps=3, max_epochs=-1).fit(clean, digits(batch_size=1500)[0])
    saved = torch.load(path, weights_only=False)["state_dict"]
    for name, value in clean.state_dict().items():
        assert torch.equal(saved[name], value), name


def test_a_loss_that_is_not_finite_stops_before_the_weights_change():
    class Diverges(Classifier):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * (torch.inf if self.global_step == 2 else 1.0)

    module = Diverges()
    with pytest.raises(ValueError, match="the loss of step 2 is inf"):
        trainer(NaNGuard(), max_epochs=-1).fit(module, digits(batch_size=1500)[0])
    assert all(torch.isfinite(p).all() for p in module.parameters())


class Interrupt(L.Callback):
    """Presses Ctrl-C in the middle of a step."""

    def __init__(self, step):
        self.step = step

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_saves_says_how_to_resume_and_loses_nothing(tmp_path, caplog):
    path, data = tmp_path / "last.ckpt", digits(batch_size=1500)[0]
    whole, stopped, resumed = (Classifier("cosine") for _ in range(3))
    before = signal.getsignal(signal.SIGINT)
    trainer(int4(), max_epochs=-1).fit(whole, data)
    with pytest.raises(SystemExit):  # Lightning's way out after KeyboardInterrupt
        trainer(int4(), SafeExit(path, "python train.py resume=true"), Interrupt(4), max_epochs=-1).fit(stopped, data)
    assert "go on with\n  python train.py resume=true" in caplog.text
    assert signal.getsignal(signal.SIGINT) in (before, signal.SIG_IGN, signal.default_int_handler)
    signal.signal(signal.SIGINT, before)
    assert torch.load(path, weights_only=False)["global_step"] == 5  # the step under way was finished
    trainer(int4(), max_epochs=-1).fit(resumed, data, ckpt_path=path, weights_only=False)
    for (name, value), other in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(value, other), name
