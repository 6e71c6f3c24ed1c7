"""Embeddings and output layers: one table or two, from insertion to the packed model."""

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from safetensors import safe_open
from torch import nn
from torch.nn import functional as F

from qat.calibration import CALIBRATIONS
from qat.config import CONF, check_overrides, register_recipes
from qat.estimators import STE, FakeQuantize
from qat.export import export, record
from qat.fake_quantizer import Stage
from qat.functional import dequantize
from qat.inference import load_packed
from qat.inference.bench import speed
from qat.inference.decode import generate
from qat.inference.llama import fused_decoder
from qat.insertion import insert, layers, plan, quantizers, remove, set_stage
from qat.nn import FakeQuantEmbedding
from qat.packing import unpack
from qat.scheme import QuantScheme, SchemeMap, uniform

TOKENS = torch.arange(48).view(2, 24)
G32 = QuantScheme.parse("w4a16-g32")


def everything(scheme: QuantScheme) -> SchemeMap:
    return uniform(scheme.weight, scheme.input, kinds=("linear", "embedding"))


def trained(model: nn.Module, scheme: QuantScheme, calibration: str = "absmax") -> nn.Module:
    insert(model, everything(scheme))
    CALIBRATIONS[calibration](model, torch.no_grad()(lambda: model(TOKENS, use_cache=False)))
    set_stage(model, Stage.TRAIN)
    optimizer = torch.optim.SGD(model.train().parameters(), 0.05)
    model(TOKENS, labels=TOKENS, use_cache=False).loss.backward()
    for name, layer in layers(model).items():
        assert layer.weight.grad.abs().sum() > 0 and layer.weight_quantizer.scale.grad.abs().sum() > 0, name
    optimizer.step()
    return model


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", ["w4a16-g32", "w8a16-channel", "w8a8-channel"])
def test_a_model_quantized_whole_loads_bit_equal(name, tie, tiny_llama, tmp_path):
    model = trained(tiny_llama(tie=tie), QuantScheme.parse(name))
    with torch.no_grad(), record(model) as recorded:
        logits = model(TOKENS, use_cache=False).logits
    artifact = export(model, recorded, tmp_path / "m")
    assert len(artifact.layers) == len(recorded) == 16 - tie
    packed, _ = load_packed(tmp_path / "m")
    with torch.no_grad():
        assert torch.equal(packed(TOKENS, use_cache=False).logits, logits)
    table, used = packed.get_submodule("model.embed_tokens"), recorded["model.embed_tokens"]
    assert torch.equal(unpack(table.packed, table.scheme.weight.bits, 128), used.codes)
    assert torch.equal(table(TOKENS), dequantize(used.codes, used.scale)[TOKENS])
    head = packed.lm_head
    assert (head.packed is table.packed and head.scale is table.scale) == tie
    moved, _ = load_packed(tmp_path / "m", device="meta")  # another device
    head, table = moved.lm_head, moved.get_submodule("model.embed_tokens")
    assert table.packed.device.type == "meta" and (head.packed is table.packed and head.scale is table.scale) == tie
    with safe_open(tmp_path / "m" / "qat.safetensors", "pt") as file:
        assert any(key.startswith("lm_head") for key in file.keys()) != tie
    with pytest.raises(OSError, match="no file named"):
        type(model).from_pretrained(tmp_path / "m")


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_packed_table_generates_and_is_benched(backend, tiny_llama, tmp_path, request):
    if backend == "cpu":
        request.getfixturevalue("library")
    model = trained(tiny_llama(tie=True), G32)
    with torch.no_grad(), record(model) as recorded:
        model(TOKENS, use_cache=False)
    export(model, recorded, tmp_path / "m")
    packed, _ = load_packed(tmp_path / "m", backend=backend)
    decoder = fused_decoder(packed)
    assert decoder is not None
    prompt = TOKENS[:, :5]
    found = torch.stack(list(generate(decoder, prompt, 4)), 1)
    wanted = prompt
    with torch.no_grad():
        for _ in range(4):  # layer by layer, each time from the start
            wanted = torch.cat((wanted, packed(wanted, use_cache=False).logits[:, -1:].argmax(-1)), 1)
    assert torch.equal(found, wanted[:, 5:])
    assert speed(packed, batch=1, prompt=3, new_tokens=2, rounds=1).decode > 0


