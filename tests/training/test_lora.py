"""An adapter is quantized with the weight it is added to, and what is exported is exactly that."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from qat.attention import key_values
from qat.calibration import CALIBRATIONS
from qat.estimators import LSQ
from qat.export import export, record
from qat.fake_quantizer import Stage
from qat.inference import load_packed
from qat.insertion import insert, layers, remove, set_stage
from qat.packing import unpack
from qat.scheme import QuantSpec, uniform
from qat.training import add_adapters, load_adapter, save_adapter, scale_parameters
from qat.training.lora import targeted

G32 = QuantSpec(bits=4, granularity="group", group_size=32)
INT4 = uniform(G32, ignore=("*lm_head",))
TOKENS = torch.arange(24)[None]


def learned(model: nn.Module, seed: int = 3) -> nn.Module:
    """As after training: adapters and scales that are not what they started from."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for layer in layers(model).values():
            if layer.lora_B is not None:
                layer.lora_B.normal_(std=0.02)
            layer.weight_quantizer.scale.mul_(1.1)
    return model


@pytest.fixture
def llama(tiny_llama):
    """A quantized Llama, calibrated, with adapters of rank 4 on every layer that the targets name."""

    def make(targets="all-linear", dtype=torch.float32, adapters=True):
        model = tiny_llama(dtype)
        insert(model, INT4)
        CALIBRATIONS["absmax"](model, lambda: None)
        if adapters:
            add_adapters(model, 4, 8, targets)
        set_stage(model, Stage.TRAIN)
        return model

    return make


