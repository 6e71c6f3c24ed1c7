import math

import pytest
import torch
from torch import nn

from qat.diagnosis.health import FIGURES, LIMITS, Health, gradient_ratio, unusual
from qat.estimators import LSQ, STE
from qat.fake_quantizer import Stage
from qat.insertion import insert, layers, set_stage
from qat.scheme import QuantScheme, QuantSpec, SchemeMap

SPEC = QuantSpec(bits=4, granularity="group", group_size=8, scale_dtype="float32")


def model(estimator=None, rows=4, spec=SPEC, stage=Stage.TRAIN) -> nn.Module:
    """Two layers; all weights at code 0 of scales of 0.5."""
    network = nn.Sequential(nn.Linear(16, rows, bias=False), nn.Linear(rows, 8, bias=False) if rows == 8 else nn.ReLU())
    insert(network, SchemeMap(name="test", rules={"*": QuantScheme(weight=spec)}), estimator or LSQ())
    for layer in layers(network).values():
        nn.init.zeros_(layer.weight)
        layer.weight_quantizer.set_scale(torch.full_like(layer.weight_quantizer.scale, 0.5))
    set_stage(network, stage)
    return network


def move(network, row, value, name="0"):
    with torch.no_grad():
        network.get_submodule(name).weight[row] = value


def test_the_figures_are_shares_of_all_weights_and_steps():
    network, health = model(rows=8), Health()  # 8 x 16 and 8 x 8: 192 weights
    health.start(network)
    for value in (0.5, 0.0, 0.5):  # codes 1, 0, 1: turns back in two of three steps
        move(network, 0, value)
        health.step(network)
    move(network, 1, 9.0)  # clipped; seen by the look alone
    figures = health.look(network)
    assert figures["oscillation"] == 2 * 16 / (192 * 3)
    assert figures["changed"] == 32 / 192
    assert figures["clipped"] == 16 / 192
    assert figures["scale_drift"] == 0


def test_a_look_begins_anew_but_remembers_directions():
    network, health = model(), Health()
    health.start(network)
    move(network, 0, 0.5)
    health.step(network)
    assert health.look(network)["oscillation"] == 0
    move(network, 0, 0.0)
    health.step(network)
    figures = health.look(network)
    assert figures["oscillation"] == figures["changed"] == 1 / 4


@pytest.mark.parametrize(("estimator", "drift"), [(LSQ(), 0.25), (STE(), 0.0)], ids=["learned", "calibrated"])
def test_drift_is_the_mean_relative_change_of_the_scales(estimator, drift):
    network, health = model(estimator), Health()
    health.start(network)
    if estimator.learns_scale:
        network[0].weight_quantizer.set_scale(torch.tensor([[0.5, 0.75], [0.25, 0.5]] * 2))
    health.step(network)
    assert health.look(network)["scale_drift"] == drift


def test_the_drift_of_scales_that_follow_the_weights_is_that_of_the_scales_in_use():
    network, health = model(STE(follow="absmax")), Health()
    with torch.no_grad():
        network[0].weight.fill_(1.0)
    health.start(network)
    move(network, 0, 1.5)
    health.step(network)
    assert health.look(network)["scale_drift"] == pytest.approx(0.5 / 4, rel=1e-6)


@pytest.mark.parametrize("spec", [SPEC, QuantSpec(bits=4, granularity="tensor")], ids=["group", "tensor"])
def test_a_sample_of_rows_stands_for_tall_weights(spec):
    network, health = model(rows=200, spec=spec), Health()
    health.start(network)
    move(network, slice(0, 100), 0.5)
    health.step(network)
    watched = health.looked["0"].shape[0]
    assert watched == (200 if spec.granularity == "tensor" else math.ceil(200 / 7))
    assert health.look(network)["changed"] == pytest.approx(0.5, abs=1 / watched)


def test_layers_that_are_float_are_not_watched():
    network, health = model(stage=Stage.FLOAT), Health()
    health.start(network)
    assert not health.turns
    with pytest.raises(ValueError, match="health needs active quantizers"):
        health.look(network)


def test_health_goes_on_from_a_checkpoint():
    network, health = model(), Health()
    health.start(network)
    move(network, 0, 0.5)
    health.step(network)
    other = Health()
    other.load_state_dict(health.state_dict())
    figures = []
    for watcher in (health, other):
        move(network, 0, 0.0)
        watcher.step(network)
        figures.append(watcher.look(network))
    assert figures[0] == figures[1]
    assert figures[0]["oscillation"] == 1 / 8


def test_the_gradient_ratio_is_the_published_one():
    """R of arXiv 1902.08153, section 2.2, over both layers."""
    network = model(rows=8)
    generator = torch.Generator().manual_seed(0)
    for layer in layers(network).values():
        with torch.no_grad():
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator))
    network(torch.randn(8, 16, generator=generator)).square().sum().backward()
    norms = {}
    for kind in ("weight", "weight_quantizer.scale"):
        both = [network.get_parameter(f"{name}.{kind}") for name in "01"]
        for what, tensors in {"value": both, "grad": [p.grad for p in both]}.items():
            norms[kind, what] = torch.cat([t.detach().flatten() for t in tensors]).norm().item()
    scale, weight = (norms[k, "grad"] / norms[k, "value"] for k in ("weight_quantizer.scale", "weight"))
    assert gradient_ratio(network).item() == pytest.approx(scale / weight, rel=1e-5)


def test_the_gradient_ratio_of_both_domains_is_the_same():
    ratios = []
    for relative in (False, True):
        network = model(LSQ(relative=relative))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            network[0].weight.copy_(torch.randn(4, 16, generator=generator))
        network[0](torch.randn(8, 16, generator=generator)).square().sum().backward()
        ratios.append(gradient_ratio(network).item())
    assert ratios[0] == pytest.approx(ratios[1], rel=1e-5)


def test_without_learned_scales_there_is_no_gradient_ratio():
    network = model(STE())
    network[0](torch.ones(1, 16)).sum().backward()
    assert gradient_ratio(network) is None


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_out_of_range_is_named_with_its_remedy(name):
    _, high, remedy = LIMITS[name]
    usual = {n: (lo + hi) / 2 for n, (lo, hi, _) in LIMITS.items()}
    assert unusual(usual) == unusual(dict.fromkeys(FIGURES)) == {}
    assert list(unusual({**usual, name: 2 * high})) == [name]
    assert remedy in unusual({**usual, name: 2 * high})[name]
    said = {bits: name in unusual({**usual, name: 2 * high}, bits) for bits in ((2,), (4,), (8,), (2, 8))}
    assert said[4,]
    assert said[2,] == (name != "clipped") and said[8,] == (name not in ("oscillation", "changed"))
    assert said[2, 8] == (said[2,] and said[8,])