def test_a_tied_pair_has_one_quantizer_for_weights_only(tiny_llama):
    model = tiny_llama(tie=True)
    inserted = insert(model, everything(QuantScheme.parse("w8a8-channel")))
    table, head = model.model.embed_tokens, model.lm_head
    assert head.weight_quantizer is table.weight_quantizer and head.weight is table.weight
    assert head.input_quantizer is table.input_quantizer is None
    assert "model.embed_tokens" in inserted and "lm_head" not in inserted
    assert len(quantizers(model)) == 1 + 2 * 14
    remove(model)
    assert type(model.lm_head) is nn.Linear and type(model.model.embed_tokens) is nn.Embedding


@pytest.mark.parametrize("head", [None, QuantScheme.parse("w8a16-channel")], ids=["float", "another scheme"])
def test_a_tied_pair_that_is_to_differ_is_refused_with_every_remedy(head, tiny_llama):
    rules = SchemeMap(name="test", rules={"lm_head": head, "*": G32}, kinds=("linear", "embedding"))
    with pytest.raises(ValueError, match=r"embed_tokens: its weight is tied to lm_head.*null.*kinds=.*qat.untie"):
        plan(tiny_llama(tie=True), rules)


def test_embeddings_stay_float_unless_their_kind_is_asked_for(tiny_llama):
    assert "model.embed_tokens" not in plan(tiny_llama(), uniform(G32.weight))
    with pytest.raises(ValueError, match="kinds must be one of linear, embedding, conv, got 'embeddings'"):
        uniform(G32.weight, kinds=("embeddings",))


@pytest.mark.parametrize("granularity", ["w4a16-g8", "w4a16-channel", "w4a16-tensor"])
def test_rows_looked_up_are_those_of_the_quantized_table_in_value_and_gradient(granularity):
    torch.manual_seed(0)
    table = FakeQuantEmbedding.adopt(nn.Embedding(20, 16), QuantScheme.parse(granularity), STE(follow="absmax"))
    table.weight_quantizer.set_stage(Stage.TRAIN)
    ids, upstream = torch.tensor([[3, 3, 7], [19, 0, 3]]), torch.randn(2, 3, 16)
    table(ids).backward(upstream)
    weight, quantizer = table.weight.detach().clone().requires_grad_(), table.weight_quantizer
    scale = quantizer.weight_scale(weight)
    whole = FakeQuantize.apply(weight, quantizer.scale, scale, quantizer.spec, quantizer.estimator)
    rows = F.embedding(ids, whole)
    rows.backward(upstream)
    assert torch.equal(table(ids), rows)
    # Each row's gradient is a sum over its uses, masked before or after it is taken.
    torch.testing.assert_close(table.weight.grad, weight.grad, rtol=1e-6, atol=1e-6)


def test_gptq_rounds_a_table_to_nearest_and_leaves_its_weights(tiny_llama):
    model = tiny_llama(tie=True)
    before = model.lm_head.weight.detach().clone()
    insert(model, everything(G32))
    CALIBRATIONS["gptq"](model, torch.no_grad()(lambda: model(TOKENS, use_cache=False)))
    assert torch.equal(model.lm_head.weight, before)
    assert not torch.equal(model.model.embed_tokens.weight_quantizer.scale, torch.ones(256, 4))


@pytest.mark.parametrize("name", ["w4a16-g128", "w8a16-channel", "w4a8-g32", "w8a8-channel", "w2a16-tensor"])
def test_a_scheme_s_name_names_it(name):
    assert str(QuantScheme.parse(name)) == name


@pytest.mark.parametrize("name", ["w4a4-g32", "w4", "w4a16", "int4"])
def test_what_names_no_scheme_is_refused(name):
    with pytest.raises(ValueError, match=f"no scheme is called '{name}'"):
        QuantScheme.parse(name)


def test_the_command_line_chooses_kinds_and_overrides_layers():
    words = ["quant.ignore=[]", "quant.kinds=[linear,embedding]", "+quant.overrides={*.layers.0.*:w8a16-channel}"]
    register_recipes()
    check_overrides(words)
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        schemes = instantiate(compose("config", overrides=words).quant)
    assert schemes.scheme_of("lm_head") == schemes.scheme_of("model.layers.1.mlp.up_proj")
    assert str(schemes.scheme_of("lm_head")) == "w4a16-g128"
    assert str(schemes.scheme_of("model.layers.0.mlp.up_proj")) == "w8a16-channel"
    assert tuple(schemes.kinds) == ("linear", "embedding")
