"""Every kind of layer trains with every estimator, and is damped, frozen and watched as a linear layer is."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from qat.calibration import CALIBRATIONS
from qat.diagnosis.health import Health
from qat.estimators import DSQ, LSQ, PACT, STE
from qat.fake_quantizer import Stage
from qat.functional import fake_quantize, quantize
from qat.insertion import insert, plan, quantizers, set_stage
from qat.nn import FakeQuantLayer
from qat.scheme import QuantSpec, SchemeMap, uniform
from qat.training import add_adapters
from qat.training.oscillation import Freezing, damping_gradient

OUT, IN = 8, 16
KINDS = ("linear", "embedding", "conv")
GROUP = QuantSpec(bits=4, granularity="group", group_size=8, scale_dtype="float32")
STATIC = QuantSpec(bits=8, granularity="tensor")
ESTIMATORS = {
    "ste": STE(), "ste_absmax": STE(follow="absmax"), "ste_mse": STE(follow="mse"),
    "lsq": LSQ(), "lsq_log": LSQ(relative=True), "dsq": DSQ(),
}  # fmt: skip
MODELS = {
    "linear": lambda: (nn.Linear(IN, OUT), torch.randn(5, IN)),
    "conv1d": lambda: (Conv1D(OUT, IN), torch.randn(5, IN)),
    "embedding": lambda: (nn.Embedding(OUT, IN), torch.tensor([[3, 3, 7], [1, 0, 3]])),
    "conv": lambda: (nn.Conv2d(4, OUT, 2), torch.randn(2, 4, 5, 5)),
}
each_kind = pytest.mark.parametrize("kind", MODELS)


def quantized(kind, spec=GROUP, estimator=None) -> tuple[nn.Sequential, FakeQuantLayer, torch.Tensor]:
    """A model of one layer that trains from MSE scales, and its input."""
    torch.manual_seed(0)
    layer, x = MODELS[kind]()
    nn.init.normal_(layer.weight)
    model = nn.Sequential(layer)
    insert(model, uniform(spec, kinds=KINDS), estimator)
    CALIBRATIONS["mse"](model, lambda: None)
    set_stage(model, Stage.TRAIN)
    return model, layer, x


def codes_of(layer) -> torch.Tensor:
    weight = layer.matrix.detach()
    return quantize(weight, layer.weight_quantizer.weight_scale(weight), layer.weight_quantizer.spec)


@each_kind
@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS.keys())
def test_every_kind_trains_by_the_gradient_that_its_estimator_defines(kind, granularity, estimator):
    spec = QuantSpec(bits=4, granularity=granularity, group_size=8 if granularity == "group" else None)
    _, layer, x = quantized(kind, spec, estimator)
    quantizer = layer.weight_quantizer
    scale = quantizer.weight_scale(layer.matrix.detach())
    plain = MODELS[kind]()[0]
    if layer.bias is not None:
        plain.load_state_dict({"weight": layer.weight, "bias": layer.bias})
    with torch.no_grad():
        layer.as_matrix(plain.weight).copy_(fake_quantize(layer.matrix, scale, spec))
    y, expected = layer(x), plain(x)
    upstream = torch.randn(y.shape)
    y.backward(upstream), expected.backward(upstream)
    # Sums of a few tens of float32 products of size 1, in another order.
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    grad = layer.as_matrix(plain.weight.grad)
    rows = scale.expand(OUT, -1) if kind == "embedding" else scale  # of a table, each row is quantized by itself
    weight_grad, scale_grad = estimator.backward(grad, layer.matrix.detach(), rows, spec, estimator.learns_scale)
    torch.testing.assert_close(layer.as_matrix(layer.weight.grad), weight_grad, rtol=1e-5, atol=1e-4)
    assert (quantizer.scale.grad is not None) == estimator.learns_scale
    if estimator.learns_scale:
        scale_grad = scale_grad.sum(0, keepdim=True) if len(scale) < len(scale_grad) else scale_grad
        torch.testing.assert_close(quantizer.scale.grad, scale_grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv"])
def test_inputs_of_every_kind_that_multiplies_may_learn_where_to_clip(kind):
    torch.manual_seed(0)
    layer, x = MODELS[kind]()
    insert(nn.Sequential(layer), uniform(GROUP, STATIC, kinds=KINDS), STE(), PACT())
    assert isinstance(layer.weight_quantizer.estimator, STE)
    layer.weight_quantizer.set_scale(torch.full((OUT, IN // 8), 0.05))
    layer.input_quantizer.set_scale(torch.tensor([1 / 127]))  # clips at 1
    set_stage(layer, Stage.TRAIN)
    layer(x).sum().backward()
    assert layer.input_quantizer.scale.grad.abs() > 0


def test_an_embedding_among_quantized_inputs_is_not_asked_for_one():
    model = nn.Sequential(nn.Embedding(OUT, IN), nn.Linear(IN, OUT))
    chosen = plan(model, uniform(GROUP, STATIC, kinds=KINDS), STE(), PACT())
    assert chosen["0"].input is None and chosen["1"].input == STATIC
    tables = {"0": uniform(GROUP).rules["*"], "*": uniform(GROUP, STATIC).rules["*"]}
    assert plan(model, SchemeMap(name="test", rules=tables, kinds=KINDS), STE(), PACT()) == chosen


def test_layers_of_one_table_share_one_estimator(tiny_llama):
    model = tiny_llama(tie=True)
    insert(model, uniform(GROUP, STATIC, ignore=(), kinds=KINDS), DSQ(), PACT())
    assert model.lm_head.weight_quantizer is model.model.embed_tokens.weight_quantizer
    assert {type(q.estimator) for q in quantizers(model) if q.spec == GROUP} == {DSQ}
    assert {type(q.estimator) for q in quantizers(model) if q.spec == STATIC} == {PACT}


@each_kind
@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS.keys())
def test_health_watches_the_rows_of_every_kind(kind, estimator):
    model, layer, _ = quantized(kind, GROUP, estimator)
    health, before = Health(), codes_of(layer)
    health.start(model)
    with torch.no_grad():
        layer.matrix[:2] *= -1  # of 8 rows
    health.step(model)
    changed = codes_of(layer) != before
    assert changed[:2].float().mean() > 0.8 and not changed[2:].any()
    assert health.look(model)["changed"] == changed.sum() / (OUT * IN)
    assert torch.equal(health.looked["0"].float(), codes_of(layer))


def test_health_under_lora_is_that_of_what_is_quantized():
    model, layer, _ = quantized("linear")
    add_adapters(model, r=1, lora_alpha=1)
    health = Health()
    health.start(model)
    with torch.no_grad():
        layer.lora_A.fill_(1.0)
        layer.lora_B[0] = 100.0  # the first row's weights are then beyond qmax
    health.step(model)
    figures, rest = health.look(model), layer.matrix.detach()[1:]
    scale = layer.weight_quantizer.weight_scale(layer.matrix.detach())[1:, :, None]
    ratio = rest.unflatten(1, (-1, 8)) / scale
    clipped = IN + int(((ratio < GROUP.qmin) | (ratio > GROUP.qmax)).sum())
    assert figures["clipped"] == clipped / (OUT * IN)


@each_kind
def test_weights_of_every_kind_are_damped_and_frozen_as_a_matrix(kind):
    _, layer, _ = quantized(kind)
    scale = layer.weight_quantizer.weight_scale(layer.matrix.detach())
    on_grid = fake_quantize(layer.matrix.detach(), scale, GROUP)
    assert damping_gradient(layer).shape == (OUT, IN)
    freezing = Freezing(layer, threshold=0.5, momentum=0.1)
    freezing.frozen[::2] = True
    before = layer.matrix.detach().clone()
    freezing.step()
    assert torch.equal(layer.matrix[::2], on_grid[::2])
    assert torch.equal(layer.matrix[1::2], before[1::2])
