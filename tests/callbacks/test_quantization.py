"""The callback on somebody else's module: inserted, scheduled, with its own learning rate, resumable to the bit."""

from types import SimpleNamespace

import lightning as L
import pytest
import torch
from digits import STEPS, Classifier, LateClassifier, digits, int4, trainer
from torch import nn

from qat.calibration import CALIBRATIONS, RangeCalibration, Reconstruction
from qat.callbacks import QuantizationAwareTraining, Recovery
from qat.estimators import DSQ, LSQ, STE
from qat.fake_quantizer import Stage
from qat.functional import store_scale
from qat.insertion import insert, layers, quantizers
from qat.scheme import QuantSpec, uniform
from qat.training import parameter_groups


class Watch(L.Callback):
    """Notes stage, scales and learning rates before and after every step."""

    def __init__(self):
        self.stages, self.scales, self.rates = [], [], []

    def on_train_batch_end(self, trainer, pl_module, *args):
        quantizer = quantizers(pl_module)[0]
        self.stages.append(quantizer.current_stage)
        self.scales.append(quantizer.scale.detach().clone())

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        scales = {id(q.scale) for q in quantizers(pl_module)}
        ours = [g for g in optimizer.param_groups if any(id(p) in scales for p in g["params"])]
        rest = [g for g in optimizer.param_groups if not any(id(p) in scales for p in g["params"])]
        self.rates.append(([g["lr"] for g in ours], [g["lr"] for g in rest], [g["weight_decay"] for g in ours]))


def fit(module, callback, steps=STEPS, **settings):
    watch = Watch()
    run = trainer(callback, watch, steps=steps, **settings)
    run.fit(module, digits()[0])
    return watch, run


@pytest.mark.parametrize("kind", [Classifier, LateClassifier], ids=["eager", "configure_model"])
def test_a_module_that_knows_nothing_of_quantization_trains_through_it(kind):
    module = kind()
    watch, _ = fit(module, int4())
    assert sorted(layers(module)) == ["network.0", "network.2"]
    assert type(module.network[4]) is nn.Linear
    assert watch.stages[0] == Stage.TRAIN and watch.stages[-1] == Stage.FROZEN
    assert not torch.equal(watch.scales[0], watch.scales[5])


def test_a_model_that_inserted_in_configure_model_is_adopted():
    scheme = uniform(QuantSpec(bits=8, granularity="channel"))

    class Inserts(LateClassifier):
        def configure_model(self):
            super().configure_model()
            if not layers(self):
                insert(self, scheme)

    module = Inserts()
    fit(module, int4())
    assert {layer.scheme.weight.bits for layer in layers(module).values()} == {8}  # theirs, not the callback's INT4
    assert len(layers(module)) == 3


@pytest.mark.parametrize("scheduler", ["none", "lambda", "onecycle", "cosine"])
def test_scales_follow_the_schedule_at_their_own_rate_without_decay(scheduler):
    watch, _ = fit(Classifier(scheduler), int4(scale_lr=1e-4, freeze_share=0.0))
    for ours, rest, decay in watch.rates:
        assert len(ours) == 1 and len(rest) == 1
        assert ours[0] == pytest.approx(rest[0] * 1e-2, rel=1e-6)  # 1e-4 against the module's 1e-2
        assert decay == [0.0]
    if scheduler != "none":
        assert len({ours[0] for ours, _, _ in watch.rates}) > STEPS // 2


def test_a_scheduler_that_overwrites_the_scales_rate_is_refused():
    with pytest.raises(ValueError, match="CyclicLR gives every parameter group the same rate"):
        fit(Classifier("cyclic"), int4())


def test_groups_that_the_module_built_itself_are_left_alone():
    class Own(Classifier):
        def configure_optimizers(self):
            return torch.optim.SGD(parameter_groups(self, lr=1e-2, scale_lr=5e-4, weight_decay=0.1))

    watch, _ = fit(Own(), int4(scale_lr=1e-4))
    assert watch.rates[0][0] == [5e-4]


