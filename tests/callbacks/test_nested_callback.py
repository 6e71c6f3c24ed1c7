"""Nested widths train on somebody else's LightningModule: one width's graph at a time, exported at each."""

import copy
import weakref

import lightning as L
import pytest
import torch
from digits import STEPS, Classifier, LateClassifier, digits, trainer
from test_quantization import StopAt
from torch.nn import functional as F

from qat.callbacks import Distillation, LoRA, NaNGuard, Nested, QuantizationAwareTraining, Recovery
from qat.fake_quantizer import Stage
from qat.functional import quantize
from qat.insertion import at_width, layers
from qat.scheme import QuantScheme, QuantSpec, uniform
from qat.training import divergence

LOADERS = digits()
WIDTHS = (8, 4, 2)
WEIGHTS = {8: 0.5, 4: 1.0, 2: 2.0}


def quantization(**settings) -> QuantizationAwareTraining:
    spec = QuantSpec(bits=8, nested=(4, 2), granularity="group", group_size=32)
    return QuantizationAwareTraining(
        uniform(spec, ignore=("*network.4",)), **{"scale_lr": 1e-3, "freeze_share": 0.25, **settings}
    )


def fitted(*callbacks, module=None, **settings):
    module = Classifier() if module is None else module
    trainer(*callbacks, **settings).fit(module, LOADERS[0])
    return module


def assert_same_weights(one, other) -> None:
    for (name, value), twin in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(value, twin), name


class ByHand(Classifier):
    """What the callback does, written into the module: section 3.2 of arXiv 2502.06786, a width after another."""

    def __init__(self, taught: bool = False):
        super().__init__()
        self.automatic_optimization, self.teacher = False, [copy.deepcopy(self.network)] if taught else []

    def loss(self, batch):
        for teacher in self.teacher:
            return divergence(self(batch[0]), teacher(batch[0]).detach())
        return F.cross_entropy(self(batch[0]), batch[1])

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        if batch_idx % 2 == 0:
            optimizer.zero_grad()
        for bits in WIDTHS:
            with at_width(self, bits):
                (self.loss(batch) * (WEIGHTS[bits] / 2)).backward()
        if batch_idx % 2 == 1:
            optimizer.step()


def test_a_module_trains_as_if_the_sum_over_widths_were_written_into_it():
    ours = fitted(quantization(), Nested(WEIGHTS), accumulate_grad_batches=2)
    by_hand = fitted(quantization(), module=ByHand())
    assert_same_weights(ours, by_hand)
    assert not torch.equal(ours.network[0].weight, fitted(quantization()).network[0].weight)


def test_a_module_that_builds_its_model_late_is_trained_alike():
    assert_same_weights(fitted(quantization(), Nested(), module=LateClassifier()), fitted(quantization(), Nested()))


def test_a_width_of_weight_zero_costs_no_forward():
    calls = []

    class Counts(Classifier):
        def training_step(self, *args):
            calls.append(layers(self)["network.0"].weight_quantizer.spec.bits)
            return super().training_step(*args)

    fitted(quantization(), Nested({4: 0}), module=Counts(), steps=2)
    assert calls == [8, 2, 8, 2]


def test_until_quantization_starts_a_step_is_the_modules_own(tmp_path):
    stop, late = StopAt(3, tmp_path / "x.ckpt"), quantization(start_step=3)
    assert_same_weights(fitted(late, Nested(WEIGHTS), stop), fitted(late, stop))


class Alive(L.Callback):
    """Counts, at each forward, how many activations of other forwards are still held by a graph."""

    def __init__(self):
        self.held, self.seen = [], []

    def on_fit_start(self, trainer, pl_module):
        def look(_, __, output):
            self.held.append(sum(ref() is not None for ref in self.seen))
            self.seen.append(weakref.ref(output))

        pl_module.network[1].register_forward_hook(look)


class AllAtOnce(Classifier):
    """The same sum with one backward for all widths."""

    def training_step(self, batch, batch_idx):
        losses = []
        for bits in WIDTHS:
            with at_width(self, bits):
                losses.append(F.cross_entropy(self(batch[0]), batch[1]))
        return sum(losses)


def test_only_one_widths_graph_is_in_memory():
    ours, at_once = Alive(), Alive()
    fitted(quantization(), Nested(), ours, steps=2)
    fitted(quantization(), at_once, module=AllAtOnce(), steps=2)
    assert ours.held == [0] * 6
    assert at_once.held == [0, 1, 2] * 2


@pytest.mark.parametrize("stop", [2, 5, 10])
def test_a_run_stopped_and_resumed_ends_with_the_same_bits(stop, tmp_path):
    data, settings = digits(batch_size=1500)[0], {"start_step": 3}
    whole, first, second = (Classifier("onecycle") for _ in range(3))
    trainer(quantization(**settings), Nested(), max_epochs=-1).fit(whole, data)
    stopped = StopAt(stop, tmp_path / "x.ckpt")
    trainer(quantization(**settings), Nested(), stopped, max_epochs=-1).fit(first, data)
    resumed = trainer(quantization(**settings), Nested(), max_epochs=-1)
    resumed.fit(second, data, ckpt_path=tmp_path / "x.ckpt", weights_only=False)
    assert not torch.equal(first.network[0].weight, whole.network[0].weight)
    assert_same_weights(whole, second)


def test_every_width_is_taught_by_the_float_model():
    ours = fitted(Distillation(submodule="network"), quantization(), Nested(WEIGHTS), accumulate_grad_batches=2)
    assert_same_weights(ours, fitted(quantization(), module=ByHand(taught=True)))
    assert "training_step" not in vars(ours) and "backward" not in vars(ours)


