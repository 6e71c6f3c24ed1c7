"""AWQ and SmoothQuant: the float function stays, the quantized one comes closer to it."""

import pytest
import torch
from llama_data import G32, batches, inserted, logits, runner
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, Qwen2Config

from qat.calibration import AWQ, ClipSearch, RangeCalibration, Rotation, SmoothQuant, equalization
from qat.calibration.equalization import Inputs
from qat.calibration.llama_like import Pair, find_pairs
from qat.fake_quantizer import Stage
from qat.functional import fake_quantize
from qat.insertion import layers, quantizers, set_stage
from qat.scheme import QuantScheme, QuantSpec

W8A8 = QuantScheme(
    weight=QuantSpec(bits=8, granularity="channel"),
    input=QuantSpec(bits=8, granularity="token", dynamic=True, absmax_rule="qmax"),
)
METHODS = {"awq": AWQ, "smoothquant": SmoothQuant, "smoothquant everywhere": lambda **k: SmoothQuant(
    pairs=("qkv", "o", "gate_up", "down"), **k)}  # fmt: skip


def hostile(model):
    """`model` with norm gains 100 times larger for three features, and the columns after them smaller: one function."""
    with torch.no_grad():
        for block in model.model.layers:
            for pair in find_pairs(block, ("qkv", "gate_up")):
                factor = torch.ones(128)
                factor[[3, 40, 77]] = 0.01
                pair.fold(factor)
    return model


def biased_qwen2():
    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=96, intermediate_size=160, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2,
        vocab_size=256, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in (p for n, p in model.named_parameters() if n.endswith("bias")):
        torch.nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["llama with biases", "qwen2, 3 query heads a value head", "outliers"])
def test_the_float_function_stays(method, kind, tiny_llama):
    model = biased_qwen2() if kind.startswith("qwen2") else tiny_llama(bias=kind.endswith("biases"))
    model = hostile(model) if kind == "outliers" else model
    reference = logits(model)
    inserted(model)
    before = {name: p.clone() for name, p in model.named_parameters() if name.endswith("proj.weight")}
    METHODS[method](exponents=(0.5,))(model, runner(model))
    assert {q.current_stage for q in quantizers(model)} == {Stage.FLOAT}
    moved = [n for n, p in model.named_parameters() if n in before and not torch.equal(p, before[n])]
    assert len(moved) == 2 * (7 if method != "smoothquant" else 5)
    torch.testing.assert_close(logits(model), reference, atol=1e-4, rtol=0)


@pytest.mark.parametrize("method", ["awq", "smoothquant"])
def test_outliers_of_the_activations_are_paid_for_no_more(method, tiny_llama):
    scheme = G32 if method == "awq" else W8A8
    reference, errors = logits(tiny_llama()), {}
    for name, calibration in {"plain": RangeCalibration("mse"), method: METHODS[method]()}.items():
        model = inserted(hostile(tiny_llama()), scheme)
        calibration(model, runner(model))
        set_stage(model, Stage.FROZEN)
        errors[name] = float((logits(model) - reference).square().mean())
    assert errors[method] < 0.5 * errors["plain"]


def test_smoothquant_divides_by_the_papers_factor(tiny_llama):
    block = tiny_llama().model.layers[0]
    pair = find_pairs(block, ("gate_up",))[0]
    inputs = Inputs(absmax=torch.rand(128) + 0.1, mean=torch.ones(128), sample=torch.ones(1, 128))
    weights = torch.cat([block.mlp.gate_proj.weight, block.mlp.up_proj.weight]).abs().amax(0)
    expected = inputs.absmax**0.7 / weights**0.3
    torch.testing.assert_close(SmoothQuant().factor(inputs, pair, 0.7), expected)


def test_awq_takes_the_exponent_with_the_smallest_error_by_the_papers_formulas(tiny_llama):
    """arXiv 2306.00978, eqs. 4 and 5: s = mean|x|^a, the smallest || Q(W diag(s)) diag(s)^-1 X - W X ||."""
    model, data, seen = inserted(hostile(tiny_llama())), batches(real=(24, 24)), []
    block, exponents = model.model.layers[0], (0.0, 0.5, 1.0, 0.75, 0.25)
    hook = block.mlp.up_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    runner(model, data)()
    hook.remove()
    x, errors = torch.cat(seen).double(), []
    for exponent in exponents:
        s, error = x.abs().mean(0) ** exponent, 0.0
        for layer in (block.mlp.gate_proj, block.mlp.up_proj):
            weight = layer.weight.detach().double()
            step = (weight * s).unflatten(1, (-1, 32)).abs().amax(-1, keepdim=True) / 7.5
            codes = ((weight * s).unflatten(1, (-1, 32)) / step).round().clamp(-8, 7)
            quantized = (codes * step).flatten(1)
            error += float(((x / s) @ quantized.T - x @ weight.T).square().sum())
        errors.append(error)
    two = sorted(errors)[:2]
    assert two[1] > 1.05 * two[0], "scales rounded to bfloat16 could choose another"
    awq = AWQ(exponents=exponents, pairs=("gate_up",), tokens=len(x))
    best = exponents[errors.index(two[0])]
    assert awq.equalize(block, runner(model, data)) == {"post_attention_layernorm": best} and best > 0