def test_scales_that_no_optimizer_holds_are_refused():
    class Forgets(Classifier):
        def configure_optimizers(self):
            return torch.optim.SGD([p for n, p in self.named_parameters() if n.endswith("weight")], lr=1e-2)

    with pytest.raises(ValueError, match="2 learned scales are in no optimizer"):
        fit(Forgets(), int4())


def test_the_schedule_is_float_then_train_then_frozen():
    module = Classifier()
    watch, _ = fit(module, int4(start_step=3, freeze_share=0.25))
    assert watch.stages == [Stage.FLOAT] * 3 + [Stage.TRAIN] * 6 + [Stage.FROZEN] * 3
    frozen = store_scale(watch.scales[8], int4().schemes.rules["*"].weight)  # after step 9, the last that moves them
    assert all(torch.equal(frozen, later) for later in watch.scales[9:])
    assert not torch.equal(watch.scales[3], watch.scales[8])


def test_until_the_start_step_training_is_bit_identical_to_plain_training(tmp_path):
    quantized, plain = Classifier(), Classifier()
    trainer(int4(start_step=6), StopAt(6, tmp_path / "x.ckpt")).fit(quantized, digits()[0])
    trainer(steps=6).fit(plain, digits()[0])
    for name, value in plain.state_dict().items():
        assert torch.equal(quantized.state_dict()[name], value), name


@pytest.mark.parametrize(
    "schedule",
    [
        {"start_step": 10},
        {"start_step": 9},
        {"start_step": 5, "freeze_share": 0.5},
        {"start_step": 10, "freeze_share": 0},
    ],
    ids=str,
)
def test_a_schedule_that_trains_nothing_through_the_quantizers_is_refused_before_the_first_step(schedule):
    module = Classifier()
    with pytest.raises(ValueError, match=rf"start_step={schedule['start_step']} leaves no step that trains through"):
        fit(module, int4(**schedule), steps=10)
    assert module.trainer.global_step == 0


def test_one_step_through_the_quantizers_is_a_schedule():
    watch, _ = fit(Classifier(), int4(start_step=8), steps=10)
    assert watch.stages == [Stage.FLOAT] * 8 + [Stage.TRAIN, Stage.FROZEN]


