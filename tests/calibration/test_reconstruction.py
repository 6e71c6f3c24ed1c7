"""Block reconstruction: what is learned ends on the grid, lowers the block's error, and survives a kill."""

import itertools

import pytest
import torch
from llama_data import batches, inserted, logits, runner
from torch import nn

from qat.calibration import RangeCalibration, Reconstruction
from qat.calibration.reconstruction import rounding_regularizer
from qat.fake_quantizer import Stage
from qat.functional import dequantize, floor_codes, quantize, rectified_sigmoid
from qat.insertion import insert, layers, set_stage
from qat.scheme import QuantScheme, QuantSpec, SchemeMap

MSE = RangeCalibration("mse")
BOTH = pytest.mark.parametrize("learn", ["rounding", "weights"])


def method(learn: str, **settings) -> Reconstruction:
    lr = {"rounding": 0.1, "weights": 1e-4}[learn]
    return Reconstruction(learn=learn, first=MSE, **{"steps": 20, "lr": lr, **settings})


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_h_and_regularizer_have_the_gradient_of_the_papers_formula():
    v = torch.tensor([-2.0, -0.7, 0.4, 1.5], dtype=torch.float64, requires_grad=True)
    h = (1.2 / (1 + torch.exp(-v.detach())) - 0.1).clip(0, 1)
    torch.testing.assert_close(rectified_sigmoid(v).detach(), h, rtol=1e-14, atol=0)
    torch.testing.assert_close(rounding_regularizer(v, 4.0).detach(), (1 - (2 * h - 1).abs() ** 4).mean())
    assert rectified_sigmoid(torch.tensor([-9.0, 9.0])).tolist() == [0.0, 1.0]
    assert torch.autograd.gradcheck(rectified_sigmoid, v)
    assert torch.autograd.gradcheck(lambda x: rounding_regularizer(x, 4.0), v)


def test_learned_rounding_of_one_layer_comes_close_to_the_best_of_all_choices():
    torch.manual_seed(1)
    layer = nn.Linear(8, 1, bias=False)
    x = torch.randn(64, 8) @ torch.randn(8, 8)  # correlated, so that errors can cancel
    weight = layer.weight.detach().clone()
    model = nn.Sequential(layer)
    insert(model, SchemeMap("test", {"*": QuantScheme(QuantSpec(bits=3, granularity="channel"))}))
    method("rounding", steps=400, lr=0.05)(model, lambda: model(x))
    layer = model[0]
    scale, spec = layer.weight_quantizer.scale.detach(), layer.scheme.weight

    def cost(codes):
        return float(((dequantize(codes, scale) - weight) @ x.T).square().sum())

    lower, _ = floor_codes(weight, scale, spec)
    choices = [lower + torch.tensor([bits]) for bits in itertools.product((0, 1), repeat=8)]
    learned = quantize(layer.weight.detach(), scale, spec)
    nearest, best = cost(quantize(weight, scale, spec)), min(map(cost, choices))
    assert any(torch.equal(learned, choice) for choice in choices)
    assert cost(learned) < nearest
    assert nearest - cost(learned) >= 0.9 * (nearest - best)


@BOTH
def test_the_block_error_falls_and_weights_end_on_the_grid(tiny_llama, learn):
    model = inserted(tiny_llama())
    errors, whole = [], Reconstruction.reconstruct

    class Noting(Reconstruction):
        def reconstruct(self, block, run):
            errors.append(whole(self, block, run))
            return errors[-1]

    Noting(**vars(method(learn)))(model, runner(model))
    assert len(errors) == 2 and all(after < before for before, after in errors)
    answered = logits(model)
    set_stage(model, Stage.FROZEN)
    assert torch.equal(logits(model), answered)  # fq(w) == w


@BOTH
def test_padding_never_moves_what_is_learned(tiny_llama, learn):
    one, two = inserted(tiny_llama()), inserted(tiny_llama())
    method(learn, steps=5)(one, runner(one, batches(junk=0)))
    method(learn, steps=5)(two, runner(two, batches(junk=7)))
    assert same(one.model.layers, two.model.layers)


@BOTH
def test_a_killed_reconstruction_goes_on_to_the_same_bits(tiny_llama, tmp_path, learn, monkeypatch):
    whole, killed, again = (inserted(tiny_llama()) for _ in range(3))
    method(learn, steps=5)(whole, runner(whole))
    plain, treated = Reconstruction.reconstruct, []

    def dies(self, block, run):
        if block is killed.model.layers[1]:
            raise KeyboardInterrupt
        treated.append(block)
        return plain(self, block, run)

    monkeypatch.setattr(Reconstruction, "reconstruct", dies)
    with pytest.raises(KeyboardInterrupt):
        method(learn, steps=5)(killed, runner(killed), tmp_path)
    treated.clear()
    method(learn, steps=5)(again, runner(again), tmp_path)
    assert treated == [again.model.layers[1]]
    assert same(whole, again)


def test_nan_stops_with_the_name_of_its_block_and_finished_blocks_are_kept(tiny_llama, tmp_path):
    model = inserted(tiny_llama())
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[0] = torch.nan
    with pytest.raises(ValueError, match=r"model\.layers\.1: .*NaN"):
        method("rounding", steps=3)(model, runner(model), tmp_path)
    assert len(list(tmp_path.glob("model.layers.0-*"))) == 1


def test_activations_stay_quantized_while_a_block_learns(tiny_llama, scheme):
    model, seen = inserted(tiny_llama(), scheme("w4a8-g32")), []
    quantizer = next(iter(layers(model).values())).input_quantizer
    quantizer.register_forward_pre_hook(lambda q, _: seen.append(torch.is_grad_enabled() and q.active))
    method("rounding", steps=4)(model, runner(model))
    assert sum(seen) == 4
