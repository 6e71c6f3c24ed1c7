import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from qat.estimators import LSQ, STE, FakeQuantize
from qat.fake_quantizer import Stage
from qat.functional import fake_quantize
from qat.nn import FakeQuantLinear
from qat.scheme import QuantScheme, QuantSpec

OUT, IN = 6, 16
SCHEMES = {
    "tensor": QuantScheme(weight=QuantSpec(bits=4, granularity="tensor")),
    "channel": QuantScheme(weight=QuantSpec(bits=4, granularity="channel")),
    "group": QuantScheme(weight=QuantSpec(bits=4, granularity="group", group_size=4)),
    "dynamic": QuantScheme(
        weight=QuantSpec(bits=4, granularity="channel"),
        input=QuantSpec(bits=8, granularity="token", dynamic=True, absmax_rule="qmax"),
    ),
    "static": QuantScheme(
        weight=QuantSpec(bits=4, granularity="channel"), input=QuantSpec(bits=8, granularity="tensor")
    ),
}


def integers(*shape: int, seed: int, most: int = 3) -> torch.Tensor:
    return torch.randint(-most, most + 1, shape, generator=torch.Generator().manual_seed(seed)).float()


def layer(scheme="group", bias=True, dtype=torch.float32, estimator=None, stage=Stage.TRAIN) -> FakeQuantLinear:
    """Weights are multiples of 1/8 from -2.5 to 2.5, scales are powers of two: all sums below are exact."""
    linear = nn.Linear(IN, OUT, bias=bias, dtype=dtype)
    with torch.no_grad():
        linear.weight.copy_(integers(OUT, IN, seed=1, most=20) / 8)
        if bias:
            linear.bias.copy_(integers(OUT, seed=2))
    adopted = FakeQuantLinear.adopt(linear, SCHEMES[scheme], estimator or LSQ())
    shape = adopted.weight_quantizer.scale.shape
    exponents = torch.arange(shape.numel()).reshape(shape) % 2
    adopted.weight_quantizer.set_scale(2.0 ** (-2 - exponents))
    if scheme == "static":
        adopted.input_quantizer.set_scale(torch.tensor([0.5]))
    for quantizer in adopted.quantizers:
        quantizer.set_stage(stage)
    return adopted


def unfused(module: FakeQuantLinear, x: torch.Tensor) -> torch.Tensor:
    """The same layer, put together from the quantizer and `F.linear`."""
    quantizer = module.weight_quantizer
    if module.input_quantizer is not None:
        x = module.input_quantizer(x)
    scale = quantizer.weight_scale(module.weight)
    weight = FakeQuantize.apply(module.weight, quantizer.scale, scale, quantizer.spec, quantizer.estimator)
    return F.linear(x, weight, module.bias)


def gradients(module, x, run, grad):
    module.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    y = run(module, x)
    y.backward(grad.to(y.dtype))
    return {"y": y.detach(), "x": x.grad, **{n: p.grad for n, p in module.named_parameters()}}


def assert_same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert (value is None) == (b[name] is None), name
        assert value is None or (value.dtype == b[name].dtype and torch.equal(value, b[name])), name


