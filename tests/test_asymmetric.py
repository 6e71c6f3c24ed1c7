"""Asymmetric static activations, and LSQ+, which learns their scale and zero point."""

import json
import logging

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import qat
from qat.calibration import RangeCalibration
from qat.calibration.ranges import OBSERVERS
from qat.estimators import DSQ, LSQ, PACT, SEQ, STE, LSQPlus
from qat.export import VerificationError, compressed_tensors, export, record, verify
from qat.export.compressed_tensors import layer_tensors
from qat.fake_quantizer import FakeQuantizer, Stage, token_mask
from qat.functional import fake_quantize, quantize, store_scale, zero_point
from qat.inference import PackedLinear, load_packed
from qat.inference.packed_layers import PackedConv2d
from qat.insertion import insert, layers, plan, set_stage
from qat.observers import EMA, MSE, MinMax
from qat.packing import pack
from qat.scheme import QuantScheme, QuantSpec, SchemeMap
from qat.training import parameter_groups, scale_parameters, scale_steps

INPUT = QuantSpec(bits=8, granularity="tensor", symmetric=False)
FINE = QuantSpec(bits=4, granularity="tensor", symmetric=False, scale_dtype="float32")
SCHEME = QuantScheme(weight=QuantSpec(bits=8, granularity="channel"), input=INPUT)
RULES = {"*lm_head": None, "*": SCHEME}
TOKENS = torch.arange(24)[None]


# -- arithmetic ---------------------------------------------------------------------------------------


def test_codes_are_rounded_quotients_with_the_zero_point_added_as_servers_add_it():
    x = torch.tensor([[-0.75, -0.25, 0.0, 0.25, 0.75, 3.0, 9.0, -9.0]])
    scale, zero = torch.tensor([[0.5]]), torch.tensor([[-5.0]])
    codes = quantize(x, scale, FINE, zero)
    assert codes.tolist() == [[-7, -5, -5, -5, -3, 1, 7, -8]]  # halves to even before the odd zero point is added
    assert fake_quantize(x, scale, FINE, zero).tolist() == [[-1, 0, 0, 0, 1, 3, 6, -1.5]]


def test_a_zero_point_of_zero_is_the_symmetric_arithmetic():
    x, scale = torch.randn(5, 16), torch.full((5, 1), 0.07)
    assert torch.equal(quantize(x, scale, FINE, torch.zeros(5, 1)), quantize(x, scale, FINE))
    assert torch.equal(fake_quantize(x, scale, FINE, torch.zeros(5, 1)), fake_quantize(x, scale, FINE))


def test_a_zero_point_is_an_integer_of_the_range_so_zero_stays_zero():
    scale = torch.full((6,), 0.5)
    offsets = torch.tensor([0.0, 2.2, -2.2, 100.0, -100.0, 0.25])
    zero = zero_point(offsets, scale, FINE)
    assert zero.tolist() == [0, -4, 4, -8, 7, 0]
    assert fake_quantize(torch.zeros(6, 1), scale[:, None], FINE, zero[:, None]).abs().max() == 0


# -- ranges -------------------------------------------------------------------------------------------


def seen(kind, *values, spec=FINE):
    observer = kind(spec)
    for value in values:
        observer.observe(value)
    scale = observer.scale()
    return scale, observer.offset(scale)


def test_the_observed_range_and_zero_are_what_the_codes_cover():
    scale, offset = seen(MinMax, torch.tensor([[-0.5, 1.0], [2.0, 3.0]]), torch.tensor([[4.0, 0.0], [1.0, 3.0]]))
    assert scale.tolist() == [np.float32(4.5) / 15, np.float32(3) / 15]
    # Codes -8 to 7: the first row's begin at -0.5, the second's at 0, below its smallest value.
    assert offset.tolist() == [-0.5 + 8 * scale[0].item(), 8 * scale[1].item()]
    assert zero_point(offset, scale, FINE).tolist() == [-6, -8]


def test_a_moving_average_averages_both_ends():
    scale, offset = seen(EMA, torch.tensor([[-1.0, 2.0]]), torch.tensor([[-2.0, 12.0]]))
    low, high = 0.9 * 1 + 0.1 * 2, 0.9 * 2 + 0.1 * 12
    # float32 averages of two numbers.
    assert scale.item() == pytest.approx((low + high) / 15, rel=1e-6)
    assert offset.item() == pytest.approx(-low + 8 * scale.item(), rel=1e-6)