def test_the_teacher_answers_once_for_all_widths_of_a_batch():
    asked, teacher = [], Classifier().network
    teacher.register_forward_hook(lambda *call: asked.append(call[1][0]))
    fitted(Distillation(submodule="network", teacher=teacher), quantization(), Nested(WEIGHTS), steps=3)
    assert len(asked) == 3 and len({id(images) for images in asked}) == 3


def test_losses_of_all_widths_are_logged_and_those_of_the_narrow_fall():
    seen = []

    class Reads(L.Callback):
        def on_train_batch_end(self, trainer, *args):
            seen.append({k: float(v) for k, v in trainer.callback_metrics.items()})

    fitted(quantization(), Nested(), Reads(), steps=60, max_epochs=-1)
    assert {"train/loss", "train/loss_int8", "train/loss_int4", "train/loss_int2"} == seen[0].keys()
    assert seen[0]["train/loss"] == seen[0]["train/loss_int8"]
    assert seen[-1]["train/loss_int2"] < 0.5 * seen[0]["train/loss_int2"]


def test_all_widths_are_measured_before_while_and_after_training():
    recovery = Recovery()
    module = Classifier()
    run = trainer(quantization(), Nested(), recovery, limit_val_batches=None, val_check_interval=6)
    run.fit(module, *LOADERS)
    assert {"sliced_int4", "sliced_int2", "qat", "qat_int4", "qat_int2"} <= recovery.models.keys()
    rows = recovery.history
    assert [row["step"] for row in rows] == [6, 12]
    for bits in (4, 2):
        assert rows[-1][f"qat_int{bits}_loss"] == recovery.models[f"qat_int{bits}"]["validation"].loss
        with at_width(module, bits), torch.no_grad():
            batches = [(len(y), F.cross_entropy(module.eval()(x), y)) for x, y in LOADERS[1]]
        expected = sum(n * float(loss) for n, loss in batches) / sum(n for n, _ in batches)
        assert rows[-1][f"qat_int{bits}_loss"] == pytest.approx(expected, rel=1e-6)  # float32 means of batches
    assert rows[-1]["qat_int2_loss"] < recovery.models["sliced_int2"]["validation"].loss


def test_adapters_are_in_the_codes_of_every_width():
    module = fitted(quantization(), LoRA(r=4, target_modules="all-linear"), Nested())
    layer = layers(module)["network.0"]
    assert layer.lora_B.abs().sum() > 0
    for bits in WIDTHS:
        noted = []
        layer.weight_quantizer.recorder = lambda codes, scale, weight, to=noted: to.append((codes, scale))
        with at_width(module, bits), torch.no_grad():
            module(LOADERS[0].dataset.tensors[0][:4])
        codes, scale = noted[0]
        assert torch.equal(codes, quantize(layer.adapted, scale, layer.scheme.weight.at(bits)))


def test_a_loss_that_is_not_finite_stops_at_any_width():
    class Breaks(Classifier):
        def training_step(self, *args):
            factor = torch.inf if layers(self)["network.0"].weight_quantizer.spec.bits == 2 else 1
            return super().training_step(*args) * factor

    with pytest.raises(ValueError, match="the loss of step 0 is inf"):
        fitted(quantization(), Nested(), NaNGuard(), module=Breaks())


@pytest.mark.parametrize(
    ("weights", "scheme", "message"),
    [
        ({3: 1.0}, "w8.4.2a16-g32", r"has 3 bits, and the widths are \[8, 4, 2\]"),
        ({4: 1.0}, "w8a16-g32", "no layer has nested widths"),
        ({8: 0, 4: 0, 2: 0}, "w8.4.2a16-g32", r"is 0 for all of \[8, 4, 2\]"),
    ],
)
def test_weights_that_say_nothing_about_the_scheme_are_refused(weights, scheme, message):
    with pytest.raises(ValueError, match=message):
        Nested(weights).check({"layer": QuantScheme.parse(scheme)})


def test_a_negative_weight_is_refused():
    with pytest.raises(ValueError, match="must not be negative"):
        Nested({4: -1})


def test_what_cannot_go_backward_more_than_once_is_refused():
    with pytest.raises(ValueError, match="optimizes manually"):
        fitted(quantization(), Nested(), module=ByHand())


def test_a_scheme_that_nests_nothing_is_trained_as_ever():
    spec = QuantSpec(bits=4, granularity="group", group_size=32)
    plain = QuantizationAwareTraining(uniform(spec), scale_lr=1e-3)
    again = QuantizationAwareTraining(uniform(spec), scale_lr=1e-3)
    assert_same_weights(fitted(plain), fitted(again, Nested()))
    assert next(iter(layers(fitted(plain)).values())).weight_quantizer.current_stage == Stage.FROZEN


class Dies(Classifier):
    """Counts what it is asked, and fails once."""

    def __init__(self, at: int):
        super().__init__()
        self.at, self.asked = at, 0

    def training_step(self, batch, batch_idx):
        self.asked += 1
        if self.asked == self.at:
            raise RuntimeError("the network was unplugged")
        return super().training_step(batch, batch_idx)


def test_a_fit_after_one_that_failed_trains_as_if_it_were_the_first():
    module = Dies(at=10)
    with pytest.raises(RuntimeError, match="unplugged"):
        fitted(Distillation(0.5, submodule="network"), quantization(), Nested(WEIGHTS), module=module)
    assert not {"training_step", "backward", "configure_optimizers"} & set(vars(module))
    before = module.asked
    fitted(
        Distillation(0.5, submodule="network", teacher=Classifier().network),
        quantization(),
        Nested(WEIGHTS),
        module=module,
    )
    assert module.asked - before == STEPS * len(WIDTHS)
