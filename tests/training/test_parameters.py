import pytest
import torch
from torch import nn

from qat.estimators import LSQ, STE
from qat.fake_quantizer import Stage
from qat.insertion import insert, set_stage
from qat.scheme import QuantScheme, QuantSpec, SchemeMap
from qat.training import parameter_groups, scale_parameters

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
