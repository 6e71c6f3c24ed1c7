import math

import numpy as np
import pytest
import torch

from qat.estimators import DSQ, LSQ, PACT, STE, FakeQuantize, inside_range
from qat.functional import absmax_scale, dynamic_scale, fake_quantize, store_scale
from qat.observers import MSE
from qat.scheme import QuantSpec


def spec_of(bits: int, size: int = 16) -> QuantSpec:
    return QuantSpec(bits=bits, granularity="group", group_size=size, scale_dtype="float32")


def example(bits: int, rows: int = 3, groups: int = 2, size: int = 16):
    """Values of which about a third is clipped, none near a rounding or clipping border."""
    generator = torch.Generator().manual_seed(bits)
    scale = 0.1 + torch.rand(rows, groups, generator=generator)
    scale[:, ::2] *= -1
    codes = torch.randint(-(2**bits), 2**bits, (rows, groups, size), generator=generator).float()
    offset = 0.8 * (torch.rand(rows, groups, size, generator=generator) - 0.5)  # 0.1 away from every half
    x = ((codes + offset) * scale[..., None]).flatten(-2)
    grad = torch.randn(x.shape, generator=generator)
    return x, scale, grad, spec_of(bits, size)


def by_the_formula(x, scale, grad, spec, scaled=True):
    """arXiv 1902.08153, sections 2.1 and 2.2, with 1 / sqrt(n * qmax), value by value in Python floats."""
    grad_x, grad_scale = torch.zeros(x.shape, dtype=torch.float64), torch.zeros(scale.shape, dtype=torch.float64)
    n = x.shape[1] // scale.shape[1]
    for row in range(x.shape[0]):
        for column in range(x.shape[1]):
            s, g = scale[row, column // n].item(), grad[row, column].item()
            v = x[row, column].item() / s
            if v < spec.qmin:
                slope = spec.qmin
            elif v > spec.qmax:
                slope = spec.qmax
            else:
                slope = round(v) - v
                grad_x[row, column] = g
            grad_scale[row, column // n] += g * slope
    return grad_x, grad_scale / (math.sqrt(n * spec.qmax) if scaled else 1)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("scaled", [True, False], ids=["scaled", "plain"])
def test_lsq_gradients_are_the_published_formula(bits, scaled):
    x, scale, grad, spec = example(bits)
    grad_x, grad_scale = LSQ(scale_gradient=scaled).backward(grad, x, scale, spec, True)
    expected_x, expected_scale = by_the_formula(x, scale, grad, spec, scaled)
    assert torch.equal(grad_x.double(), expected_x)
    assert 0 < (grad_x == 0).float().mean() < 1, "both sides of the clip must be there"
    # 16 float32 terms of at most 2^(bits-1) * |g| <= 2^(bits-1) * 4, each v rounded to 2^-24 relative.
    bound = 16 * 2 ** (bits - 1) * 4 * 2**-22
    torch.testing.assert_close(grad_scale.double(), expected_scale, rtol=0, atol=bound)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_scale_gradient_is_the_slope_of_the_straight_through_function(bits):
    """With each rounding residual held, s * (clip(x / s) + residual) is smooth: float64 central differences."""
    x, scale, grad, spec = example(bits)
    values, g = x.double().view(3, 2, 16).numpy(), grad.double().view(3, 2, 16).numpy()
    s0 = scale.double().numpy()[..., None]
    clipped = np.clip(values / s0, spec.qmin, spec.qmax)
    residual = np.round(clipped) - clipped

    def loss(s):
        return (g * s * (np.clip(values / s, spec.qmin, spec.qmax) + residual)).sum(-1)

    h = 1e-6
    slope = (loss(s0 + h) - loss(s0 - h)) / (2 * h)
    grad_scale = LSQ(scale_gradient=False).backward(grad, x, scale, spec, True)[1].double().numpy()
    np.testing.assert_allclose(grad_scale, slope, rtol=0, atol=16 * 2 ** (bits - 1) * 4 * 2**-22 + 1e-7)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_scale_gradient_misses_the_true_slope_by_exactly_what_straight_through_ignores(bits):
    """Codes are constant near a smooth point, so the true slope is sum g * code = LSQ + sum g * v inside."""
    x, scale, grad, spec = example(bits)
    h = 1e-7
    numeric = {}
    for sign in (-1, 1):
        s = (scale.double() + sign * h)[..., None]
        v = x.double().view(3, 2, 16) / s
        numeric[sign] = (grad.double().view(3, 2, 16) * s * v.round().clamp(spec.qmin, spec.qmax)).sum(-1)
    slope = (numeric[1] - numeric[-1]) / (2 * h)
    v = x.double().view(3, 2, 16) / scale.double()[..., None]
    ignored = (grad.double().view(3, 2, 16) * v * inside_range(x, scale, spec).view(3, 2, 16)).sum(-1)
    lsq = LSQ(scale_gradient=False).backward(grad, x, scale, spec, True)[1].double()
    # Cancellation in the difference: values below 2^10, 2^-53 relative, divided by 2e-7.
    torch.testing.assert_close(lsq + ignored, slope, rtol=0, atol=16 * 2 ** (bits - 1) * 4 * 2**-22 + 1e-5)


ALL = {"ste": STE(), "lsq": LSQ(), "lsq_log": LSQ(relative=True), "dsq": DSQ(), "pact": PACT()}
every_estimator = pytest.mark.parametrize("estimator", ALL.values(), ids=ALL.keys())


@pytest.mark.parametrize("estimator", [STE(), LSQ(), PACT()], ids=["ste", "lsq", "pact"])
def test_the_gradient_passes_up_to_the_border_and_not_beyond(estimator):
    spec = spec_of(4, 6)
    x = torch.tensor([[-8.01, -8.0, -7.9, 6.9, 7.0, 7.01]]) * 0.5
    grad = torch.full_like(x, 3.0)
    grad_x, _ = estimator.backward(grad, x, torch.tensor([[0.5]]), spec, False)
    assert grad_x.tolist() == [[0, 3, 3, 3, 3, 0]]


@every_estimator
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_keeps_its_dtype(estimator, dtype):
    x, scale, grad, spec = example(4)
    assert estimator.backward(grad.to(dtype), x.to(dtype), scale, spec, True)[0].dtype == dtype


def test_the_scale_gradient_is_normalised_per_group_and_not_per_tensor():
    x, scale, grad, spec = example(4, groups=2, size=16)
    plain = LSQ(scale_gradient=False).backward(grad, x, scale, spec, True)[1]
    scaled = LSQ().backward(grad, x, scale, spec, True)[1]
    # One float32 division.
    torch.testing.assert_close(scaled, plain / math.sqrt(16 * 7), rtol=2**-22, atol=0)
    one_group = LSQ().backward(grad[:, :16], x[:, :16], scale[:, :1], spec, True)[1]
    assert torch.equal(scaled[:, :1], one_group)


def test_a_scale_of_the_whole_tensor_is_normalised_by_all_its_values():
    x, _, grad, _ = example(4)
    spec = QuantSpec(bits=4, granularity="tensor", scale_dtype="float32")
    stored = torch.full((1, 1), 0.3, requires_grad=True)
    FakeQuantize.apply(x, stored, stored.detach(), spec, LSQ()).backward(grad)
    scaled = stored.grad.clone()
    stored.grad = None
    FakeQuantize.apply(x, stored, stored.detach(), spec, LSQ(scale_gradient=False)).backward(grad)
    # Sums of three rows before or after the division: a few float32 roundings.
    torch.testing.assert_close(scaled, stored.grad / math.sqrt(x.numel() * 7), rtol=2**-20, atol=0)


def test_a_static_activation_scale_is_normalised_by_its_features_whatever_the_batch():
    spec = QuantSpec(bits=8, granularity="tensor", scale_dtype="float32")
    grads = []
    for repeats in (1, 5):
        stored = torch.tensor([0.01], requires_grad=True)
        x = torch.linspace(-2, 2, 64).expand(repeats, 64)
        wide = stored.expand(repeats, 1)
        FakeQuantize.apply(x, wide, wide.detach(), spec, LSQ()).sum().backward()
        grads.append(stored.grad.item())
    assert grads[1] == pytest.approx(5 * grads[0], rel=2**-20)  # five float32 additions


def test_autograd_through_a_fake_quantizer_is_its_estimators_gradient():
    x, scale, grad, spec = example(4)
    x.requires_grad_(), scale.requires_grad_()
    y = FakeQuantize.apply(x, scale, scale.detach(), spec, LSQ())
    assert torch.equal(y, fake_quantize(x, scale, spec).detach())
    y.backward(grad)
    expected_x, expected_scale = LSQ().backward(grad, x.detach(), scale.detach(), spec, True)
    assert torch.equal(x.grad, expected_x)
    assert torch.equal(scale.grad, expected_scale)


def test_a_frozen_scale_gets_no_gradient_and_none_is_computed():
    x, scale, grad, spec = example(4)
    x.requires_grad_()

    class Asked(LSQ):
        def backward(self, grad, x, scale, spec, needs_scale):
            assert not needs_scale
            return super().backward(grad, x, scale, spec, needs_scale)

    FakeQuantize.apply(x, scale, scale, spec, Asked()).backward(grad)
    assert scale.grad is None
    assert x.grad is not None


def test_ste_never_learns_a_scale():
    x, scale, grad, spec = example(4)
    assert not STE.learns_scale
    assert LSQ.learns_scale
    assert STE().backward(grad, x, scale, spec, True)[1] is None


@every_estimator
def test_the_scale_in_use_is_the_stored_one_rounded(estimator):
    spec = QuantSpec(bits=4, granularity="group", group_size=16)
    x, scale, _, _ = example(4)
    used = estimator.scale(x, scale, spec)
    assert torch.equal(used, scale.bfloat16().float())
    assert torch.equal(used, store_scale(scale, spec))


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
def test_following_recomputes_the_absolute_maximum_of_what_shares_a_scale(granularity):
    size = 16 if granularity == "group" else None
    spec = QuantSpec(bits=4, granularity=granularity, group_size=size)
    x = example(4)[0]
    shape = {"tensor": (1, 1), "channel": (3, 1), "group": (3, 2)}[granularity]
    for factor in (1.0, 3.0):
        absmax = {
            "tensor": (factor * x).abs().max().view(1, 1),
            "channel": (factor * x).abs().amax(1, keepdim=True),
            "group": (factor * x).view(3, 2, 16).abs().amax(-1),
        }[granularity]
        followed = STE(follow="absmax").scale(factor * x, torch.ones(shape), spec)
        assert followed.shape == shape
        assert torch.equal(followed, absmax_scale(absmax, spec))


def test_a_value_that_is_not_a_number_does_not_pass_as_inside():
    spec = spec_of(4, 2)
    assert inside_range(torch.tensor([[torch.nan, 1.0]]), torch.tensor([[1.0]]), spec).tolist() == [[False, True]]


# -- scales that follow the squared error -------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
def test_following_the_squared_error_is_the_search_of_the_calibration(granularity):
    spec = QuantSpec(bits=3, granularity=granularity, group_size=16 if granularity == "group" else None)
    x, shape = example(3)[0], {"tensor": (1, 1), "channel": (3, 1), "group": (3, 2)}[granularity]
    followed = STE(follow="mse").scale(x, torch.ones(shape), spec)
    observer = MSE(spec)
    observer.observe(x.reshape(shape[0] * shape[1], -1))
    assert torch.equal(followed, observer.scale().view(shape))
    absmax = STE(follow="absmax").scale(x, torch.ones(shape), spec)
    errors = [float((fake_quantize(x, s.expand(3, -1), spec) - x).square().sum()) for s in (followed, absmax)]
    assert errors[0] < errors[1]


def test_following_anything_else_is_refused():
    with pytest.raises(ValueError, match="STE follows absmax, mse or nothing"):
        STE(follow=True)


# -- log2 of the scale --------------------------------------------------------------------------------


def test_the_relative_gradient_is_the_slope_by_the_logarithm_of_the_scale():
    """arXiv 1903.08066: float64 central differences in p = log2 |s|, with each rounding residual held."""
    x, scale, grad, spec = example(4)
    values, g, sign = x.double().view(3, 2, 16), grad.double().view(3, 2, 16), scale.double().sign()[..., None]
    p0 = scale.double().abs().log2()[..., None]

    def clipped(p):
        return (values / (sign * 2**p)).clamp(spec.qmin, spec.qmax)

    residual = clipped(p0).round() - clipped(p0)
    h = 1e-6
    high, low = ((g * sign * 2**p * (clipped(p) + residual)).sum(-1) for p in (p0 + h, p0 - h))
    _, ours = LSQ(scale_gradient=False, relative=True).backward(grad, x, scale, spec, True)
    # As for LSQ: 16 float32 terms below 8 * 4; scales below 1.1 and ln 2 do not enlarge it.
    torch.testing.assert_close(ours.double(), (high - low) / (2 * h), rtol=0, atol=16 * 8 * 4 * 2**-22 + 1e-7)


# -- DSQ ----------------------------------------------------------------------------------------------


def soft(v, k):
    """arXiv 1908.05033, section 3.2, with interval 1: a tanh between every two codes."""
    middle = np.floor(v) + 0.5
    return middle + np.tanh(k * (v - middle)) / (2 * np.tanh(k / 2))


@pytest.mark.parametrize("k", [0.5, 1.0, 4.0, 10.0])
@pytest.mark.parametrize("bits", [2, 4])
def test_dsq_gradients_are_the_slopes_of_the_published_function(bits, k):
    """With the residual round(v) - soft(v) held, s * (soft(clip(x / s)) + residual): float64 central differences."""
    x, scale, grad, spec = example(bits)
    values, g, s0 = (t.double().numpy() for t in (x.view(3, 2, 16), grad.view(3, 2, 16), scale[..., None]))
    inner = np.clip(values / s0, spec.qmin, spec.qmax)
    residual = np.round(inner) - soft(inner, k)

    def function(x, s):
        return s * (soft(np.clip(x / s, spec.qmin, spec.qmax), k) + residual)

    h = 1e-6
    by_x = g * (function(values + h, s0) - function(values - h, s0)) / (2 * h)
    by_s = (g * (function(values, s0 + h) - function(values, s0 - h)) / (2 * h)).sum(-1)
    grad_x, grad_scale = DSQ(scale_gradient=False, start=k, end=k).backward(grad, x, scale, spec, True)
    # The slope is at most k / 2 + 1, its argument wrong by 2^bits * 2^-23, and it bends by k^2 at most.
    bound = 4 * (k / 2 + 1) * max(k, 1) * 2**bits * 2**-22
    np.testing.assert_allclose(grad_x.double().numpy().reshape(by_x.shape), by_x, rtol=0, atol=bound + 1e-7)
    np.testing.assert_allclose(grad_scale.double().numpy(), by_s, rtol=0, atol=16 * 2**bits * (bound + 1e-7))


def test_a_soft_dsq_is_lsq_and_a_hard_one_passes_nothing_at_a_code():
    x, scale, grad, spec = example(4)
    for ours, theirs in zip(
        DSQ(start=1e-3, end=1e-3).backward(grad, x, scale, spec, True),
        LSQ().backward(grad, x, scale, spec, True),
        strict=True,
    ):  # tanh(y) / y differs from 1 by y^2 / 3
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    codes = torch.arange(-8.0, 8.0)[None] * 0.5
    grad_x, _ = DSQ(start=40.0, end=40.0).backward(torch.ones(1, 16), codes, torch.tensor([[0.5]]), spec, False)
    assert grad_x.abs().max() < 1e-6


def test_the_mean_gradient_of_dsq_is_that_of_straight_through():
    v = (torch.arange(16 * 1000).double() / 1000 - 8 + 0.0005)[None].float()
    for k in (1.0, 4.0):
        grad_x, _ = DSQ(start=k, end=k).backward(torch.ones_like(v), v, torch.ones(1, 1), spec_of(4, v.numel()), False)
        inside = inside_range(v, torch.ones(1, 1), spec_of(4, v.numel()))
        assert float(grad_x[inside].double().mean()) == pytest.approx(1, abs=1e-4)  # midpoint rule, 1000 a cell


def test_dsq_hardens_geometrically_with_progress_and_others_stay_what_they_are():
    dsq = DSQ(start=1.0, end=4.0)
    assert [dsq.at(p).sharpness for p in (0, 0.5, 1)] == [1.0, 2.0, 4.0]
    assert dsq.at(0.5).at(0.25) == dsq.at(0.25)
    for other in (STE(), LSQ(), PACT()):
        assert other.at(0.7) is other


def test_a_sharpness_that_is_not_positive_is_refused():
    with pytest.raises(ValueError, match="DSQ's sharpness must be positive"):
        DSQ(start=0.0)


def test_dsq_refuses_the_odd_grid():
    assert "use estimator=seq or lsq" in DSQ().refusal(QuantSpec(bits=2, granularity="channel", grid="odd"))
    assert DSQ().refusal(spec_of(2)) is None


# -- PACT ---------------------------------------------------------------------------------------------


def test_pact_moves_its_level_by_clipped_values_only():
    """arXiv 1805.06085, eq. 3: d/dalpha is 1 where x >= alpha = qmax * s and 0 inside; mirrored at qmin * s."""
    spec = QuantSpec(bits=4, granularity="tensor", scale_dtype="float32")
    x = torch.tensor([[0.3, 3.49, 3.6, 9.0, -3.9, -4.1, -7.0]])
    grad = torch.tensor([[1.0, 10.0, 2.0, 3.0, 100.0, 5.0, 7.0]])
    grad_x, grad_scale = PACT().backward(grad, x, torch.tensor([[0.5]]), spec, True)
    assert grad_x.tolist() == [[1, 10, 0, 0, 100, 0, 0]]
    assert grad_scale.tolist() == [[7 * (2 + 3) - 8 * (5 + 7)]]


def test_pacts_scale_gradient_is_the_slope_of_the_clip():
    """Rounding inside is passed straight through: sum g * clip(x) by s, float64 central differences."""
    x, _, grad, _ = example(4)
    spec = QuantSpec(bits=4, granularity="tensor", scale_dtype="float32")
    v, g, h = x.double(), grad.double(), 1e-6
    high, low = ((g * v.clamp(spec.qmin * s, spec.qmax * s)).sum(-1) for s in (0.3 + h, 0.3 - h))
    ours = PACT().backward(grad, x, torch.full((3, 1), 0.3), spec, True)[1]
    # 32 float32 terms of at most 8 * 4.
    torch.testing.assert_close(ours.double()[:, 0], (high - low) / (2 * h), rtol=0, atol=32 * 8 * 4 * 2**-22 + 1e-6)


@pytest.mark.parametrize(
    "spec", [spec_of(4), QuantSpec(bits=8, granularity="token", dynamic=True)], ids=["group", "token"]
)
def test_pact_refuses_what_has_no_clipping_level_to_learn(spec):
    assert "PACT learns where to clip static activations" in PACT().refusal(spec)
    assert LSQ().refusal(spec) is None


def test_pact_accepts_static_activations():
    assert PACT().refusal(QuantSpec(bits=8, granularity="tensor")) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_a_weight_written_on_its_outermost_code_gets_its_gradient_in_any_dtype(bits, dtype):
    torch.manual_seed(bits)
    spec = QuantSpec(bits=bits, granularity="channel")
    scale = store_scale(torch.rand(64, 1) * 0.1 + 1e-3, spec)
    x = (torch.tensor([[spec.qmin, spec.qmax, 1.0]]) * scale).to(dtype)
    assert inside_range(x, scale, spec).all()
    beyond = (torch.tensor([[spec.qmin - 0.25, spec.qmax + 0.25]]) * scale).to(dtype)
    if bits < 8 or dtype != torch.bfloat16:  # there a quarter of a step is less than what rounding moves
        assert not inside_range(beyond, scale, spec).any()


def test_the_largest_value_of_a_token_gets_its_gradient():
    torch.manual_seed(0)
    spec = QuantSpec(bits=8, granularity="token", dynamic=True, absmax_rule="qmax")
    x = torch.randn(4096, 16)
    scale = dynamic_scale(x, spec)
    grad, _ = LSQ().backward(torch.ones_like(x), x, scale, spec, False)
    assert torch.equal(grad, torch.ones_like(x))
