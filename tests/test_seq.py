"""Stretched elastic quantization: its gradients are the published ones, on the grids it is for."""

import pytest
import torch

from qat.estimators import LSQ, SEQ
from qat.scheme import QuantSpec

STRETCHED = [("odd", 2, 4, 0.5), ("odd", 3, 8, 0.5), ("narrow", 2, 3, 0.0), ("narrow", 4, 15, 0.0)]
stretched = pytest.mark.parametrize(("grid", "bits", "k", "shift"), STRETCHED, ids=["2 bit", "3 bit", "ternary", "15"])


def stretched_example(grid: str, bits: int):
    """Values of which about a third is clipped, at least 0.1 steps away from every rounding and clipping border."""
    spec = QuantSpec(bits=bits, granularity="group", group_size=16, grid=grid, scale_dtype="float32")
    generator = torch.Generator().manual_seed(bits)
    scale = 0.1 + torch.rand(3, 2, generator=generator)
    scale[:, ::2] *= -1
    codes = torch.randint(-(2**bits), 2**bits, (3, 2, 16), generator=generator) * spec.spacing + spec.qmax
    offset = 0.8 * spec.spacing * (torch.rand(codes.shape, generator=generator) - 0.5)
    x = ((codes + offset) * scale[..., None]).flatten(-2)
    return x, scale, torch.randn(x.shape, generator=generator), spec


@stretched
def test_seq_gradients_are_those_of_the_paper_in_alpha(grid, bits, k, shift):
    """arXiv 2502.02631: w / alpha against -1 and 1; d/dalpha is level - w / alpha inside, +-(k - 1) / k outside."""
    x, scale, grad, spec = stretched_example(grid, bits)
    scales_of_alpha = k / 2 * spec.spacing
    alpha = (scale.double() * scales_of_alpha)[..., None]
    v, g = x.double().view(3, 2, 16) / alpha, grad.double().view(3, 2, 16)
    inside = v.abs() < 1
    levels = ((v * k / 2 - shift).round() + shift) * 2 / k
    by_alpha = (g * torch.where(inside, levels - v, v.sign() * (k - 1) / k)).sum(-1)
    grad_x, grad_scale = SEQ(scale_gradient=False).backward(grad, x, scale, spec, True)
    assert torch.equal(grad_x.double().view(3, 2, 16), g * inside)
    assert 0.1 < float(inside.double().mean()) < 0.9
    # d alpha / d scale. 16 float32 terms of at most qmax * 4, each v rounded to 2^-24 relative.
    bound = 16 * spec.qmax * 4 * 2**-21
    torch.testing.assert_close(grad_scale.double(), by_alpha * scales_of_alpha, rtol=0, atol=bound)


@stretched
def test_seqs_scale_gradient_is_the_slope_of_the_straight_through_function(grid, bits, k, shift):
    """With each rounding residual held, s * (clip(x / s) + residual) is smooth: float64 central differences."""
    x, scale, grad, spec = stretched_example(grid, bits)
    values, g, s0 = x.double().view(3, 2, 16), grad.double().view(3, 2, 16), scale.double()[..., None]
    reach, h = spec.qmax + spec.spacing / 2, 1e-6
    codes = torch.tensor(range(spec.qmin, spec.qmax + 1, spec.spacing)).double()
    clipped = (values / s0).clamp(-reach, reach)
    residual = codes[(clipped[..., None] - codes).abs().argmin(-1)] - clipped
    high, low = ((g * s * ((values / s).clamp(-reach, reach) + residual)).sum(-1) for s in (s0 + h, s0 - h))
    grad_scale = SEQ(scale_gradient=False).backward(grad, x, scale, spec, True)[1]
    torch.testing.assert_close(
        grad_scale.double(), (high - low) / (2 * h), rtol=0, atol=16 * spec.qmax * 4 * 2**-21 + 1e-6
    )


def test_seq_passes_gradients_in_the_outer_half_of_the_outermost_bins_where_lsq_does_not():
    spec = QuantSpec(bits=2, granularity="group", group_size=6, grid="odd", scale_dtype="float32")
    x, grad = torch.tensor([[-4.01, -4.0, -3.1, 3.0, 4.0, 4.01]]) * 0.5, torch.full((1, 6), 3.0)
    passed = {e: e.backward(grad, x, torch.tensor([[0.5]]), spec, False)[0].tolist()[0] for e in (SEQ(), LSQ())}
    assert passed == {SEQ(): [0, 3, 3, 3, 3, 0], LSQ(): [0, 0, 0, 3, 0, 0]}


def test_seq_leaves_the_full_grid_to_lsq():
    x, scale, grad, spec = stretched_example("full", 3)
    for ours, lsq in zip(
        SEQ().backward(grad, x, scale, spec, True), LSQ().backward(grad, x, scale, spec, True), strict=True
    ):
        assert torch.equal(ours, lsq)
