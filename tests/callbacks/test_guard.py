"""NaN stops a run before the weights take it in; Ctrl-C saves and a resumed run ends with the same bits."""

import os
import signal

import lightning as L
import pytest
import torch
from digits import Classifier, digits, int4, trainer
from torch.utils.data import DataLoader
from transformers import BatchEncoding

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


class BadGradient(L.Callback):
    """A finite loss whose gradient is not, at step 3."""

    def on_after_backward(self, trainer, pl_module):
        if trainer.global_step == 3:
            pl_module.network[2].weight.grad[1, 2] = torch.inf


def test_a_gradient_that_is_not_finite_is_named_and_never_reaches_the_checkpoint(tmp_path):
    path, clean = tmp_path / "last.ckpt", Classifier()
    data = digits(batch_size=1500)[0]
    with pytest.raises(ValueError, match=r"the gradient of network.2.weight at step 3 holds NaN"):
        trainer(BadGradient(), NaNGuard(), SafeExit(path, "again"), max_epochs=-1).fit(Classifier(), data)
    trainer(steps=3, max_epochs=-1).fit(clean, data)
    saved = torch.load(path, weights_only=False)["state_dict"]
    assert all(torch.equal(saved[name], value) for name, value in clean.state_dict().items())


def test_weights_that_are_not_finite_do_not_replace_the_last_checkpoint(tmp_path):
    class Spoilt(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            with torch.no_grad():
                pl_module.network[0].weight[0, 0] = torch.nan
            raise ValueError("spoilt")

    path = tmp_path / "last.ckpt"
    path.write_bytes(b"good")
    with pytest.raises(ValueError, match="spoilt"):
        trainer(Spoilt(), SafeExit(path, "again")).fit(Classifier(), digits()[0])
    assert path.read_bytes() == b"good"


@pytest.mark.parametrize("at,step,kept", [(7, 3, b"good"), (8, 4, None)], ids=["amid a step", "between steps"])
def test_a_fault_amid_an_accumulated_step_does_not_save_a_state_without_its_gradients(tmp_path, at, step, kept):
    class Fault(L.Callback):
        seen = 0

        def on_train_batch_start(self, trainer, pl_module, *_):
            if self.seen == at:
                raise ValueError("fault")
            self.seen += 1

    path = tmp_path / "last.ckpt"
    path.write_bytes(b"good")
    run = trainer(SafeExit(path, "again"), Fault(), max_epochs=-1, accumulate_grad_batches=2)
    with pytest.raises(ValueError, match="fault"):
        run.fit(Classifier(), digits(batch_size=100)[0])
    assert run.global_step == step
    assert path.read_bytes() == kept if kept else torch.load(path, weights_only=False)["global_step"] == step


class Interrupt(L.Callback):
    """Presses Ctrl-C in the middle of a batch, counted from 0."""

    def __init__(self, at):
        self.at, self.seen = at, 0

    def on_after_backward(self, trainer, pl_module):
        if self.seen == self.at:
            os.kill(os.getpid(), signal.SIGINT)
        self.seen += 1


@pytest.mark.parametrize("accumulate,at", [(1, 4), (2, 8), (2, 9)], ids=["plain", "first half", "second half"])
def test_ctrl_c_saves_says_how_to_resume_and_loses_nothing(tmp_path, caplog, accumulate, at):
    path, data = tmp_path / "last.ckpt", digits(batch_size=1500 // accumulate)[0]  # one step an epoch
    whole, stopped, resumed = (Classifier("cosine") for _ in range(3))
    before = signal.getsignal(signal.SIGINT)
    settings = {"max_epochs": -1, "accumulate_grad_batches": accumulate}
    trainer(int4(), **settings).fit(whole, data)
    with pytest.raises(SystemExit):  # Lightning's way out after KeyboardInterrupt
        trainer(int4(), SafeExit(path, "python train.py resume=true"), Interrupt(at), **settings).fit(stopped, data)
    assert "go on with\n  python train.py resume=true" in caplog.text
    assert signal.getsignal(signal.SIGINT) in (before, signal.SIG_IGN, signal.default_int_handler)
    signal.signal(signal.SIGINT, before)
    assert torch.load(path, weights_only=False)["global_step"] == 5  # the step under way was finished
    trainer(int4(), **settings).fit(resumed, data, ckpt_path=path, weights_only=False)
    for (name, value), other in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(value, other), name


def test_a_gradient_too_large_for_its_norm_stops_the_run_in_words():
    class Enormous(L.Callback):
        def on_after_backward(self, trainer, pl_module):
            pl_module.network[2].weight.grad.fill_(1e38)  # finite, and its square is not

    module, run = Classifier(), trainer(Enormous(), NaNGuard())
    with pytest.raises(ValueError, match=r"the gradient of network.2.weight at step 0 has a norm beyond its dtype"):
        run.fit(module, digits(batch_size=1500)[0])


def test_nan_in_a_tokenizers_batch_is_named():
    batch = BatchEncoding({"pixels": torch.tensor([1.0, torch.nan])})
    with pytest.raises(ValueError, match=r"field batch\['pixels'\] holds NaN"):
        NaNGuard().on_train_batch_start(trainer(), Classifier(), batch, 0)
