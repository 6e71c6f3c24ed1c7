"""LoRA works on somebody else's LightningModule: adapters and scales learn, a run resumes, the adapter is written."""

import logging

import pytest
import torch
from digits import Classifier, LateClassifier, digits, int4, trainer
from test_quantization import StopAt

from qat.calibration import CALIBRATIONS
from qat.callbacks import LoRA
from qat.insertion import insert, layers, plan
from qat.scheme import QuantSpec, uniform
from qat.training import load_adapter

LOADERS = digits()


def lora(**settings) -> LoRA:
    return LoRA(**{"r": 4, "lora_alpha": 8, **settings})


@pytest.mark.parametrize("kind", [Classifier, LateClassifier])
def test_only_adapters_and_scales_learn_and_they_do(kind):
    module, untouched = kind(), Classifier().state_dict()
    trainer(int4(), lora()).fit(module, LOADERS[0])
    for name, tensor in module.state_dict().items():
        if name in untouched:
            assert torch.equal(tensor, untouched[name]), name
    for layer in layers(module).values():
        assert layer.lora_B.abs().sum() > 0


def test_the_loss_falls_as_it_learns():
    module, images = Classifier(), LOADERS[1].dataset.tensors
    before = torch.nn.functional.cross_entropy(module(images[0]), images[1])
    trainer(int4(), lora(), steps=60).fit(module, LOADERS[0])
    after = torch.nn.functional.cross_entropy(module(images[0]), images[1])
    assert after < 0.8 * before  # 2.3, chance, falls to about 1.5


@pytest.mark.parametrize("stop", [2, 5, 9])
def test_a_run_stopped_and_resumed_ends_with_the_same_bits(stop, tmp_path):
    data = digits(batch_size=1500)[0]
    whole, first, second = Classifier(), Classifier(), Classifier()
    start = {"start_step": 3}
    torch.manual_seed(5)
    trainer(int4(**start), lora(), max_epochs=-1).fit(whole, data)
    torch.manual_seed(5)
    trainer(int4(**start), lora(), StopAt(stop, tmp_path / "x.ckpt"), max_epochs=-1).fit(first, data)
    torch.manual_seed(6)
    trainer(int4(**start), lora(), max_epochs=-1).fit(second, data, ckpt_path=tmp_path / "x.ckpt", weights_only=False)
    for (name, value), resumed in zip(whole.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(value, resumed), name


def test_the_adapter_is_written_and_fits_the_model_that_it_came_from(tmp_path):
    module, callback = Classifier(), lora(folder=tmp_path / "adapter", base="digits", target_modules=["0"])
    trainer(int4(ignore=(), submodule="network"), callback).fit(module, LOADERS[0])
    other = Classifier()
    insert(other.network, int4(ignore=()).schemes)
    load_adapter(other.network, tmp_path / "adapter")
    for name, layer in layers(module.network).items():
        twin = layers(other.network)[name]
        assert torch.equal(layer.adapted, twin.adapted)
        assert torch.equal(layer.weight_quantizer.scale, twin.weight_quantizer.scale)


def test_no_adapter_is_written_for_weights_that_calibration_changed(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    settings = {
        "calibration": CALIBRATIONS["gptq"],
        "calibration_loader": LOADERS[0],
        "submodule": "network",
        "ignore": (),
    }
    trainer(int4(**settings), lora(folder=tmp_path / "adapter")).fit(Classifier(), LOADERS[0])
    assert not (tmp_path / "adapter").exists()
    assert "gptq changed the weights" in caplog.text


def test_rank_zero_trains_everything():
    modules = Classifier(), Classifier()
    trainer(int4(), LoRA(r=0)).fit(modules[0], LOADERS[0])
    trainer(int4()).fit(modules[1], LOADERS[0])
    states = (m.state_dict() for m in modules)
    assert all(torch.equal(a, b) for a, b in zip(*(s.values() for s in states), strict=True))


def test_what_does_not_fit_is_refused_with_what_does():
    module = Classifier()
    chosen = dict.fromkeys(["0", "2"])
    with pytest.raises(ValueError, match=r"no quantized linear layer is called q_proj.*is one of 0, 2"):
        lora(target_modules=["q_proj"]).check(module.network, chosen, int4())
    with pytest.raises(ValueError, match="between 1 and 32, the size of 2"):
        lora(r=33).check(module.network, chosen, int4())
    with pytest.raises(ValueError, match="LoRA needs a QuantizationAwareTraining callback"):
        trainer(lora()).fit(module, LOADERS[0])
    with pytest.raises(ValueError, match="cannot be negative"):
        LoRA(r=-1)


def test_a_target_that_cannot_have_an_adapter_is_refused_before_anything_is_trained(tiny_llama):
    model = tiny_llama(tie=True)
    schemes = uniform(QuantSpec(bits=8, granularity="channel"), kinds=("linear", "embedding"))
    chosen = plan(model, schemes)
    for target in ("embed_tokens", "lm_head"):  # rows that are looked up, and the output layer that shares them
        with pytest.raises(ValueError, match=f"no quantized linear layer is called {target}"):
            LoRA(r=2, target_modules=[target]).check(model, chosen, int4())
    LoRA(r=2, target_modules=["q_proj"]).check(model, chosen, int4())


def test_no_adapter_is_written_that_lacks_what_was_learned_in_float(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    trainer(int4(start_step=3), lora(folder=tmp_path / "adapter")).fit(Classifier(), LOADERS[0])
    assert not (tmp_path / "adapter").exists() and "before step 3 went into the weights" in caplog.text