def test_a_one_sided_tensor_costs_less_than_on_a_symmetric_grid_and_least_by_squared_error():
    x = nn.functional.silu(2 * torch.randn(1, 4096, generator=torch.Generator().manual_seed(0)))

    def error(scale, zero=None, spec=FINE):
        shifted = None if zero is None else zero[:, None]
        return float((fake_quantize(x, scale[:, None], spec, shifted) - x).square().sum())

    errors = {}
    for kind in (MinMax, MSE):
        scale, offset = seen(kind, x)
        errors[kind] = error(scale, zero_point(offset, scale, FINE))
    symmetric = QuantSpec(bits=4, granularity="tensor", scale_dtype="float32")
    observer = MSE(symmetric)
    observer.observe(x)
    assert errors[MSE] < errors[MinMax] < error(observer.scale(), spec=symmetric)


# -- gradients ----------------------------------------------------------------------------------------


def example():
    """Values of which about a third is clipped, 0.1 scales away from every border; scale, offset and zero point."""
    generator = torch.Generator().manual_seed(0)
    scale = 0.1 + torch.rand(3, 1, generator=generator)
    zero = torch.tensor([[-6.0], [0.0], [5.0]])
    offset = -(zero + torch.tensor([[0.3], [-0.2], [0.0]])) * scale
    codes = torch.randint(-16, 16, (3, 32), generator=generator) - zero
    x = (codes + 0.8 * (torch.rand(3, 32, generator=generator) - 0.5)) * scale
    assert torch.equal(zero_point(offset, scale, FINE), zero)
    return x, scale, offset, zero, torch.randn(3, 32, generator=generator)


def test_lsq_plus_gradients_are_the_published_formula():
    """arXiv 2004.09576, section 3.1, value by value: v = (x - offset) / s, with the offset that is in use."""
    x, scale, _, zero, grad = example()
    found = LSQPlus(scale_gradient=False).backward_shifted(grad, x, scale, zero, FINE)
    expected = np.zeros((3, 32)), np.zeros((3, 1)), np.zeros((3, 1))
    for row, column in np.ndindex(3, 32):
        g, v = grad[row, column].item(), x[row, column].item() / scale[row].item() + zero[row].item()
        inside = -8 <= v <= 7
        expected[0][row, column] = g * inside
        expected[1][row] += g * (round(v) - v if inside else max(-8, min(7, round(v))))
        expected[2][row] += g * (not inside)
    assert 0.2 < float((found[0] == 0).float().mean()) < 0.8
    for ours, theirs in zip(found, expected, strict=True):
        # 32 float32 terms of at most 8 * 4, each v rounded to 2^-24 relative.
        np.testing.assert_allclose(ours.double().numpy(), theirs, rtol=0, atol=32 * 8 * 4 * 2**-22)


def test_scale_and_offset_gradients_are_slopes_of_the_straight_through_function():
    """s * (clip((x - b) / s) + residual) + b, b = offset + what its rounding added: float64 central differences."""
    x, scale, offset, zero, grad = example()
    values, g, s0, o0 = (t.double() for t in (x, grad, scale, offset))
    added = -zero.double() * s0 - o0
    clipped = (values / s0 + zero).clamp(-8, 7)
    residual = clipped.round() - clipped

    def loss(s, o):
        b = o + added
        return (g * (s * (((values - b) / s).clamp(-8, 7) + residual) + b)).sum(-1, keepdim=True)

    h = 1e-6
    by_scale = (loss(s0 + h, o0) - loss(s0 - h, o0)) / (2 * h)
    by_offset = (loss(s0, o0 + h) - loss(s0, o0 - h)) / (2 * h)
    _, of_scale, of_offset = LSQPlus(scale_gradient=False).backward_shifted(grad, x, scale, zero, FINE)
    for ours, slope in ((of_scale, by_scale), (of_offset, by_offset)):
        torch.testing.assert_close(ours.double(), slope, rtol=0, atol=32 * 8 * 4 * 2**-22 + 1e-6)


def quantizer(estimator=None, scale=0.05, offset=0.31):
    made = FakeQuantizer(INPUT, (1,), estimator or LSQPlus())
    made.set_scale(torch.tensor([scale]), torch.tensor([offset]))
    made.set_stage(Stage.TRAIN)
    return made


def test_a_forward_uses_an_integer_zero_point_from_the_first_step_on():
    made, x = quantizer(), torch.randn(2, 3, 16)
    scale, zero = made.static_qparams()
    assert zero.item() == round(-0.31 / store_scale(torch.tensor(0.05), INPUT).item())
    y = made(x)
    assert torch.equal(y, ((x / scale).round() + zero).clamp(-128, 127).sub(zero) * scale)
    y.sum().backward()
    assert made.scale.grad.shape == made.offset.grad.shape == (1,)


