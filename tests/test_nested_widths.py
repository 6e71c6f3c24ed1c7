"""Nested widths: codes that share their high bits, their gradients, and an ordinary artifact at each width."""

import json
from fractions import Fraction

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from qat.estimators import DSQ, LSQ, PACT, STE
from qat.export import VerificationError, export, record
from qat.fake_quantizer import Stage
from qat.functional import dequantize, quantize, store_scale
from qat.inference import load_packed
from qat.insertion import at_width, insert, layers, plan, widths
from qat.nn import FakeQuantLinear
from qat.scheme import QuantScheme, QuantSpec, SchemeMap

TOKENS = torch.arange(24)[None]
BELOW = [7, 6, 5, 4, 3, 2]


def nested(bits: int = 8, widths: tuple[int, ...] = (4, 2), **settings) -> QuantSpec:
    return QuantSpec(**{"bits": bits, "granularity": "group", "group_size": 16, "nested": widths, **settings})


# -- the grid -----------------------------------------------------------------------------------------------


def by_the_paper(code: int, bits: int, parent: int = 8) -> int:
    """arXiv 2502.06786, eq. 6, clamped, on an unsigned code: S(q, r); in exact arithmetic, ties to the even code."""
    step = 2 ** (parent - bits)
    return min(max(round(Fraction(code, step)), 0), 2**bits - 1) * step


@pytest.mark.parametrize("bits", BELOW)
def test_slicing_is_the_papers_formula_on_all_256_codes(bits):
    spec, scale = nested(widths=tuple(BELOW), granularity="channel", group_size=None), torch.tensor([0.375])
    codes = torch.arange(-128, 128).float()
    sliced = quantize(codes * scale, scale * spec.at(bits).step, spec.at(bits))
    assert [int(c) * spec.at(bits).step for c in sliced] == [by_the_paper(int(c) + 128, bits) - 128 for c in codes]
    values = dequantize(sliced, scale * spec.at(bits).step)
    assert torch.equal(values, scale * (sliced * 2 ** (8 - bits)))
    assert sliced.unique().tolist() == list(range(-(2 ** (bits - 1)), 2 ** (bits - 1)))


@pytest.mark.parametrize("bits", BELOW)
@pytest.mark.parametrize("sign", [1, -1])
def test_a_narrow_code_is_sliced_from_the_wide_one_and_not_rounded_from_the_weight(bits, sign):
    torch.manual_seed(bits)
    spec = nested(widths=tuple(BELOW))
    scale = sign * store_scale(torch.rand(64, 2) * 10 ** torch.linspace(-6, 6, 64)[:, None], spec)
    x = torch.randn(64, 32) * scale.repeat_interleave(16, 1) * 60
    step = spec.at(bits).step
    wide = quantize(x, scale, spec)
    sliced = (wide / step).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    assert torch.equal(quantize(x, scale * step, spec.at(bits)), sliced)
    ordinary = quantize(x, scale * step, spec.at(bits).alone)
    assert bool((sliced != ordinary).any()), "rounding twice never differs: the test has lost its point"


def test_a_scale_of_a_narrow_width_is_stored_without_rounding():
    spec = nested()
    scale = store_scale(torch.randn(1000), spec)
    for bits in spec.widths:
        assert torch.equal(store_scale(scale * spec.at(bits).step, spec), scale * 2 ** (8 - bits))


def test_a_scheme_says_its_widths_and_reads_them_back():
    scheme = QuantScheme(weight=nested(widths=(2, 4)))
    assert str(scheme) == "w8.4.2a16-g16" and QuantScheme.parse(str(scheme)) == scheme
    assert QuantScheme.from_dict(json.loads(json.dumps(scheme.to_dict()))) == scheme
    assert scheme.at(4) == QuantScheme.parse("w4a16-g16")
    assert hash(scheme) == hash(QuantScheme(weight=nested(widths=[4, 2])))


def test_what_does_not_nest_is_written_as_before():
    written = QuantScheme.parse("w4a8-g32").to_dict()
    assert not {"nested", "sliced_from"} & (written["weight"].keys() | written["input"].keys())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"widths": (8,)}, "serve integer widths from 2 to 7"),
        ({"bits": 4, "widths": (5,)}, "serve integer widths from 2 to 3"),
        ({"widths": (1,)}, "from 2 to 7"),
        ({"widths": (2.5,)}, "integer widths"),
    ],
)
def test_a_width_that_is_not_below_the_parents_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        nested(**settings)


def test_a_width_that_is_not_nested_is_refused():
    with pytest.raises(ValueError, match="no 3-bit codes"):
        nested().at(3)


def test_activations_have_no_nested_widths():
    with pytest.raises(ValueError, match=r"input\.nested"):
        QuantScheme(weight=nested(), input=nested(granularity="tensor", group_size=None))


def test_layers_that_nest_different_widths_are_refused():
    model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 16))
    rules = {"0": QuantScheme(weight=nested()), "1": QuantScheme(weight=nested(widths=(3,)))}
    with pytest.raises(ValueError, match="nest different widths"):
        plan(model, SchemeMap(name="two", rules=rules))