def test_query_heads_that_share_a_value_head_share_its_factors(tiny_llama):
    pair = find_pairs(tiny_llama().model.layers[0], ("o",))[0]
    factor = torch.arange(1.0, 65.0)  # 2 value heads of 32 features, each read by 2 query heads
    spread = pair.spread(factor).view(2, 2, 32)
    assert torch.equal(spread[:, 0], spread[:, 1]) and torch.equal(spread[:, 0].flatten(), factor)
    assert torch.equal(pair.shared(pair.spread(factor)), factor)


def test_the_exponent_with_the_smallest_output_error_is_taken(tiny_llama):
    model = inserted(hostile(tiny_llama()), W8A8)
    chosen = SmoothQuant().equalize(model.model.layers[0], runner(model))
    assert set(chosen) == {"input_layernorm", "post_attention_layernorm"} and min(chosen.values()) > 0
    assert SmoothQuant(exponents=(0.0,)).equalize(model.model.layers[0], runner(model)) == dict.fromkeys(chosen, 0.0)


def test_clipping_never_raises_a_groups_output_error(tiny_llama):
    model = inserted(tiny_llama())
    layer, seen = layers(model)["model.layers.0.mlp.up_proj"], []
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    data = batches(real=(24, 24))
    runner(model, data)()
    hook.remove()
    x, cost = torch.cat(seen).double(), {}
    for name, method in {"absmax": RangeCalibration("absmax", weight="absmax"), "clip": ClipSearch()}.items():
        method(model, runner(model, data))
        error = fake_quantize(layer.weight.detach(), layer.weight_quantizer.scale.detach(), layer.scheme.weight)
        error = (error - layer.weight.detach()).double().unflatten(1, (-1, 32))
        cost[name] = torch.einsum("tgi,ogi->tog", x.unflatten(1, (-1, 32)), error).square().sum(0)
    # Sums of float32 products: a tie may fall either way by their rounding.
    assert (cost["clip"] <= cost["absmax"] * (1 + 1e-4)).all()
    assert cost["clip"].sum() < 0.95 * cost["absmax"].sum()


@pytest.mark.parametrize("method", ["awq", "smoothquant"])
def test_what_lies_under_the_mask_moves_no_factor(method, tiny_llama):
    clean, dirty = (inserted(tiny_llama()) for _ in range(2))
    METHODS[method]()(clean, runner(clean, batches(0)))
    METHODS[method]()(dirty, runner(dirty, batches(201)))
    assert all(torch.equal(p, dirty.state_dict()[name]) for name, p in clean.state_dict().items())


@pytest.mark.parametrize("method", [AWQ(), SmoothQuant(), Rotation()], ids=lambda m: m.name)
def test_a_model_of_another_kind_is_refused_by_name(method):
    config = GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=64)
    with pytest.raises(ValueError, match=f"calibration {method.name} .*and this is gpt2: use calibration=gptq"):
        method.check(AutoModelForCausalLM.from_config(config))


def test_a_sublayer_that_is_not_linear_is_refused_by_name(tiny_llama):
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj = torch.nn.Sequential(torch.nn.Linear(128, 256))
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj is a Sequential, not a linear layer"):
        AWQ().check(model)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"exponents": (1.5,)}, r"exponents must be in \[0, 1\]"),
        ({"exponents": ()}, r"exponents must be in \[0, 1\]"),
        ({"pairs": ("qkv", "mlp")}, "pairs are qkv, o, gate_up and down, not mlp"),
    ],
    ids=["exponent", "none", "pair"],
)
def test_settings_that_mean_nothing_are_refused(fields, message):
    with pytest.raises(ValueError, match=f"calibration awq: {message}"):
        AWQ(**fields)


def test_a_block_that_no_token_reaches_is_named(tiny_llama):
    model = inserted(tiny_llama())
    with pytest.raises(ValueError, match="after input_layernorm: no usable token reaches it"):
        AWQ().equalize(model.model.layers[0], lambda: None)


def test_no_more_inputs_are_held_than_the_error_is_computed_with(monkeypatch):
    layer, held = nn.Linear(8, 8), []
    batches = [torch.randn(1, count, 8) for count in (7, 50, 43)]
    made = equalization.Inputs
    monkeypatch.setattr(equalization, "Inputs", lambda *fields: held.append(fields[2]) or made(*fields))
    pair = Pair("norm", nn.LayerNorm(8), {"layer": layer})
    found = equalization._observed([pair], lambda: [layer(x) for x in batches], 10)["norm"]
    tokens = torch.cat(batches, 1)[0]
    assert torch.equal(found.sample, tokens[torch.linspace(0, 99, 10).long()])
    assert torch.equal(found.absmax, tokens.abs().amax(0))
    torch.testing.assert_close(found.mean, tokens.abs().mean(0))
    assert sum(map(len, held)) == 2 * 10  # batch by batch, and together
