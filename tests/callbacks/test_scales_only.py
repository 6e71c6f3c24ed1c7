"""Scales-only training on somebody else's LightningModule: codes stay calibration's, scales learn, a run resumes."""

import lightning as L
import pytest
import torch
from digits import Classifier, LateClassifier, digits, int4, trainer
from test_quantization import StopAt, Watch
from torch import nn

from qat.callbacks import LoRA, Oscillation, ScalesOnly
from qat.estimators import LSQ, STE
from qat.functional import quantize, store_scale
from qat.insertion import layers, plan
from qat.packing import unpack
from qat.scheme import QuantScheme

LOADERS = digits()


def quantization(**settings):
    return int4(**{"freeze_share": 0.0, **settings})


def codes(layer) -> torch.Tensor:
    return unpack(layer.weight_quantizer.packed, 4, layer.in_features)


class Start(L.Callback):
    """Notes the scales right after calibration."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if not hasattr(self, "scales"):
            self.scales = {n: layer.weight_quantizer.scale.detach().clone() for n, layer in layers(pl_module).items()}


@pytest.mark.parametrize("kind", [Classifier, LateClassifier])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_codes_stay_what_calibration_chose_and_only_scales_learn(kind, accumulate):
    module, start, untouched = kind(), Start(), Classifier().network
    trainer(quantization(), ScalesOnly(), start, accumulate_grad_batches=accumulate).fit(module, LOADERS[0])
    for name, layer in layers(module).items():
        weight = untouched.get_submodule(name.removeprefix("network.")).weight.detach()
        spec = layer.scheme.weight
        wanted = quantize(weight, store_scale(start.scales[name], spec), spec)
        assert torch.equal(codes(layer).float(), wanted), name
        assert not torch.equal(layer.weight_quantizer.scale, start.scales[name]), name
        assert layer.weight.numel() == 0
    for name in ("0.bias", "2.bias", "4.weight", "4.bias"):
        assert torch.equal(module.network.get_parameter(name), untouched.get_parameter(name)), name


def test_the_loss_falls_as_it_learns():
    module, images = Classifier(), LOADERS[1].dataset.tensors
    before = nn.functional.cross_entropy(module(images[0]), images[1])
    trainer(quantization(scale_lr=5e-3), ScalesOnly(), steps=60).fit(module, LOADERS[0])
    after = nn.functional.cross_entropy(module(images[0]), images[1])
    assert after < 0.9 * before


class OnlyWhatLearns(Classifier):
    """Gives its optimizer what learns, as `AdamWTask` does: a group that holds nothing but scales."""

    def configure_optimizers(self):
        learning = [p for p in self.parameters() if p.requires_grad]
        groups = [{"params": learning, "weight_decay": 0.1}, {"params": []}]
        optimizer = torch.optim.AdamW(groups, lr=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)]


def test_scales_alone_in_a_group_train_at_their_own_rate_and_decay():
    watch = Watch()
    trainer(quantization(scale_lr=3e-4), ScalesOnly(), watch).fit(OnlyWhatLearns(), LOADERS[0])
    assert {(tuple(ours), tuple(decay)) for ours, _, decay in watch.rates} == {((3e-4,), (0.0,))}


@pytest.mark.parametrize("stop", [1, 5])
@pytest.mark.parametrize("relative", [False, True])
def test_a_run_stopped_and_resumed_ends_with_the_same_bits(stop, relative, tmp_path):
    data = digits(batch_size=1500)[0]
    whole, first, second = OnlyWhatLearns(), OnlyWhatLearns(), OnlyWhatLearns()

    def run(module, *more, **settings):
        callbacks = quantization(estimator=LSQ(relative=relative)), ScalesOnly(), *more
        trainer(*callbacks, max_epochs=-1).fit(module, data, **settings)

    run(whole)
    run(first, StopAt(stop, tmp_path / "x.ckpt"))
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.mul_(2)  # what is resumed does not come from the weights
    run(second, ckpt_path=tmp_path / "x.ckpt", weights_only=False)
    held = whole.state_dict()
    assert any(name.endswith("packed") for name in held)
    for (name, value), resumed in zip(held.items(), second.state_dict().values(), strict=True):
        assert torch.equal(value, resumed), name
    saved = torch.load(tmp_path / "x.ckpt", weights_only=False)["optimizer_states"][0]["state"]
    assert len(saved) == len(layers(whole))


def test_a_second_fit_goes_on_with_the_codes_it_has():
    module = Classifier()
    trainer(quantization(), ScalesOnly(), steps=2).fit(module, LOADERS[0])
    before = {name: codes(layer) for name, layer in layers(module).items()}
    trainer(quantization(), ScalesOnly(), steps=2).fit(module, LOADERS[0])
    assert all(torch.equal(codes(layer), before[name]) for name, layer in layers(module).items())


REFUSED = {
    "freeze": ({"freeze_share": 0.1}, "callbacks.quantization.freeze_share=0"),
    "float start": ({"start_step": 3}, "callbacks.quantization.start_step=0"),
    "estimator": ({"estimator": STE()}, "use estimator=lsq or lsq_log"),
}


@pytest.mark.parametrize("settings,message", REFUSED.values(), ids=REFUSED.keys())
def test_what_leaves_nothing_to_learn_is_refused_before_a_step(settings, message):
    module = Classifier()
    with pytest.raises(ValueError, match=message):
        trainer(quantization(**settings), ScalesOnly()).fit(module, LOADERS[0])
    assert all(layer.weight_quantizer.packed is None for layer in layers(module).values())


def test_other_kinds_of_layers_and_adapters_are_refused_by_name():
    convolution = nn.Sequential(nn.Conv2d(4, 8, 1))
    with pytest.raises(ValueError, match=r"such as 0 \(Conv2d\)"):
        ScalesOnly().check(convolution, {"0": None}, quantization())
    chosen = plan(Classifier(), quantization().schemes)
    ScalesOnly().check(Classifier(), chosen, quantization())
    with pytest.raises(ValueError, match=r"network\.0 has an adapter"):
        trainer(quantization(), LoRA(r=2), ScalesOnly()).fit(Classifier(), LOADERS[0])
    with pytest.raises(ValueError, match=r"network\.0 has nested widths"):
        ScalesOnly().check(Classifier(), {"network.0": QuantScheme.parse("w8.4a16-g32")}, quantization())
    with pytest.raises(ValueError, match="ScalesOnly needs a QuantizationAwareTraining callback"):
        trainer(ScalesOnly()).fit(Classifier(), LOADERS[0])
    with pytest.raises(ValueError, match="under LoRA or scales-only"):
        trainer(quantization(), ScalesOnly(), Oscillation(damping=1.0)).fit(Classifier(), LOADERS[0])