@pytest.mark.parametrize("shape", [(IN,), (5, IN), (2, 3, IN)], ids=["1-D", "2-D", "3-D"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("scheme", ["tensor", "channel", "group", "static"])
@pytest.mark.parametrize("estimator", [LSQ(), STE()], ids=["lsq", "ste"])
def test_the_fused_product_equals_its_parts_bit_for_bit(scheme, bias, shape, estimator):
    module, x = layer(scheme, bias, estimator=estimator), integers(*shape, seed=3)
    grad = integers(*shape[:-1], OUT, seed=4)
    fused = gradients(module, x, nn.Module.__call__, grad)
    assert_same(fused, gradients(module, x, unfused, grad))
    assert fused["weight"].any() and (fused["weight"] == 0).any(), "some weights are clipped, some are not"
    assert (fused["weight_quantizer.scale"] is None) == isinstance(estimator, STE)


def test_dynamic_activations_fused_and_not_agree_to_the_accumulation_order():
    module, x, grad = layer("dynamic"), torch.randn(2, 3, IN), torch.randn(2, 3, OUT)
    fused, parts = gradients(module, x, nn.Module.__call__, grad), gradients(module, x, unfused, grad)
    for name, value in fused.items():
        # Sums of at most 16 float32 products of magnitude below 2^5.
        torch.testing.assert_close(value, parts[name], rtol=0, atol=16 * 32 * 2**-23, msg=name)


@pytest.mark.parametrize("scheme", ["tensor", "channel", "group"])
def test_under_bfloat16_autocast_the_fused_product_equals_its_parts(scheme):
    module, x, grad = layer(scheme), integers(2, 3, IN, seed=3), integers(2, 3, OUT, seed=4)
    with torch.autocast("cpu", torch.bfloat16):
        fused = gradients(module, x, nn.Module.__call__, grad)
        parts = gradients(module, x, unfused, grad)
    assert fused["y"].dtype == torch.bfloat16
    assert fused["weight"].dtype == torch.float32
    assert_same(fused, parts)


@pytest.mark.parametrize("scheme", ["tensor", "channel", "group", "static"])
def test_bfloat16_weights_are_quantized_as_they_are(scheme):
    module = layer(scheme, dtype=torch.bfloat16)
    x, grad = integers(2, 3, IN, seed=3).bfloat16(), integers(2, 3, OUT, seed=4)
    fused = gradients(module, x, nn.Module.__call__, grad)
    assert fused["y"].dtype == fused["weight"].dtype == torch.bfloat16
    assert fused["weight_quantizer.scale"].dtype == torch.float32
    assert_same(fused, gradients(module, x, unfused, grad))


@pytest.mark.parametrize("scheme", ["group", "dynamic", "static"])
def test_activation_checkpointing_changes_nothing(scheme):
    module, x, grad = layer(scheme), torch.randn(2, 3, IN), torch.randn(2, 3, OUT)
    again = gradients(module, x, lambda m, v: checkpoint(m, v, use_reentrant=False), grad)
    assert_same(gradients(module, x, nn.Module.__call__, grad), again)


@pytest.mark.parametrize("scheme", list(SCHEMES))
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("stage", [Stage.FLOAT, Stage.OBSERVE], ids=["float", "observe"])
def test_before_training_the_layer_is_its_linear_to_the_bit(scheme, autocast, stage):
    torch.manual_seed(0)
    linear = nn.Linear(IN, OUT)
    module = FakeQuantLinear.adopt(copy.deepcopy(linear), SCHEMES[scheme], LSQ())
    for quantizer in module.quantizers:
        quantizer.set_stage(stage)
    x, grad = torch.randn(2, 3, IN), torch.randn(2, 3, OUT)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = gradients(linear, x, nn.Module.__call__, grad)
        actual = gradients(module, x, nn.Module.__call__, grad)
    assert_same(expected, {name: actual[name] for name in expected})


def test_the_layer_computes_with_the_quantized_weight_and_not_the_float_one():
    module, x = layer("group"), integers(5, IN, seed=3)
    spec, scale = module.scheme.weight, module.weight_quantizer.scale.detach()
    quantized = F.linear(x, fake_quantize(module.weight.detach(), scale, spec), module.bias.detach())
    assert torch.equal(module(x).detach(), quantized)
    assert not torch.equal(quantized, F.linear(x, module.weight, module.bias).detach())


def saved_bytes(module, x) -> int:
    """Bytes that autograd keeps for backward beside the input and the parameters, which exist anyway."""
    storages, exist = {}, {t.untyped_storage().data_ptr() for t in (x, *module.parameters())}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = module(x)
    y.sum().backward()
    assert {x.untyped_storage().data_ptr(), module.weight.untyped_storage().data_ptr()} <= set(storages)
    return sum(size for pointer, size in storages.items() if pointer not in exist)


@pytest.mark.parametrize("scheme", ["tensor", "channel", "group"])
@pytest.mark.parametrize("shape", [(5, IN), (2, 3, IN)], ids=["2-D", "3-D"])
def test_backward_keeps_what_a_linear_keeps_and_the_scale(scheme, shape):
    x, module = torch.randn(shape, requires_grad=True), layer(scheme)
    assert saved_bytes(nn.Linear(IN, OUT), x) == 0
    assert saved_bytes(module, x) == 4 * module.weight_quantizer.scale.numel()


def test_a_frozen_layer_trains_its_weight_but_not_its_scale():
    module = layer("group", stage=Stage.FROZEN)
    module(integers(5, IN, seed=3)).sum().backward()
    assert module.weight_quantizer.scale.grad is None
    assert module.weight.grad is not None


@pytest.mark.parametrize("learning", ["weight", "bias", "weight_quantizer.scale"])
def test_only_what_requires_a_gradient_gets_one(learning):
    module = layer("group")
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name == learning)
    module(integers(5, IN, seed=3)).sum().backward()
    assert [n for n, p in module.named_parameters() if p.grad is not None] == [learning]


def test_an_input_without_gradient_is_fine():
    module, x, grad = layer("group"), integers(5, IN, seed=3), integers(5, OUT, seed=4)
    module(x).backward(grad)
    alone = module.weight.grad.clone()
    assert torch.equal(alone, gradients(module, x, nn.Module.__call__, grad)["weight"])


def test_an_empty_batch_passes():
    for scheme in SCHEMES:
        module, x = layer(scheme), torch.zeros(0, IN, requires_grad=True)
        y = module(x)
        assert y.shape == (0, OUT)
        y.sum().backward()
        assert not module.weight.grad.any()


@pytest.mark.parametrize("move", [lambda m: m.to(torch.bfloat16), lambda m: m.half()], ids=["bfloat16", "half"])
@pytest.mark.parametrize("scheme", ["group", "static"])
def test_a_model_that_changes_dtype_keeps_float32_scales(move, scheme):
    module = layer(scheme)
    for quantizer in module.quantizers:
        quantizer.set_scale(torch.full_like(quantizer.scale, 0.012345678))
    before = [q.scale.detach().clone() for q in module.quantizers]
    move(module)
    assert module.weight.dtype != torch.float32
    for quantizer, scale in zip(module.quantizers, before, strict=True):
        assert quantizer.scale.dtype == torch.float32
        assert torch.equal(quantizer.scale, scale)


@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_original_names_stay_and_state_survives_a_file(scheme):
    module = layer(scheme, stage=Stage.FROZEN)
    state = module.state_dict()
    assert list(state)[:2] == ["weight", "bias"]
    assert all(name.startswith(("weight_quantizer.", "input_quantizer.")) for name in list(state)[2:])
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    other = layer(scheme, stage=Stage.FLOAT)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.fill_(1)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert all(q.current_stage is Stage.FROZEN for q in other.quantizers)
    x = torch.randn(4, IN)
    assert torch.equal(other(x), module(x))


@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_a_deep_copy_is_equal_and_independent(scheme):
    module, x = layer(scheme), torch.randn(4, IN)
    other = copy.deepcopy(module)
    expected = module(x).detach().clone()
    assert torch.equal(other(x), expected)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2)
    for quantizer in other.quantizers:
        quantizer.set_stage(Stage.FLOAT)
    assert torch.equal(module(x), expected)