def test_autograd_through_the_quantizer_sums_the_tokens():
    made, x = quantizer(scale=0.01), torch.randn(2, 3, 16, requires_grad=True)
    grad = torch.randn(2, 3, 16)
    made(x).backward(grad)
    scale, zero = made.static_qparams()
    wide = scale.expand(2, 3, 1), zero.expand(2, 3, 1)
    of_x, of_scale, of_offset = LSQPlus().backward_shifted(grad, x.detach(), *wide, INPUT)
    assert torch.equal(x.grad, of_x)
    # Sums of six numbers in another order.
    torch.testing.assert_close(made.scale.grad, of_scale.sum().view(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(made.offset.grad, of_offset.sum().view(1), rtol=1e-5, atol=1e-5)
    assert made.offset.grad.abs() > 0


@pytest.mark.parametrize(("stage", "learns"), [(s, s != Stage.FROZEN) for s in Stage])
def test_the_offset_learns_and_is_frozen_with_the_scale(stage, learns):
    made = quantizer()
    made.set_stage(stage)
    assert (made.scale.requires_grad, made.offset.requires_grad) == (learns, learns)


def test_offsets_have_the_scales_rate_and_may_be_negative_where_scales_may_not_be_zero():
    made = nn.ModuleDict({"a": quantizer(scale=1e-3, offset=1e-3), "b": nn.Linear(4, 4)})
    assert [id(p) for p in scale_parameters(made)] == [id(made["a"].scale), id(made["a"].offset)]
    groups = parameter_groups(made, lr=1.0, scale_lr=1e-3)
    assert [len(g["params"]) for g in groups] == [1, 1, 2]
    optimizer = torch.optim.SGD(groups)
    scale_steps(optimizer, made)
    made["a"].scale.grad, made["a"].offset.grad = torch.tensor([1.0]), torch.tensor([1.0])
    optimizer.step()
    assert made["a"].scale.item() == 2.0**-64 and made["a"].offset.item() == 0.0


def test_symmetric_tensors_are_trained_as_by_lsq():
    spec = QuantSpec(bits=4, granularity="group", group_size=16)
    x, scale, grad = torch.randn(3, 32), torch.full((3, 2), 0.2), torch.randn(3, 32)
    pairs = zip(LSQPlus().backward(grad, x, scale, spec, True), LSQ().backward(grad, x, scale, spec, True), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


@pytest.mark.parametrize("estimator", [STE(), LSQ(), SEQ(), DSQ(), PACT()], ids=lambda e: type(e).__name__)
def test_estimators_without_zero_points_refuse_asymmetric_activations_by_name(estimator):
    model = nn.Sequential(nn.Linear(8, 8))
    weights = LSQ() if isinstance(estimator, PACT) else estimator
    with pytest.raises(ValueError, match=f"0: {type(estimator).__name__} knows no zero point.*estimator=lsq_plus"):
        plan(model, SchemeMap(name="x", rules={"*": SCHEME}), weights, estimator)
    if not isinstance(estimator, PACT):
        with pytest.raises(ValueError, match="knows no zero point"):
            plan(model, SchemeMap(name="x", rules={"*": SCHEME}), weights)


def test_a_relative_offset_is_refused():
    with pytest.raises(ValueError, match="relative must be false"):
        LSQPlus(relative=True)


# -- from a model to an artifact ----------------------------------------------------------------------


@pytest.fixture
def trained(tiny_llama):
    """A tiny Llama after calibration and three steps of LSQ+, what its last forward recorded, and its logits."""

    def make(kind: str = "mse", dtype=torch.float32, **options):
        model = tiny_llama(dtype, **options)
        insert(model, SchemeMap(name="test", rules=RULES), LSQPlus())

        @torch.no_grad()
        def run() -> None:
            with token_mask(None):
                model(torch.arange(96).view(4, 24), use_cache=False)

        RangeCalibration("test", weight="mse", input=kind)(model, run)
        set_stage(model, Stage.TRAIN)
        optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-3, scale_lr=1e-2))
        before = [layer.input_quantizer.offset.detach().clone() for layer in layers(model).values()]
        for _ in range(3):
            model(TOKENS, labels=TOKENS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        after = [layer.input_quantizer.offset.detach() for layer in layers(model).values()]
        assert not all(torch.equal(*pair) for pair in zip(before, after, strict=True))
        with record(model) as recorded, torch.no_grad():
            logits = model(TOKENS).logits
        return model, recorded, logits

    return make


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", list(OBSERVERS))
@torch.no_grad()
def test_what_lsq_plus_trains_is_what_is_loaded_bit_for_bit(kind, dtype, trained, tmp_path):
    with torch.enable_grad():
        model, recorded, logits = trained(kind, dtype, bias=True)
    export(model, recorded, tmp_path / "m")  # which verifies
    packed, _ = load_packed(tmp_path / "m")
    assert torch.equal(packed(TOKENS).logits, logits)
    zeros = {int(used.input_zero_point) for used in recorded.values()}
    assert len(zeros) > 1 and zeros != {0}
    for name, used in recorded.items():
        assert torch.equal(packed.get_submodule(name).input_zero_point, used.input_zero_point)


@torch.no_grad()
def test_transformers_reads_the_same_zero_points(trained, tmp_path):
    with torch.enable_grad():
        model, recorded, logits = trained()
    export(model, recorded, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
    assert config["config_groups"]["group_0"]["input_activations"]["symmetric"] is False
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    found = loaded(TOKENS).logits
    for name, used in recorded.items():
        assert torch.equal(loaded.get_submodule(name).input_zero_point.to(torch.int8).view(1), used.input_zero_point)
    # It rounds x / s + z and not x / s: other codes where that is a half, or becomes one. A step is about 0.03.
    torch.testing.assert_close(found, logits, rtol=0, atol=2e-2)


@pytest.mark.parametrize("kind", ["input_zero_point", "input_scale"])
def test_another_zero_point_in_the_file_is_caught(kind, trained, tmp_path, monkeypatch):
    model, recorded, _ = trained()

    def damaged(layer):
        stored = layer_tensors(layer)
        return {**stored, kind: stored[kind] + 1}

    monkeypatch.setattr(compressed_tensors, "layer_tensors", damaged)
    with pytest.raises(VerificationError, match="0 codes and 1 scales differ"):
        export(model, recorded, tmp_path / "m")


def test_a_missing_zero_point_is_caught(trained, tmp_path):
    model, recorded, _ = trained()
    export(model, recorded, tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if not k.endswith("input_zero_point")}, path)
    with pytest.raises(VerificationError, match="a static input zero point is missing"):
        verify(tmp_path / "m", recorded)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@torch.no_grad()
def test_a_backend_leaves_zero_points_of_activations_to_the_reference(backend, trained, tmp_path, caplog):
    with torch.enable_grad():
        model, recorded, logits = trained()
    export(model, recorded, tmp_path / "m")
    with caplog.at_level(logging.INFO, "qat.inference"):
        packed, _ = load_packed(tmp_path / "m", backend=backend)
    assert sum(isinstance(m, PackedLinear) for m in packed.modules()) == 14
    assert torch.equal(packed(TOKENS).logits, logits)
    assert backend == "reference" or "14 layers on reference" in caplog.text


@torch.no_grad()
def test_an_offset_that_is_not_a_number_is_refused_by_name(trained, tmp_path):
    with torch.enable_grad():
        model, _, _ = trained()
    layers(model)["model.layers.1.mlp.down_proj"].input_quantizer.offset.fill_(torch.nan)
    with record(model) as recorded:
        model(TOKENS)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.down_proj: a input offset is NaN or infinite"):
        export(model, recorded, tmp_path / "m")


@torch.no_grad()
def test_a_packed_convolution_has_its_zero_point_too():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1))
    insert(model, SchemeMap(name="x", rules={"*": SCHEME}, kinds=("conv",)), qat.LSQPlus())
    images = torch.rand(2, 3, 8, 8) + 0.2
    RangeCalibration("x")(model, lambda: model(images))
    set_stage(model, Stage.FROZEN)
    with record(model) as recorded:
        expected = model(images)
    used = recorded["0"]
    packed = PackedConv2d(nn.Conv2d(3, 4, 3, padding=1), SCHEME, torch.float32)
    packed.packed.copy_(pack(used.codes, 8))
    packed.scale.copy_(used.scale)
    packed.input_scale.copy_(used.input_scale)
    packed.input_zero_point.copy_(used.input_zero_point)
    packed.bias.copy_(model[0].bias)
    assert int(used.input_zero_point) == -128  # nothing is below zero
    assert torch.equal(packed(images), expected)