def test_pact_has_one_level_to_clip_at():
    spec = nested(granularity="tensor", group_size=None)
    assert "[8, 4, 2]" in PACT().refusal(spec) and LSQ().refusal(spec) is None


# -- gradients ----------------------------------------------------------------------------------------------


def example(bits: int):
    """Values of which about a third is clipped at `bits`, none near a border of either rounding or of a clip."""
    spec, generator = nested(scale_dtype="float32").at(bits), torch.Generator().manual_seed(bits)
    stored = 0.1 + torch.rand(3, 2, generator=generator)
    stored[:, ::2] *= -1
    code = torch.randint(-(2**bits), 2**bits, (3, 2, 16), generator=generator) * spec.step
    inner = torch.randint(-(spec.step // 4), spec.step // 4 + 1, code.shape, generator=generator)  # far from a border
    offset = 0.6 * (torch.rand(code.shape, generator=generator) - 0.5)
    x = ((code + inner + offset) * stored[..., None]).flatten(-2)
    return x, stored, torch.randn(x.shape, generator=generator), spec


def straight_through(x, stored, spec):
    """A float64 function of x and the stored scale whose slopes are straight-through's: residuals are held."""
    step, qmin, qmax = spec.step, spec.qmin, spec.qmax

    def clipped(x, s):
        return np.clip(x / (step * s), qmin, qmax)

    residual = np.clip(np.round(np.clip(np.round(x / stored), -128, 127) / step), qmin, qmax) - clipped(x, stored)
    return lambda x, s: step * s * (clipped(x, s) + residual)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_gradients_are_the_slopes_of_the_straight_through_function(bits):
    x, stored, grad, spec = example(bits)
    grad_x, grad_scale = LSQ(scale_gradient=False).backward(grad, x, stored * spec.step, spec, True)
    values, s, g = x.double().view(3, 2, 16).numpy(), stored.double().numpy()[..., None], grad.double().view(3, 2, 16)
    function, h = straight_through(values, s, spec), 1e-6
    slope_x = torch.tensor(function(values + h, s) - function(values - h, s)) / (2 * h)
    slope_s = (g * torch.tensor(function(values, s + h) - function(values, s - h))).sum(-1) / (2 * h)
    assert 0 < (grad_x == 0).float().mean() < 1, "both sides of the clip must be there"
    # Differences of float64 values below 2^9 over 2e-6: 2^9 * 2^-53 / 2e-6 < 1e-7, and times |g| <= 4.
    torch.testing.assert_close(grad_x.double(), (g * slope_x).flatten(-2), rtol=0, atol=4e-7)
    # 16 float32 terms of at most step * 2^(bits-1) * |g| <= 128 * 4, each v rounded to 2^-24 relative.
    torch.testing.assert_close(grad_scale.double(), slope_s, rtol=0, atol=16 * 128 * 4 * 2**-22 + 1e-6)
    codes = quantize(x, stored * spec.step, spec).double().view(3, 2, 16) * spec.step
    np.testing.assert_allclose(function(values, s), codes * s, rtol=1e-15)  # and it is what forward computes


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("estimator", [LSQ(), DSQ()], ids=["lsq", "dsq"])
def test_learning_the_logarithm_gives_the_stored_scales_own(bits, estimator):
    """d(log2 s) = ds * s * ln 2, with s as stored, whatever width the step was made at."""
    x, stored, grad, spec = example(bits)
    relative = type(estimator)(relative=True)
    plain = estimator.backward(grad, x, stored * spec.step, spec, True)[1]
    logarithmic = relative.backward(grad, x, stored * spec.step, spec, True)[1]
    torch.testing.assert_close(logarithmic, plain * stored * np.log(2), rtol=1e-6, atol=0)


def test_the_gradient_scale_is_the_parents_at_every_width():
    for bits in (8, 4, 2):
        x, stored, grad, spec = example(bits)
        scaled, plain = (
            LSQ(scale_gradient=scaled).backward(grad, x, stored * spec.step, spec, True)[1] for scaled in (True, False)
        )
        torch.testing.assert_close(scaled, plain / (16 * 127) ** 0.5, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_a_layers_gradients_are_its_estimators(bits):
    x, stored, _, spec = example(bits)
    layer = FakeQuantLinear.adopt(torch.nn.Linear(32, 3), QuantScheme(weight=nested(scale_dtype="float32")), LSQ())
    with torch.no_grad():
        layer.weight.copy_(x)
        layer.weight_quantizer.set_scale(stored)
    layer.weight_quantizer.set_stage(Stage.TRAIN)
    model, inputs, upstream = torch.nn.Sequential(layer), torch.randn(5, 32), torch.randn(5, 3)
    with at_width(model, bits):
        output = model(inputs)
    output.backward(upstream)  # the width has changed by then: a graph remembers its own
    expected = LSQ().backward(upstream.T @ inputs, x, stored * spec.step, spec, True)
    assert torch.equal(output, torch.nn.functional.linear(inputs, dequantize(
        quantize(x, stored * spec.step, spec), stored * spec.step), layer.bias))  # fmt: skip
    assert torch.equal(layer.weight.grad, expected[0]) and torch.equal(layer.weight_quantizer.scale.grad, expected[1])


@pytest.mark.parametrize("estimator", [LSQ(), STE(), STE(follow="absmax")], ids=str)
def test_all_widths_have_one_scale(estimator):
    layer = FakeQuantLinear.adopt(torch.nn.Linear(32, 3), QuantScheme(weight=nested()), estimator)
    layer.weight_quantizer.set_scale(torch.rand(3, 2))
    layer.weight_quantizer.set_stage(Stage.TRAIN)
    model = torch.nn.Sequential(layer)
    own = layer.weight_quantizer.weight_scale(layer.weight)
    for bits in (8, 4, 2):
        with at_width(model, bits):
            assert torch.equal(layer.weight_quantizer.weight_scale(layer.weight), own * 2 ** (8 - bits))


# -- the model's width --------------------------------------------------------------------------------------


@pytest.fixture
def model(tiny_llama, quantize_model):
    """A Llama whose layers nest 8, 4 and 2 bits, but for one that is INT8 alone, in training."""
    rules = {
        "*lm_head": None,
        "*layers.1.mlp.down_proj": QuantScheme.parse("w8a16-channel"),
        "*": QuantScheme.parse("w8.4.2a16-g32"),
    }
    return quantize_model(tiny_llama(tie=True, bias=True), rules=rules)


@torch.no_grad()
def test_a_models_width_is_that_of_the_context_and_nowhere_else(model):
    assert widths(model) == (8, 4, 2)
    own = model(TOKENS).logits
    with at_width(model, 2):
        with at_width(model, 4):
            four = model(TOKENS).logits
        two = model(TOKENS).logits
        specs = {layer.weight_quantizer.spec.bits for layer in layers(model).values()}
    assert specs == {2, 8}  # what does not nest stays
    with pytest.raises(ValueError, match="no 3-bit codes"), at_width(model, 3):
        pass
    with pytest.raises(RuntimeError, match="inside"), at_width(model, 4):
        raise RuntimeError("inside")
    assert torch.equal(model(TOKENS).logits, own)
    assert not torch.equal(own, four) and not torch.equal(four, two)


def test_a_model_without_nested_widths_has_none_to_choose():
    other = torch.nn.Sequential(torch.nn.Linear(16, 16))
    insert(other, SchemeMap(name="w4", rules={"*": QuantScheme.parse("w4a16-channel")}))
    assert widths(other) == ()
    with pytest.raises(ValueError, match="no layer has nested widths"), at_width(other, 4):
        pass


@torch.no_grad()
def test_the_export_at_each_width_is_an_ordinary_artifact_with_the_logits_of_training(model, tmp_path):
    for bits in (8, 4, 2):
        with at_width(model, bits):
            with record(model) as recorded:
                logits = model(TOKENS).logits
            artifact = export(model, recorded, tmp_path / str(bits))
        assert {layer.scheme for layer in artifact.layers} == {f"w{bits}a16-g32", "w8a16-channel"}
        side = json.loads((tmp_path / str(bits) / "qat.json").read_text())["layers"]
        assert side["model.layers.0.mlp.up_proj"]["scheme"] == QuantScheme.parse(f"w{bits}a16-g32").to_dict()
        packed, _ = load_packed(tmp_path / str(bits))
        assert torch.equal(packed(TOKENS).logits, logits)
        reader = AutoModelForCausalLM.from_pretrained(tmp_path / str(bits), dtype=torch.float32)
        torch.testing.assert_close(reader(TOKENS).logits, logits, rtol=0, atol=1e-5)  # its own order of sums


@torch.no_grad()
def test_narrow_artifacts_hold_the_high_bits_of_the_wide_one(model, tmp_path):
    held = {}
    for bits in (8, 4, 2):
        with at_width(model, bits), record(model) as held[bits]:
            model(TOKENS)
    for name in layers(model):
        wide = held[8][name]
        for bits in (4, 2):
            narrow, step = held[bits][name], 2 ** (8 - bits)
            if name.endswith("1.mlp.down_proj"):
                assert torch.equal(narrow.codes, wide.codes) and torch.equal(narrow.scale, wide.scale)
                continue
            expected = (wide.codes.float() / step).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
            assert torch.equal(narrow.codes.float(), expected) and torch.equal(narrow.scale, wide.scale * step)


@torch.no_grad()
def test_an_export_at_another_width_than_was_recorded_is_refused(model, tmp_path):
    with at_width(model, 4), record(model) as recorded:
        model(TOKENS)
    with pytest.raises(VerificationError, match=r"codes and \d+ scales differ"), at_width(model, 2):
        export(model, recorded, tmp_path / "m")
