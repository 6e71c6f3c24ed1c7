import pytest
import torch
from torch import nn

from qat.estimators import LSQ, STE, FakeQuantize
from qat.fake_quantizer import Stage
from qat.insertion import insert, set_stage
from qat.nn import FakeQuantLinear
from qat.scheme import QuantScheme, QuantSpec, SchemeMap
from qat.training import parameter_groups, scale_parameters, scale_steps

STATIC = QuantScheme(weight=QuantSpec(bits=8, granularity="channel"), input=QuantSpec(bits=8, granularity="tensor"))


def network(estimator):
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2, bias=False))
    insert(model, SchemeMap(name="test", rules={"*": STATIC}), estimator)
    return model


def test_every_parameter_is_in_one_group():
    model = network(LSQ())
    matrices, vectors, scales = parameter_groups(model, lr=1e-3, scale_lr=1e-5, weight_decay=0.1)
    assert [tuple(p.shape) for p in matrices["params"]] == [(4, 4), (2, 4)]
    assert [tuple(p.shape) for p in vectors["params"]] == [(4,), (4,), (4,)]
    assert [tuple(p.shape) for p in scales["params"]] == [(4, 1), (1,), (2, 1), (1,)]
    assert [g["lr"] for g in (matrices, vectors, scales)] == [1e-3, 1e-3, 1e-5]
    assert [g["weight_decay"] for g in (matrices, vectors, scales)] == [0.1, 0, 0]
    torch.optim.AdamW([matrices, vectors, scales])


def test_scales_that_do_not_learn_are_in_no_group():
    model = network(STE())
    assert scale_parameters(model) == []
    groups = parameter_groups(model, lr=1e-3, scale_lr=1e-5)
    assert len(groups) == 2
    assert sum(len(g["params"]) for g in groups) == 5


@pytest.mark.parametrize("stage", list(Stage), ids=lambda s: s.name)
def test_learned_scales_have_their_group_whatever_the_stage(stage):
    """A group that appears only later breaks schedulers; a resumed optimizer needs the same groups."""
    model = network(LSQ())
    set_stage(model, stage)
    assert [len(g["params"]) for g in parameter_groups(model, lr=1e-3, scale_lr=1e-5)] == [2, 3, 4]


def test_frozen_weights_are_left_out():
    model = network(LSQ())
    model[0].weight.requires_grad_(False)
    assert [len(g["params"]) for g in parameter_groups(model, lr=1e-3, scale_lr=1e-5)] == [1, 3, 4]


def test_a_float_model_has_no_group_of_scales():
    assert len(parameter_groups(nn.Linear(2, 2), lr=1e-3, scale_lr=1e-5)) == 2


def trained_by(optimizer, estimator, logarithm, steps=20):
    """Scales of one INT4 weight after some steps; with `logarithm`, autograd on a stored log2 |s| beside it."""
    spec = QuantSpec(bits=4, granularity="group", group_size=16, scale_dtype="float32")
    generator = torch.Generator().manual_seed(0)
    weight, target = (torch.randn(4, 32, generator=generator) for _ in range(2))
    scale = 0.05 + 0.2 * torch.rand(4, 2, generator=generator)
    scale[::2] *= -1
    layer = nn.Linear(32, 4, bias=False)
    layer = FakeQuantLinear.adopt(layer, QuantScheme(weight=spec), estimator)
    layer.weight_quantizer.set_scale(scale)
    layer.weight_quantizer.set_stage(Stage.TRAIN)
    own = nn.Parameter(scale.abs().log2())
    learned = own if logarithm else layer.weight_quantizer.scale
    sgd = optimizer([learned])
    if not logarithm:
        scale_steps(sgd, layer)
    for _ in range(steps):
        sgd.zero_grad()
        if logarithm:  # the gradient of LSQ, carried to the logarithm by autograd
            used = torch.exp2(own) * scale.sign()
            y = FakeQuantize.apply(weight, used, used.detach(), spec, LSQ())
        else:
            y = FakeQuantize.apply(weight, learned, learned.detach(), spec, estimator)
        (y - target).square().sum().backward()
        sgd.step()
    return torch.exp2(own.detach()) * scale.sign() if logarithm else learned.detach(), scale


@pytest.mark.parametrize(
    "optimizer",
    [lambda p: torch.optim.SGD(p, 1e-3, momentum=0.9), lambda p: torch.optim.AdamW(p, 0.02, weight_decay=0.0)],
    ids=["sgd", "adamw"],
)
def test_relative_steps_are_those_of_a_parameter_that_is_the_logarithm(optimizer):
    ours, start = trained_by(optimizer, LSQ(relative=True), logarithm=False)
    expected, _ = trained_by(optimizer, LSQ(), logarithm=True)
    assert (ours / start).log2().abs().max() > 0.05  # they did move
    # 20 steps, each rounding log2 |s| below 8 to 2^-22 and the scale to 2^-24, with gradients that follow.
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=0)


def test_a_scale_that_took_no_step_keeps_its_bits():
    layer = FakeQuantLinear.adopt(nn.Linear(8, 4), QuantScheme(weight=STATIC.weight), LSQ(relative=True))
    scale = layer.weight_quantizer.scale
    layer.weight_quantizer.set_scale(0.1 * torch.rand_like(scale) + 0.01)
    before = scale.detach().clone()
    optimizer = torch.optim.Adam([scale])
    scale_steps(optimizer, layer)
    optimizer.step()
    assert torch.equal(scale.detach(), before)


@pytest.mark.parametrize("relative", [False, True], ids=["linear", "relative"])
def test_a_scale_stays_away_from_zero_after_every_step(relative):
    layer = FakeQuantLinear.adopt(nn.Linear(8, 4), QuantScheme(weight=STATIC.weight), LSQ(relative=relative))
    scale = layer.weight_quantizer.scale
    layer.weight_quantizer.set_scale(torch.full_like(scale, 2.0**-60))
    optimizer = torch.optim.SGD([scale], lr=200.0 if relative else 2.0**-60)
    handles = scale_steps(optimizer, layer)
    scale.grad = torch.ones_like(scale)
    optimizer.step()
    assert (scale.detach() == 2.0**-64).all()
    for handle in handles:
        handle.remove()
    with torch.no_grad():
        scale.zero_()
    optimizer.step()
    assert (scale.detach() < 0).all()


def test_scales_may_have_a_decay_of_their_own():
    groups = parameter_groups(network(LSQ()), lr=1.0, scale_lr=0.1, weight_decay=0.5, scale_decay=0.25)
    assert [g["weight_decay"] for g in groups] == [0.5, 0.0, 0.25]
