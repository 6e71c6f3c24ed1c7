"""Layers that hold packed codes: the scale learns by its exact gradient, and no float weight is left."""

import pytest
import torch
from torch import nn

from qat.estimators import LSQ, STE
from qat.export import export, record
from qat.fake_quantizer import Stage
from qat.functional import grouped, quantize
from qat.inference import load_packed
from qat.insertion import layers
from qat.nn import FakeQuantLinear
from qat.packing import unpack
from qat.scheme import QuantScheme, QuantSpec

OUT, IN = 12, 64
PLAIN = LSQ(scale_gradient=False)


def layer(estimator=PLAIN, held=True, dtype="float32", seed=0) -> FakeQuantLinear:
    torch.manual_seed(seed)
    spec = QuantSpec(bits=4, granularity="group", group_size=16, scale_dtype=dtype)
    made = FakeQuantLinear.adopt(nn.Linear(IN, OUT), QuantScheme(weight=spec), estimator)
    made.weight_quantizer.set_scale(torch.rand(OUT, IN // 16) * 0.02 + 0.01)
    made.weight_quantizer.set_stage(Stage.TRAIN)
    if held:
        made.hold()
    return made


def codes(module) -> torch.Tensor:
    return unpack(module.weight_quantizer.packed, 4, IN)


def test_the_function_is_the_same_bit_for_bit():
    x = torch.randn(5, IN)
    assert torch.equal(layer()(x), layer(held=False)(x))


def test_the_scales_gradient_is_that_of_finite_differences():
    module, x, upstream = layer(), torch.randn(5, IN), torch.randn(5, OUT)
    (module(x) * upstream).sum().backward()
    scale = module.weight_quantizer.scale

    def loss(s):
        view, factor = grouped(codes(module).double(), s)
        return (nn.functional.linear(x.double(), (view * factor).flatten(-2)) * upstream).sum()

    wanted = torch.empty(scale.shape, dtype=torch.float64)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            step = torch.zeros(scale.shape, dtype=torch.float64)
            step[i, j] = 1.0  # the function is linear in the scale
            wanted[i, j] = (loss(scale.detach().double() + step) - loss(scale.detach().double() - step)) / 2
    # float32 sums of 5 and of 16 products
    torch.testing.assert_close(scale.grad.double(), wanted, rtol=1e-4, atol=1e-4)


def test_the_gradient_is_lsqs_plus_what_the_weight_would_have_moved():
    held, free, x = layer(), layer(held=False), torch.randn(5, IN)
    for module in (held, free):
        module(x).square().sum().backward()
    scale = free.weight_quantizer.scale
    moved = grouped(free.weight.grad * free.weight.detach(), scale)[0].sum(-1) / scale.detach()
    # float32 sums of 16 products
    torch.testing.assert_close(held.weight_quantizer.scale.grad, scale.grad + moved, rtol=1e-4, atol=1e-3)


def test_training_changes_scales_and_no_code_and_only_scales_have_state():
    module, free = layer(), layer(held=False)
    start, before = codes(module), module.weight_quantizer.scale.detach().clone()
    assert torch.equal(start.float(), quantize(free.weight.detach(), before, free.weight_quantizer.spec))
    module.bias.requires_grad_(False)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)
    for _ in range(3):
        module(torch.randn(5, IN)).square().sum().backward()
        optimizer.step()
    assert torch.equal(codes(module), start)
    assert not torch.equal(module.weight_quantizer.scale, before)
    assert [p is module.weight_quantizer.scale for p in optimizer.state] == [True]


def test_no_float_weight_is_left():
    module = layer()
    held = sum(t.nbytes for t in [*module.parameters(), *module.buffers()])
    assert held == OUT * IN // 2 + 4 * OUT * (IN // 16) + 4 * OUT + 1  # codes, scales, bias, stage


def test_a_checkpoint_carries_codes_and_scales_into_a_layer_that_still_has_its_weight():
    module, other = layer(), layer(held=False, seed=1)
    other.load_state_dict(module.state_dict())
    x = torch.randn(5, IN)
    assert torch.equal(other(x), module(x)) and other.weight.numel() == 0


def test_a_released_layer_has_the_dequantized_weight():
    module, x = layer(), torch.randn(5, IN)
    wanted = module(x)
    assert torch.equal(module.release()(x), wanted)


@pytest.mark.parametrize("kind", ["plain", "held", "adapter"])
def test_some_rows_of_what_is_quantized_are_those_of_all(kind):
    module = layer(held=kind == "held")
    if kind == "adapter":
        module.adapt(2, 2.0)
        nn.init.normal_(module.lora_B)
    for every in (1, 3):
        torch.testing.assert_close(module.adapted_rows(every), module.adapted[::every])


def test_what_needs_the_float_weight_is_refused():
    with pytest.raises(ValueError, match="estimator=lsq"):
        layer(STE())
    module = layer()
    with pytest.raises(ValueError, match="load the float model again"):
        _ = module.matrix
    module.weight_quantizer.set_stage(Stage.FLOAT)
    with pytest.raises(ValueError, match="load the float model again"):
        module(torch.randn(5, IN))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_export_holds_the_codes_that_were_held(dtype, tiny_llama, quantize_model, scheme, tmp_path):
    model = quantize_model(tiny_llama(dtype), scheme("w4a16-g32"))
    for module in layers(model).values():
        module.hold()
    tokens = torch.arange(24)[None]
    with record(model) as recorded, torch.no_grad():
        model(tokens)
    artifact = export(model, recorded, tmp_path / "export")
    packed, _ = load_packed(tmp_path / "export")
    for name, module in layers(model).items():
        assert torch.equal(packed.get_submodule(name).packed, module.weight_quantizer.packed), name
    assert all(described.weight_error is None for described in artifact.layers)
