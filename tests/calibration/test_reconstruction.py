"""Block reconstruction: what is learned ends on the grid, lowers the block's error, and survives a kill."""

import itertools

import pytest
import torch
from llama_data import G32, batches, inserted, logits, runner
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.pytorch_utils import Conv1D

from qat.calibration import AWQ, GPTQ, RangeCalibration, Reconstruction
from qat.calibration.reconstruction import rounding_regularizer
from qat.estimators import LSQ
from qat.fake_quantizer import Stage
from qat.functional import dequantize, floor_codes, quantize, rectified_sigmoid
from qat.insertion import insert, layers, set_stage
from qat.scheme import QuantScheme, QuantSpec, SchemeMap
from qat.structure import unfuse_experts

MSE = RangeCalibration("mse")
ODD = QuantScheme(weight=QuantSpec(bits=2, grid="odd", granularity="group", group_size=32))
BOTH = pytest.mark.parametrize("learn", ["rounding", "weights"])


def method(learn: str, **settings) -> Reconstruction:
    lr = {"rounding": 0.1, "weights": 1e-4}[learn]
    return Reconstruction(learn=learn, first=MSE, **{"steps": 12, "lr": lr, **settings})


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_h_and_regularizer_are_the_papers_formulas_with_their_gradients():
    v = torch.tensor([-2.0, -0.7, 0.4, 1.5], dtype=torch.float64, requires_grad=True)
    zeta, gamma = 1.1, -0.1  # arXiv 2004.10568, eq. 23
    h = (torch.sigmoid(v.detach()) * (zeta - gamma) + gamma).clip(0, 1)
    torch.testing.assert_close(rectified_sigmoid(v).detach(), h, rtol=1e-14, atol=0)
    for beta in (2.0, 20.0):
        torch.testing.assert_close(rounding_regularizer(v, beta).detach(), (1 - (2 * h - 1).abs() ** beta).mean())
    assert rectified_sigmoid(torch.tensor([-9.0, 9.0])).tolist() == [0.0, 1.0]
    assert rounding_regularizer(torch.tensor([-9.0, 9.0]), 4.0) == 0
    assert rounding_regularizer(torch.zeros(3), 4.0) == 1
    assert torch.autograd.gradcheck(rectified_sigmoid, v)
    assert torch.autograd.gradcheck(lambda x: rounding_regularizer(x, 4.0), v)


@pytest.mark.parametrize("grid", ["full", "odd"])
@pytest.mark.parametrize("bits", [2, 4])
def test_floor_codes_are_on_the_grid_and_enclose_what_the_grid_covers(bits, grid):
    spec, scale = QuantSpec(bits=bits, granularity="channel", grid=grid), torch.tensor([[0.3], [-0.2]])
    x = torch.linspace(-4, 4, 41).expand(2, 41)
    lower, rest = floor_codes(x, scale, spec)
    ratio = x / scale
    covered = (ratio >= spec.qmin) & (ratio <= spec.qmax)
    assert set(lower.unique().tolist()) == set(range(spec.qmin, spec.qmax, spec.spacing))
    back = lower + spec.spacing * rest
    torch.testing.assert_close(back[covered], ratio[covered], rtol=0, atol=2**-20)  # one rounding below 16
    assert ((rest >= 0) & (rest <= 1)).all()
    rounded = quantize(x, scale, spec)  # nearest is always one of the two choices
    assert ((rounded == lower) | (rounded == lower + spec.spacing)).all()


@pytest.mark.parametrize("grid", ["full", "odd"])
def test_learned_rounding_of_one_layer_comes_to_the_best_of_all_choices(grid):
    torch.manual_seed(0)
    layer, spec = nn.Linear(6, 12, bias=False), QuantSpec(bits=3, granularity="channel", grid=grid)
    x = torch.randn(64, 1) + torch.randn(64, 6)  # inputs have much in common, so that errors can cancel
    weight = layer.weight.detach().clone()
    model = nn.Sequential(layer)
    insert(model, SchemeMap(name="test", rules={"*": QuantScheme(weight=spec)}))
    method("rounding", steps=300, lr=0.05, regularization=10.0)(model, lambda: model(x))
    matrix, scale = model[0].matrix.detach(), model[0].weight_quantizer.scale.detach()

    def cost(codes):  # of each row
        return ((dequantize(codes, scale) - weight) @ x.T).square().sum(-1)

    lower, _ = floor_codes(weight, scale, spec)
    up = spec.spacing * torch.tensor(list(itertools.product((0, 1), repeat=6)))
    best = torch.stack([cost(lower + choice) for choice in up]).amin(0)
    learned, nearest = cost(quantize(matrix, scale, spec)), cost(quantize(weight, scale, spec))
    assert (learned <= 1.0001 * best).float().mean() >= 0.9 > 0.8 >= (nearest <= 1.0001 * best).float().mean()
    assert (nearest - learned).sum() >= 0.95 * (nearest - best).sum()


