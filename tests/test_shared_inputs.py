"""Layers that servers run as one share the quantizer of a static input."""

import copy

import pytest
import torch

from qat.calibration import GPTQ, RangeCalibration
from qat.estimators import LSQ, LSQPlus
from qat.export import export, record
from qat.fake_quantizer import Stage, token_mask
from qat.inference import load_packed
from qat.inference.fusion import why_separate
from qat.insertion import insert, layers, quantizers, remove, set_stage
from qat.scheme import QuantScheme, QuantSpec, SchemeMap
from qat.structure import fused
from qat.training import add_adapters, load_adapter, save_adapter, scale_parameters

WEIGHT = QuantSpec(bits=8, granularity="channel")
STATIC = QuantScheme(weight=WEIGHT, input=QuantSpec(bits=8, granularity="tensor"))
SHIFTED = QuantScheme(weight=WEIGHT, input=QuantSpec(bits=8, granularity="tensor", symmetric=False))
DYNAMIC = QuantScheme(weight=WEIGHT, input=QuantSpec(bits=8, granularity="token", dynamic=True))
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
FEED = ("mlp.gate_proj", "mlp.up_proj")
TOKENS = torch.arange(24)[None]


def inserted(model, scheme=STATIC, **rules):
    insert(model, SchemeMap(name="x", rules={"*lm_head": None, **rules, "*": scheme}), LSQPlus())
    return model


def input_quantizers(model, names=ATTENTION, block=0):
    return [layers(model)[f"model.layers.{block}.{name}"].input_quantizer for name in names]


def runner(model):
    @torch.no_grad()
    def run() -> None:
        for batch in torch.arange(192).view(2, 4, 24):
            with token_mask(None):
                model(batch, use_cache=False)

    return run


def test_the_groups_are_those_of_one_parent():
    names = ["a.q_proj", "a.k_proj", "b.q_proj", "a.gate_proj", "a.up_proj", "a.o_proj", "b.v_proj"]
    assert fused(names) == [["a.q_proj", "a.k_proj"], ["b.q_proj", "b.v_proj"], ["a.gate_proj", "a.up_proj"]]


@pytest.mark.parametrize("scheme", [STATIC, SHIFTED], ids=["symmetric", "asymmetric"])
def test_fused_layers_share_one_static_quantizer_and_others_have_their_own(scheme, tiny_llama):
    model = inserted(tiny_llama(), scheme)
    for block in (0, 1):
        for names in (ATTENTION, FEED):
            assert len({id(q) for q in input_quantizers(model, names, block)}) == 1
    found = [layer.input_quantizer for layer in layers(model).values()]
    assert len({id(q) for q in found}) == 2 * 4  # q/k/v, o, gate/up, down
    learned = 14 + 8 * (1 if scheme is STATIC else 2)
    assert len(scale_parameters(model)) == learned
    assert len({id(p) for p in model.parameters() if p.dtype == torch.float32}) == len(list(model.parameters()))
    again = copy.deepcopy(model)
    assert len({id(q) for q in input_quantizers(again)}) == 1
    remove(model)
    assert not quantizers(model)


def test_dynamic_inputs_and_inputs_of_other_specs_share_nothing(tiny_llama):
    assert len({id(q) for q in input_quantizers(inserted(tiny_llama(), DYNAMIC))}) == 3
    mixed = inserted(tiny_llama(), STATIC, **{"*k_proj": SHIFTED, "*gate_proj": None})
    q, k, v = input_quantizers(mixed)
    assert q is v and q is not k
    assert layers(mixed)["model.layers.0.mlp.up_proj"].input_quantizer is not None


@pytest.mark.parametrize("kind", ["absmax", "ema", "mse"])
def test_a_shared_range_is_the_one_that_each_layer_alone_would_find(kind, tiny_llama):
    shared, alone = inserted(tiny_llama()), tiny_llama()
    insert(alone, SchemeMap(name="x", rules={"*q_proj": STATIC, "*": None}), LSQ())
    for model in (shared, alone):
        RangeCalibration("x", weight="absmax", input=kind)(model, runner(model))
    found = input_quantizers(shared)[0].scale
    assert torch.equal(found, layers(alone)["model.layers.0.self_attn.q_proj"].input_quantizer.scale)


def test_gradients_of_all_layers_add_up_in_the_shared_scale(tiny_llama):
    model = inserted(tiny_llama())
    RangeCalibration("x")(model, runner(model))
    set_stage(model, Stage.TRAIN)
    attention = [layers(model)[f"model.layers.0.{name}"] for name in ATTENTION]
    x = torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(0))
    parts = []
    for layer in attention:
        layer(x).sum().backward()
        parts.append(layer.input_quantizer.scale.grad.clone())
        layer.input_quantizer.scale.grad = None
    sum(layer(x).sum() for layer in attention).backward()
    # Three numbers in another order.
    torch.testing.assert_close(attention[0].input_quantizer.scale.grad, sum(parts), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "calibration", [RangeCalibration("mse"), GPTQ()], ids=lambda calibration: type(calibration).__name__
)
@pytest.mark.parametrize("scheme", [STATIC, SHIFTED], ids=["symmetric", "asymmetric"])
@torch.no_grad()
def test_each_fused_layer_is_exported_with_the_same_input_scale_so_they_can_be_one(
    scheme, calibration, tiny_llama, tmp_path
):
    model = inserted(tiny_llama(), scheme)
    calibration(model, runner(model))
    set_stage(model, Stage.TRAIN)
    with torch.enable_grad():
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        for _ in range(2):
            model(TOKENS, labels=TOKENS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    with record(model) as recorded:
        logits = model(TOKENS).logits
    export(model, recorded, tmp_path / "m")
    packed, _ = load_packed(tmp_path / "m")
    assert torch.equal(packed(TOKENS).logits, logits)
    for names in (ATTENTION, FEED):
        found = [packed.get_submodule(f"model.layers.1.{name}") for name in names]
        assert len({float(layer.input_scale) for layer in found}) == 1
        assert why_separate(found) is None


def test_a_checkpoint_of_a_shared_quantizer_loads_into_the_same_model(tiny_llama):
    model, other = inserted(tiny_llama(), SHIFTED), inserted(tiny_llama(), SHIFTED)
    RangeCalibration("x")(model, runner(model))
    set_stage(model, Stage.TRAIN)
    other.load_state_dict(model.state_dict())
    for ours, theirs in zip(quantizers(other), quantizers(model), strict=True):
        assert torch.equal(ours.scale, theirs.scale) and ours.current_stage == Stage.TRAIN
    assert torch.equal(other(TOKENS).logits, model(TOKENS).logits)


def test_adapters_are_saved_and_loaded_with_what_their_layers_share(tiny_llama, tmp_path):
    model, fresh = inserted(tiny_llama(), SHIFTED), inserted(tiny_llama(), SHIFTED)
    RangeCalibration("x")(model, runner(model))
    add_adapters(model, 4, 8, ["q_proj", "k_proj"])
    for layer in layers(model).values():
        if layer.lora_B is not None:
            torch.nn.init.normal_(layer.lora_B, std=0.02)
    save_adapter(model, tmp_path, "tiny")
    load_adapter(fresh, tmp_path)
    for each in (model, fresh):
        set_stage(each, Stage.TRAIN)
    assert torch.equal(fresh(TOKENS).logits, model(TOKENS).logits)