class Halves(Classifier):
    """Two optimizers, each of half of the network, step once a batch."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(half.parameters(), lr=1e-2) for half in (self.network[:2], self.network[2:])]


def test_steps_of_several_optimizers_are_counted_together_and_not_by_epochs():
    watch, _ = fit(Halves(), int4(start_step=8, freeze_share=0.25), steps=24)
    assert watch.stages == [Stage.FLOAT] * 4 + [Stage.TRAIN] * 5 + [Stage.FROZEN] * 3
    with pytest.raises(ValueError, match=r"2 optimizers share trainer\.global_step.*give the trainer max_steps"):
        fit(Halves(), int4(), steps=-1, max_epochs=1)


def test_quantization_starts_from_the_weights_of_that_step():
    module = Classifier()
    fit(module, int4(start_step=6, scale_lr=0.0, freeze_share=0.0), steps=7)
    started = module.network[0].weight_quantizer.scale.detach().clone()
    reference = Classifier()
    trainer(steps=6).fit(reference, digits()[0])
    insert(reference, int4().schemes)
    RangeCalibration("mse")(reference, lambda: None)
    assert torch.equal(started, reference.network[0].weight_quantizer.scale)


def test_an_estimator_that_follows_the_weights_freezes_where_they_were():
    module = Classifier()
    fit(module, int4(estimator=STE(follow="absmax"), freeze_share=0.5))
    scale = module.network[0].weight_quantizer.scale
    assert not torch.equal(scale, torch.ones_like(scale))


BORDERS = [1, 2, 3, 4, 8, 9, 10, 11]  # start at 3, freeze at 9: before, at and after each


class StopAt(L.Callback):
    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


@pytest.mark.parametrize("stop", BORDERS)
@pytest.mark.parametrize("estimator", [LSQ(relative=True), DSQ(), STE(follow="absmax")], ids=["lsq_log", "dsq", "ste"])
def test_a_run_stopped_and_resumed_ends_with_the_same_bits(stop, estimator, tmp_path):
    settings = {"start_step": 3, "freeze_share": 0.25, "estimator": estimator}
    whole, first, second = (Classifier("onecycle") for _ in range(3))
    data = digits(batch_size=1500)[0]  # one batch an epoch: torch's DataLoader forgets where in an epoch it was
    trainer(int4(**settings), max_epochs=-1).fit(whole, data)
    trainer(int4(**settings), StopAt(stop, tmp_path / "x.ckpt"), max_epochs=-1).fit(first, data)
    trainer(int4(**settings), max_epochs=-1).fit(second, data, ckpt_path=tmp_path / "x.ckpt", weights_only=False)
    assert any(
        not torch.equal(a, b) for a, b in zip(first.state_dict().values(), whole.state_dict().values(), strict=True)
    )
    for (name, value), resumed in zip(whole.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(value, resumed), name


@pytest.mark.parametrize("kind", [Classifier, LateClassifier])
def test_a_checkpoint_is_validated_by_a_new_trainer(kind, tmp_path):
    module, loaders = kind(), digits()
    run = trainer(int4(), limit_val_batches=4, val_check_interval=2)
    run.fit(module, *loaders)
    run.save_checkpoint(tmp_path / "x.ckpt")
    (trained,) = run.validate(module, loaders[1], verbose=False)
    fresh = trainer(int4(), limit_val_batches=4)
    (loaded,) = fresh.validate(kind(), loaders[1], ckpt_path=tmp_path / "x.ckpt", weights_only=False, verbose=False)
    assert loaded == trained


def test_evaluation_does_not_move_the_schedule():
    module = Classifier()
    callback = int4(start_step=3)
    watch = Watch()
    loaders = digits()
    trainer(callback, watch, limit_val_batches=4, val_check_interval=2).fit(module, *loaders)
    assert watch.stages[:4] == [Stage.FLOAT] * 3 + [Stage.TRAIN]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_scales_stay_float32_masters_in_every_precision(precision):
    module = Classifier()
    _, run = fit(module, int4(scale_lr=1e-4), precision=precision)
    for layer in layers(module).values():
        assert layer.weight_quantizer.scale.dtype == torch.float32
        state = run.optimizers[0].state[layer.weight_quantizer.scale]
        assert state["exp_avg"].dtype == torch.float32
    expected = torch.bfloat16 if precision == "bf16-true" else torch.float32
    assert module.network[0].weight.dtype == expected


def test_calibration_that_needs_data_asks_for_it():
    calibration = RangeCalibration("weighted_mse", importance=1.0)
    with pytest.raises(ValueError, match="calibration weighted_mse needs data: give the datamodule"):
        fit(Classifier(), int4(calibration=calibration))
    module = Classifier()
    fit(module, int4(calibration=calibration, calibration_loader=digits()[1]), steps=2)
    assert layers(module)["network.0"].weight_quantizer.active


def test_a_relative_estimator_moves_all_scales_by_like_factors():
    module = Classifier()
    watch, _ = fit(module, int4(estimator=LSQ(relative=True), scale_lr=0.02, freeze_share=0.0), steps=2)
    octaves = (watch.scales[1] / watch.scales[0]).log2().abs()
    # A second step of Adam is at most (1 - b1) / sqrt(1 - b2) = 3.2 learning rates, and none depends on the scale.
    assert 0 < octaves.max() <= 0.02 * 3.2
    assert octaves.median() > 0.02 / 10


def test_the_rate_of_scales_is_the_estimators_unless_one_is_given():
    rates = [int4(scale_lr=lr, estimator=e).scale_lr for lr, e in
             ((None, LSQ()), (None, LSQ(relative=True)), (0.5, LSQ(relative=True)))]  # fmt: skip
    assert rates == [1e-4, 5e-3, 0.5]


def test_dsq_hardens_from_the_start_step_to_the_end():
    seen = []

    class Sharpness(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            seen.append(quantizers(pl_module)[0].estimator.sharpness)

    trainer(int4(estimator=DSQ(start=1.0, end=4.0), start_step=4), Sharpness()).fit(Classifier(), digits()[0])
    assert seen == pytest.approx([1.0] * 4 + [4 ** (n / 8) for n in range(8)])


def test_an_estimator_that_hardens_needs_to_know_when_training_ends():
    with pytest.raises(ValueError, match=r"DSQ\(.* changes until training ends: tell the trainer when, by max_steps"):
        trainer(int4(estimator=DSQ()), steps=-1, max_epochs=-1).fit(Classifier(), digits()[0])


def test_a_decay_of_scales_is_theirs_alone_and_not_for_logarithms():
    watch, _ = fit(Classifier(), int4(scale_decay=0.25), steps=2)
    assert watch.rates[0][2] == [0.25]
    with pytest.raises(ValueError, match="a relative estimator learns their logarithms"):
        int4(scale_decay=0.25, estimator=LSQ(relative=True))


class Decaying(Classifier):
    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=5e-3)
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1 / (1 + epoch))]


def test_training_through_int4_learns_the_digits_as_float_does():
    (data, held_out), accuracy = digits(), {}
    images, labels = held_out.dataset.tensors
    for name, callbacks in {"float": [], "int4": [int4()]}.items():
        module = Decaying()
        trainer(*callbacks, steps=120, max_epochs=-1).fit(module, data)
        accuracy[name] = float((module(images).argmax(1) == labels).float().mean())
    assert accuracy["float"] > 0.85  # chance is 0.1
    assert accuracy["int4"] > accuracy["float"] - 0.04  # twice the standard error of 297 images near 0.9


def test_the_module_gets_its_methods_back():
    module = LateClassifier()
    fit(module, int4())
    assert "configure_optimizers" not in vars(module) and "configure_model" not in vars(module)


def test_training_in_several_processes_is_refused_and_validation_is_not():
    module, several = Classifier(), SimpleNamespace(world_size=2)
    with pytest.raises(ValueError, match=r"the trainer has 2 processes.* Use devices=1, and accumulate_grad_batches"):
        int4().setup(several, module, "fit")
    assert not layers(module)
    int4().setup(several, module, "validate")
    assert layers(module)


@pytest.mark.parametrize("calibration", ["mse", "gptq", "adaround"])
def test_what_the_user_froze_in_evaluation_mode_stays_so(calibration):
    class Frozen(Classifier):
        def __init__(self):
            super().__init__()
            self.network = nn.Sequential(*self.network[:2], nn.BatchNorm1d(64), nn.Dropout(0.5), *self.network[2:])
            self.network[2:4].eval()
            self.modes = set()

        def training_step(self, batch, batch_idx):
            self.modes.add(tuple(part.training for part in self.network))
            return super().training_step(batch, batch_idx)

    module, train = Frozen(), digits(500)[0]
    chosen = CALIBRATIONS.get(calibration) or Reconstruction(steps=2)
    quantization = int4(("*network.6",), calibration=chosen, calibration_loader=train)
    trainer(quantization, Recovery(), steps=3, limit_val_batches=1).fit(module, train, digits(500)[1])
    assert len(module.modes) == 1 and module.modes.pop()[2:4] == (False, False)
    assert [part.training for part in module.network[2:4]] == [False, False] and module.network[
        2
    ].num_batches_tracked == 0


def test_a_bad_freeze_share_is_refused():
    with pytest.raises(ValueError, match="freeze_share must be in"):
        QuantizationAwareTraining(int4().schemes, freeze_share=1.0)