@BOTH
def test_the_error_of_each_block_falls_and_weights_end_on_the_grid(tiny_llama, learn):
    model = inserted(tiny_llama())
    errors, whole = [], Reconstruction.reconstruct

    class Noting(Reconstruction):
        def reconstruct(self, block, run, targets=None):
            errors.append(whole(self, block, run, targets))
            return errors[-1]

    Noting(**vars(method(learn, steps=40)))(model, runner(model))
    assert len(errors) == 2 and all(after < before for before, after in errors)
    answered = logits(model)
    set_stage(model, Stage.FROZEN)
    assert torch.equal(logits(model), answered)  # fq(w) == w


@pytest.mark.parametrize("scheme", [G32, ODD], ids=["full", "odd"])
def test_hardened_codes_are_the_floor_or_one_above(tiny_llama, scheme):
    model = inserted(tiny_llama(), scheme)
    before = {name: layer.matrix.detach().clone() for name, layer in layers(model).items()}
    method("rounding", steps=4)(model, runner(model))
    up = []
    for name, layer in layers(model).items():
        scale, spec = layer.weight_quantizer.scale.detach(), layer.scheme.weight
        lower, _ = floor_codes(before[name], scale, spec)
        codes = quantize(layer.matrix.detach(), scale, spec)
        up.append(codes - lower)
        assert codes.min() >= spec.qmin and codes.max() <= spec.qmax
    assert torch.cat([bits.flatten() for bits in up]).unique().tolist() == [0, scheme.weight.spacing]


@pytest.mark.parametrize("scheme", [G32, ODD], ids=["full", "odd"])
def test_after_gptq_a_code_stays_or_moves_one_step_towards_the_float_weight(tiny_llama, scheme):
    model, given = inserted(tiny_llama(), scheme), inserted(tiny_llama(), scheme)
    GPTQ()(given, runner(given))
    before = {name: layer.matrix.detach().clone() for name, layer in layers(model).items()}
    Reconstruction()(model, runner(model))
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"):  # GPTQ saw the same inputs
        layer, spec = layers(model)[name], scheme.weight
        scale = layer.weight_quantizer.scale.detach()
        chosen = quantize(layers(given)[name].matrix.detach(), scale, spec)
        moved = quantize(layer.matrix.detach(), scale, spec) - chosen
        ratio = (before[name].unflatten(1, (-1, 32)) / scale.unsqueeze(-1)).flatten(1)
        covered = (ratio >= spec.qmin) & (ratio <= spec.qmax)  # beyond the grid there is no code on the weight's side
        assert moved.abs().max() == spec.spacing
        assert (moved * (ratio - chosen) >= 0)[covered].all()


def test_a_later_block_answers_for_the_float_model_and_not_for_its_own_inputs(tiny_llama):
    model, seen = inserted(tiny_llama()), []
    hidden = []
    for block in model.model.layers:
        block.register_forward_hook(lambda *_: hidden.append(_[2].detach()))
    runner(model)()
    of_float, hidden[:] = [hidden[1], hidden[3]], []  # of the last block, for both batches

    class Noting(Reconstruction):
        def reconstruct(self, block, run, targets=None):
            seen.append([target.clone() for target in targets])
            return super().reconstruct(block, run, targets)

    Noting(**vars(method("rounding", steps=2)))(model, runner(model))
    assert all(torch.equal(a, b) for a, b in zip(seen[1], of_float, strict=True))


@BOTH
def test_padding_never_moves_what_is_learned(tiny_llama, learn):
    one, two = inserted(tiny_llama()), inserted(tiny_llama())
    method(learn, steps=3)(one, runner(one, batches(junk=0)))
    method(learn, steps=3)(two, runner(two, batches(junk=7)))
    assert same(one.model.layers, two.model.layers)


@BOTH
@pytest.mark.parametrize("offload", [False, True], ids=["kept", "offloaded"])
def test_a_killed_reconstruction_goes_on_to_the_same_bits(tiny_llama, tmp_path, learn, offload, monkeypatch):
    whole, killed, again = (inserted(tiny_llama()) for _ in range(3))
    method(learn, steps=3)(whole, runner(whole))
    plain, treated = Reconstruction.reconstruct, []

    def dies(self, block, run, targets=None):
        if block is killed.model.layers[1]:
            raise KeyboardInterrupt
        treated.append(block)
        return plain(self, block, run, targets)

    monkeypatch.setattr(Reconstruction, "reconstruct", dies)
    with pytest.raises(KeyboardInterrupt):
        method(learn, steps=3, offload=offload)(killed, runner(killed), tmp_path)
    treated.clear()
    method(learn, steps=3, offload=offload)(again, runner(again), tmp_path)
    assert treated == [again.model.layers[1]]
    assert same(whole, again)