def test_scales_have_the_documented_shapes():
    shapes = {name: tuple(layer(name).weight_quantizer.scale.shape) for name in SCHEMES}
    assert shapes == {"tensor": (1, 1), "channel": (OUT, 1), "group": (OUT, 4), "dynamic": (OUT, 1), "static": (OUT, 1)}
    assert layer("static").input_quantizer.scale.shape == (1,)
    assert layer("dynamic").input_quantizer.scale is None
    assert layer("group").input_quantizer is None


def test_the_input_may_be_given_by_name():
    module, x = layer("dynamic"), torch.randn(4, IN)
    assert torch.equal(module(input=x), module(x))


@pytest.mark.parametrize("stage", [Stage.TRAIN, Stage.FROZEN], ids=["train", "frozen"])
def test_a_recorder_sees_codes_and_scale_of_every_active_forward(stage):
    module, seen = layer("group", stage=stage), []
    module.weight_quantizer.recorder = lambda codes, scale, weight: seen.append((codes, scale, weight))
    module(torch.randn(2, IN))
    ((codes, scale, weight),) = seen
    assert weight.shape == codes.shape == (OUT, IN)
    assert torch.equal(scale, module.weight_quantizer.scale)
    assert codes.min() >= -8 and codes.max() <= 7
    module.weight_quantizer.set_stage(Stage.FLOAT)
    module(torch.randn(2, IN))
    assert len(seen) == 1
