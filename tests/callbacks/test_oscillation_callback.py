"""Weights whose targets lie between two codes: straight-through gradients push them to and fro for ever."""

from typing import ClassVar

import lightning as L
import pytest
import torch
from digits import trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers.pytorch_utils import Conv1D

from qat.callbacks import LoRA, Oscillation, QuantizationAwareTraining
from qat.estimators import LSQ, STE
from qat.functional import quantize
from qat.insertion import layers
from qat.scheme import QuantSpec, uniform
from qat.training.oscillation import Turns

SIZE, STEPS = 8, 120
SPEC = QuantSpec(bits=4, granularity="channel", scale_dtype="float32")
CODES = torch.randint(-6, 7, (SIZE, SIZE), generator=torch.Generator().manual_seed(0)).float()


class Ones:
    """Scales of 1."""

    name: ClassVar[str] = "ones"
    changes_weights: ClassVar[bool] = False

    def check(self, model):
        pass

    def __call__(self, model, run, folder=None):
        pass


class Between(L.LightningModule):
    """Half the squared distance to weights at 0.4 between two codes, from 0.3."""

    def __init__(self, pull: float = 1.0, transposed: bool = False):
        super().__init__()
        self.layer, self.pull = nn.Linear(SIZE, SIZE, bias=False), pull
        if transposed:
            self.layer = Conv1D(SIZE, SIZE)
            self.layer.bias.requires_grad_(False)
        with torch.no_grad():
            self.layer.weight.copy_((CODES.T if transposed else CODES) + 0.3)

    def training_step(self, batch, batch_idx):
        return 0.5 * self.pull * (self.layer(batch[0]) - (CODES + 0.4).T).square().sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Count(L.Callback):
    """How many codes turned back in the second half of the run."""

    def __init__(self):
        self.turns, self.turned = Turns(CODES), 0

    def on_train_batch_end(self, trainer, pl_module, *args):
        layer = pl_module.layer
        codes = quantize(layer.weight.detach(), layer.weight_quantizer.scale.detach(), SPEC)
        turned = int(self.turns(codes).sum())
        self.turned += turned if trainer.global_step > STEPS // 2 else 0


def fit(oscillation, module=None, estimator=None, *more, steps=STEPS, path=None, **settings):
    module = module or Between()
    quantization = QuantizationAwareTraining(uniform(SPEC), Ones(), estimator or STE(), freeze_share=0.0)
    data = DataLoader(TensorDataset(torch.eye(SIZE).repeat(4, 1)), SIZE)
    run = trainer(quantization, oscillation, *more, steps=steps, max_epochs=-1, **settings)
    run.fit(module, data, ckpt_path=path, weights_only=False)
    return module


@pytest.fixture(scope="module")
def undamped():
    count = Count()
    fit(Oscillation(), None, None, count)
    return count.turned / (SIZE * SIZE * STEPS / 2)


def test_the_case_oscillates(undamped):
    assert undamped > 0.25  # of the weights, every step


def test_damping_ends_the_oscillation(undamped):
    count = Count()
    fit(Oscillation(damping=2.0), None, None, count)
    # Above lambda = 0.4 the weights rest inside their bins; the schedule passes that before half of the run.
    assert count.turned / (SIZE * SIZE * STEPS / 2) < undamped / 10


def test_freezing_ends_the_oscillation_at_the_nearer_code():
    oscillation, count = Oscillation(freezing=0.1), Count()
    module = fit(oscillation, None, None, count)
    assert oscillation.frozen_share == 1
    assert count.turned == 0
    assert torch.equal(module.layer.weight.detach(), CODES)


def test_damping_joins_the_gradient_once_a_step_however_many_batches_it_has():
    moved = [fit(Oscillation(damping=0.5), Between(pull=0.0), steps=10, accumulate_grad_batches=n) for n in (1, 4)]
    assert torch.equal(*(m.layer.weight for m in moved))
    assert (moved[0].layer.weight - CODES - 0.3).abs().min() > 0.01


@pytest.mark.parametrize("settings", [{"damping": 0.5}, {"freezing": 0.1}], ids=["damping", "freezing"])
def test_a_transposed_weight_ends_where_the_linear_layers_does(settings):
    linear, transposed = (fit(Oscillation(**settings), Between(transposed=t), steps=40) for t in (False, True))
    assert torch.equal(linear.layer.weight, transposed.layer.weight.T)
    undamped = fit(Oscillation(), Between(transposed=True), steps=40)
    assert not torch.equal(undamped.layer.weight, transposed.layer.weight)


@pytest.mark.parametrize("settings", [{"damping": 0.5}, {"freezing": 0.1}], ids=["damping", "freezing"])
def test_under_lora_it_is_refused_since_weights_do_not_move(settings):
    data = DataLoader(TensorDataset(torch.eye(SIZE)), SIZE)

    def run(oscillation):
        quantization = QuantizationAwareTraining(uniform(SPEC), Ones(), LSQ())
        trainer(quantization, LoRA(r=2), oscillation, steps=2, max_epochs=-1).fit(Between(), data)

    with pytest.raises(ValueError, match="damping and freezing move weights, and under LoRA"):
        run(Oscillation(**settings))
    run(Oscillation())


def test_a_weight_that_does_not_learn_is_left_alone():
    module = Between()
    module.layer.weight.requires_grad_(False)
    oscillation = Oscillation(damping=0.5, freezing=0.1)
    fit(oscillation, module, LSQ())
    assert torch.equal(module.layer.weight, CODES + 0.3)
    assert not torch.equal(module.layer.weight_quantizer.scale, torch.ones(SIZE, 1))
    assert oscillation.frozen_share == 0


class StopAt(L.Callback):
    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


@pytest.mark.parametrize("stop", [7, 30])
def test_a_resumed_run_freezes_the_same_weights(stop, tmp_path):
    # Scales learn too, so a frozen weight moves with its scale.
    settings = {"freezing": 0.1, "damping": 0.1, "momentum": 0.02}
    whole = fit(Oscillation(**settings), None, LSQ(), steps=60)
    fit(Oscillation(**settings), None, LSQ(), StopAt(stop, tmp_path / "x.ckpt"), steps=60)
    resumed = fit(Oscillation(**settings), None, LSQ(), steps=60, path=tmp_path / "x.ckpt")
    for (name, value), other in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(value, other), name


def test_freezing_under_scales_that_follow_the_weights_is_refused():
    with pytest.raises(ValueError, match="freezing holds codes under a scale, and STE"):
        fit(Oscillation(freezing=0.1), None, STE(follow="absmax"))
    Oscillation(damping=1.0).check(STE(follow="absmax"), weights_learn=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"damping": -1.0}, "damping must not be negative"),
        ({"freezing": 1.5}, "freezing is a frequency between 0 and 1"),
        ({"momentum": 0.0}, "momentum must be in"),
    ],
)
def test_numbers_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Oscillation(**settings)


def test_nothing_is_kept_where_nothing_is_frozen():
    oscillation = Oscillation(damping=1.0)
    module = fit(oscillation, steps=3)
    assert layers(module) and oscillation.state_dict() == {"layers": {}}