def test_what_another_estimator_learned_is_not_taken_for_finished(tiny_llama, tmp_path):
    for estimator in (LSQ(), LSQ(scale_gradient=False)):
        model = inserted(tiny_llama())
        for layer in layers(model).values():
            layer.weight_quantizer.estimator = estimator
        method("weights", steps=1)(model, runner(model), tmp_path)
    assert len(list(tmp_path.glob("model.layers.0-*"))) == 2


def test_nan_stops_with_its_block_and_layer_and_finished_blocks_are_kept(tiny_llama, tmp_path):
    model = inserted(tiny_llama())
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight[0] = torch.nan
    with pytest.raises(ValueError, match=r"model\.layers\.1: layer mlp\.gate_proj takes NaN .* the model's weights"):
        method("rounding", steps=2)(model, runner(model), tmp_path)
    assert len(list(tmp_path.glob("model.layers.0-*"))) == 1


def test_a_rate_that_blows_up_leaves_the_block_as_it_started(tiny_llama):
    model, rounded = inserted(tiny_llama()), inserted(tiny_llama())
    MSE(rounded, runner(rounded))
    with pytest.raises(ValueError, match=r"model\.layers\.0: .* at step [1-9]; lower lr"):
        method("weights", lr=1e30)(model, runner(model))
    assert same(model.model.layers[0], rounded.model.layers[0])


@BOTH
def test_a_block_that_learns_nothing_ends_on_the_grid_of_what_came_first(tiny_llama, learn):
    model, rounded = inserted(tiny_llama()), inserted(tiny_llama())
    MSE(rounded, runner(rounded))
    set_stage(rounded, Stage.FROZEN)
    method(learn, steps=1, lr=1e3)(model, runner(model))
    assert torch.equal(logits(model), logits(rounded))


def test_a_dtype_that_cannot_hold_the_grid_is_named_before_anything_learns(tiny_llama, monkeypatch):
    model = inserted(tiny_llama(torch.float16))
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1e-5)
    monkeypatch.setattr(Reconstruction, "_learn_rounding", None)
    with pytest.raises(ValueError, match=r"model\.layers\.0: layer mlp\.up_proj: float16 weights cannot hold"):
        method("rounding")(model, runner(model))


def test_activations_stay_quantized_while_a_block_learns(tiny_llama, scheme):
    model, seen = inserted(tiny_llama(), scheme("w4a8-g32")), []
    quantizer = next(iter(layers(model).values())).input_quantizer
    quantizer.register_forward_pre_hook(lambda q, _: seen.append(torch.is_grad_enabled() and q.active))
    method("rounding", steps=4)(model, runner(model))
    assert sum(seen) == 4


def test_experts_of_a_block_are_no_chain_and_those_without_a_token_keep_their_start():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = MixtralConfig(**sizes, num_hidden_layers=2, vocab_size=256, num_local_experts=8, num_experts_per_tok=1)

    def made():
        model = MixtralForCausalLM(config).eval()
        unfuse_experts(model)
        return inserted(model, G32)

    model, full = made(), made()
    data = [{key: value[:1, :4] for key, value in batch.items()} for batch in batches()]
    method("rounding", steps=2)(model, runner(model, data))
    Reconstruction(first=GPTQ(), steps=1)(full, runner(full))
    assert all(torch.isfinite(layer.weight).all() for m in (model, full) for layer in layers(m).values())


def test_a_square_layer_stored_transposed_learns_in_its_own_layout():
    torch.manual_seed(0)
    x, linear, conv = torch.randn(64, 32), nn.Linear(32, 32), Conv1D(32, 32)
    with torch.no_grad():
        conv.weight.copy_(linear.weight.T)
        conv.bias.copy_(linear.bias)
    ends = []
    for layer in (linear, conv):
        model = nn.Sequential(layer)
        insert(model, SchemeMap(name="test", rules={"*": G32}))
        method("rounding")(model, lambda model=model: model(x))
        ends.append(quantize(model[0].matrix.detach(), model[0].weight_quantizer.scale.detach(), G32.weight))
    assert (ends[0] == ends[1]).float().mean() > 0.99  # sums are ordered differently


def test_what_it_cannot_treat_is_refused_before_anything_runs(tiny_llama):
    def never():
        raise AssertionError("ran")

    with pytest.raises(ValueError, match=r"bfloat16.*float32"):
        method("weights")(inserted(tiny_llama(torch.bfloat16)), never)
    model = inserted(tiny_llama())
    for layer in layers(model).values():
        layer.weight_quantizer.estimator = LSQ(relative=True)
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj.*estimator=lsq"):
        method("weights")(model, never)
    with pytest.raises(ValueError, match="nest the other way round"):
        Reconstruction(first=AWQ())
    with pytest.raises(ValueError, match="learn must be"):
        Reconstruction(learn="all")