def test_a_new_adapter_changes_nothing(llama):
    with torch.no_grad():
        assert torch.equal(llama()(TOKENS).logits, llama(adapters=False)(TOKENS).logits)


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D], ids=lambda k: k.__name__)
@pytest.mark.parametrize("stage", [Stage.FLOAT, Stage.TRAIN], ids=lambda s: s.name.lower())
def test_gradients_are_those_of_the_sum_by_the_chain_rule(kind, stage):
    torch.manual_seed(0)
    scaling, x = 0.5, torch.randn(7, 64)
    pair = []
    for _ in range(2):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(64, 24) if kind is nn.Linear else Conv1D(24, 64))
        insert(model, uniform(G32), LSQ())
        pair.append(model)
    (adapted,), (dense,) = ([*layers(m).values()] for m in pair)
    adapted.adapt(4, scaling)
    nn.init.normal_(adapted.lora_B, std=0.05)
    with torch.no_grad():
        dense.matrix.copy_(adapted.adapted)
    for model in pair:
        CALIBRATIONS["absmax"](model, lambda: None)
    dense.weight_quantizer.set_scale(adapted.weight_quantizer.scale.detach())
    adapted.weight.requires_grad_(False)
    outputs = []
    for model in pair:
        set_stage(model, stage)
        outputs.append(model(x))
        outputs[-1].square().sum().backward()
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-6)  # Conv1D's own product sums in another order
    whole = dense.as_matrix(dense.weight.grad)
    # the same products, associated otherwise in float32 sums of 24 and 64 terms
    torch.testing.assert_close(adapted.lora_A.grad, scaling * adapted.lora_B.T @ whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(adapted.lora_B.grad, scaling * whole @ adapted.lora_A.T, rtol=1e-4, atol=1e-5)
    assert adapted.weight.grad is None
    if stage == Stage.TRAIN:
        scales = adapted.weight_quantizer.scale, dense.weight_quantizer.scale
        torch.testing.assert_close(scales[0].grad, scales[1].grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "bf16-mixed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_export_holds_exactly_what_was_trained(llama, dtype, autocast, tmp_path):
    model = learned(llama(["q_proj", "down_proj"], dtype))
    with record(model) as recorded, torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model(TOKENS)
    export(model, recorded, tmp_path / "export")
    packed, _ = load_packed(tmp_path / "export")
    for name, layer in layers(model).items():
        stored = packed.get_submodule(name)
        assert torch.equal(unpack(stored.packed, 4, layer.in_features), recorded[name].codes), name
        assert torch.equal(stored.scale.float(), recorded[name].scale.float()), name
        assert (layer.lora_B is not None) == name.endswith(("q_proj", "down_proj"))


def test_an_adapter_that_is_saved_alone_comes_back_to_the_same_bits(llama, tmp_path):
    trained = learned(llama(["q_proj", "up_proj"]))
    save_adapter(trained, tmp_path, "tiny")
    fresh = llama(adapters=False)
    load_adapter(fresh, tmp_path)
    with torch.no_grad():
        assert torch.equal(fresh(TOKENS).logits, trained(TOKENS).logits)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_alpha"] == 8


def test_peft_reads_the_adapter_and_merges_it_to_the_same_sum(llama, tiny_llama, tmp_path):
    from peft import PeftModel

    model = learned(llama(["q_proj", "down_proj"]))
    save_adapter(model, tmp_path, "tiny")
    merged = PeftModel.from_pretrained(tiny_llama(), tmp_path).merge_and_unload()
    for name, layer in layers(model).items():
        # one float32 rounding: peft adds a product that was rounded before
        torch.testing.assert_close(merged.get_submodule(name).weight, layer.adapted, rtol=1e-6, atol=1e-7)


def test_a_merged_adapter_and_a_removed_one_leave_the_sum(llama):
    model = learned(llama())
    sums = {name: layer.adapted.detach().clone() for name, layer in layers(model).items()}
    with torch.no_grad():
        before = model(TOKENS).logits
        for layer in layers(model).values():
            layer.merge()
        assert torch.equal(model(TOKENS).logits, before)
    remove(learned(model, seed=4))
    names = {n for n, _ in model.named_parameters()}
    assert not any("lora" in n or "quantizer" in n for n in names)
    for name, total in sums.items():
        weight = model.get_submodule(name).weight
        assert weight.shape == total.shape
        assert not torch.equal(weight, total)  # the second adapter is in it too


def test_nothing_but_adapters_and_scales_learns(llama):
    model = llama(["v_proj"])
    learning = {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(learning) == 2 * 2 + len(scale_parameters(model))
    assert all(n.endswith(("lora_A", "lora_B", ".scale")) for n in learning)
    F.cross_entropy(model(TOKENS).logits[0], TOKENS[0]).backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == learning


NAMES = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.gate_proj"]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [("all-linear", NAMES), (["q_proj"], NAMES[:2]), ([NAMES[1], "gate_proj"], NAMES[1:]),
     (r".*\.1\..*_proj", NAMES[1:]), (["1.self_attn.q_proj"], NAMES[1:2])],
    ids=str,
)  # fmt: skip
def test_targets_are_matched_as_peft_does(targets, expected):
    assert targeted(NAMES, targets) == expected


@pytest.mark.parametrize("targets", [["q_proj", "proj"], "q_proj", [], r".*\.7\..*"], ids=str)
def test_a_target_that_is_not_there_is_named_with_those_that_are(targets):
    with pytest.raises(ValueError, match=r"no quantized linear layer is called .*gate_proj, q_proj"):
        targeted(NAMES, targets)


def test_a_rank_that_is_no_smaller_than_a_layer_is_refused(llama):
    for rank in (0, 1000):
        with pytest.raises(ValueError, match=r"between 1 and \d+, the size of model.layers.0"):
            add_adapters(llama(adapters=False), rank, 1)
    with pytest.raises(ValueError, match="an adapter already"):
        add_adapters(llama(), 4, 8)
    with pytest.raises(ValueError, match="no adapter to save"):
        save_adapter(llama(adapters=False), None, "")


def test_an_adapter_of_other_layers_is_refused(llama, tmp_path):
    save_adapter(llama(["q_proj"]), tmp_path, "tiny")
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "target_modules": ["k_proj", "q_proj"]}))
    with pytest.raises(ValueError, match=r"does not fit the model: base_model\.model\..*k_proj\.lora_A"):
        load_adapter(llama(adapters=False), tmp_path)


def test_an_adapter_holds_the_scales_of_keys_and_values(tiny_llama, tmp_path):
    models = []
    for scale in (0.25, 1.0):
        model = tiny_llama(torch.float32)
        insert(model, uniform(G32, ignore=("*lm_head",), kv_cache="int8"))
        CALIBRATIONS["absmax"](model, lambda m=model: m(TOKENS, use_cache=False))
        add_adapters(model, 4, 8, "all-linear")
        for kept in key_values(model).values():
            kept.key_quantizer.set_scale(torch.full((1,), scale))
        set_stage(model, Stage.FROZEN)
        models.append(model)
    trained, fresh = models
    assert not torch.equal(trained(TOKENS).logits, fresh(TOKENS).logits)
    save_adapter(trained, tmp_path, "tiny")
    load_adapter(fresh, tmp_path)
    assert torch.equal(trained(TOKENS).logits, fresh(TOKENS).logits)
