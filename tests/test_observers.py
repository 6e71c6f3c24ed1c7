from functools import partial

import pytest
import torch

from qat.functional import absmax_scale, fake_quantize, store_scale
from qat.observers import EMA, MSE, Entropy, Histogram, MinMax, Percentile
from qat.scheme import QuantSpec

SPEC = QuantSpec(bits=4, granularity="channel")
EXACT = QuantSpec(bits=4, granularity="channel", scale_dtype="float32")


def rows(seed: int = 0, count: int = 64, n: int = 32) -> torch.Tensor:
    """Half the rows Gaussian, half heavy-tailed."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, n, generator=generator)
    return torch.where(torch.arange(count)[:, None] % 2 == 0, x, x**3)


def squared_error(x, scale, spec, importance=1.0):
    return ((fake_quantize(x, scale[:, None], spec) - x).square() * importance).sum(-1)


def observed(observer, *values):
    for value in values:
        observer.observe(value)
    return observer.scale()


def test_min_max_remembers_the_largest_value_of_every_batch():
    scale = observed(MinMax(EXACT), torch.tensor([[1.0, -5.0], [0.5, 0.0]]), torch.tensor([[3.0], [-2.0]]))
    assert torch.equal(scale, torch.tensor([5.0, 2.0]) / 7.5)


def test_a_moving_average_is_the_published_recursion():
    batches = [torch.tensor([[4.0, -1]]), torch.tensor([[-2.0, 1]]), torch.tensor([[8.0, 0]])]
    average = 4.0
    for absmax in (2.0, 8.0):
        average = 0.75 * average + 0.25 * absmax
    # Exact: all numbers are multiples of 1/16.
    assert observed(EMA(EXACT, momentum=0.75), *batches).item() == absmax_scale(torch.tensor([average]), EXACT).item()


def test_the_first_observation_of_a_moving_average_counts_whole():
    assert (
        observed(EMA(EXACT), torch.tensor([[-3.0, 1]])).item() == observed(MinMax(EXACT), torch.tensor([[3.0]])).item()
    )


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_squared_error_never_exceeds_that_of_the_absolute_maximum(bits):
    spec = QuantSpec(bits=bits, granularity="channel")
    x = rows()
    best = squared_error(x, observed(MSE(spec), x), spec)
    plain = squared_error(x, observed(MinMax(spec), x), spec)
    assert (best <= plain).all()
    assert (best < plain).any()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_no_coarse_ratio_is_better(bits):
    spec, x = QuantSpec(bits=bits, granularity="channel"), rows()
    observer = MSE(spec)
    chosen = squared_error(x, observed(observer, x), spec)
    start = observed(MinMax(spec), x)
    assert observer.ratios == pytest.approx([1.12 - 0.02 * step for step in range(37)])
    for ratio in observer.ratios:  # exact: the same products, summed alike
        assert (chosen <= squared_error(x, store_scale(start * ratio, spec), spec)).all(), ratio


def fine_optimum(x, start, spec):
    """The least squared error over [0.4, 1.12] of `start`, its scale, and the error's curvature there, a row each.

    With the codes q of a scale fixed, sum (x - q s)^2 is a parabola in s of curvature sum q^2; so each of 721 ratios
    is moved to the vertex of its own parabola (or the range's end, which is a ratio that is tried).  Over all scales
    the error is the lower envelope of such parabolas, which is not convex: it has many valleys.
    """
    least, best, curvature = torch.full_like(start, torch.inf), start, torch.zeros_like(start)
    for ratio in torch.linspace(1.12, 0.4, 721).tolist():
        scale = start[:, None] * ratio
        codes = (fake_quantize(x, scale, spec) / scale).round()
        square = codes.square().sum(-1).clamp(min=1)
        vertex = ((x * codes).sum(-1) / square).clamp(0.4 * start, 1.12 * start)
        error = (x - codes * vertex[:, None]).square().sum(-1)
        better = error < least
        least, best = torch.where(better, error, least), torch.where(better, vertex, best)
        curvature = torch.where(better, square, curvature)
    return least, best, curvature


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_refined_search_is_close_to_the_optimum_of_a_fine_grid(bits):
    spec, x = QuantSpec(bits=bits, granularity="channel", scale_dtype="float32"), rows()
    observer = MSE(spec)
    chosen = squared_error(x, observed(observer, x), spec)
    start = observed(MinMax(spec), x)
    by_ratio = torch.stack([squared_error(x, start * ratio, spec) for ratio in observer.ratios])
    coarse, middle = by_ratio.amin(0), torch.tensor(observer.ratios)[by_ratio.argmin(0)]
    least, best, curvature = fine_optimum(x, start, spec)
    step = observer.ratios[0] - observer.ratios[1]

    def slack(resolution):
        # Some ratio tried is within half a resolution of the vertex, and rounding anew only lowers the parabola.
        # 1e-5: float32 sums of 32 squares.
        return (resolution / 2 * start).square() * curvature + 1e-5 * least

    # The refinement sees only the valleys within one coarse step of the best coarse ratio.
    seen = (best / start - middle).abs() <= step
    assert seen.float().mean() >= 0.8
    assert (chosen <= least + slack(2 * step / 10))[seen].all()
    # In another valley the coarse ratios alone still bound the error.
    assert (chosen <= least + slack(step)).all()
    assert chosen.mean() <= (least + slack(2 * step / 10)).mean()
    # What a search without its second stage would fail.
    assert not (coarse <= least + slack(2 * step / 10))[seen].all()
    assert coarse.mean() > (least + slack(2 * step / 10)).mean()


def test_importance_decides_whose_error_counts():
    x = rows(1)
    importance = torch.ones_like(x)
    importance[:, ::4] = 100.0
    weighted, plain = MSE(SPEC), MSE(SPEC)
    weighted.observe(x, importance)
    plain.observe(x)
    with_it, without = weighted.scale(), plain.scale()
    assert (squared_error(x, with_it, SPEC, importance) <= squared_error(x, without, SPEC, importance)).all()
    assert (squared_error(x, without, SPEC) <= squared_error(x, with_it, SPEC)).all()
    assert not torch.equal(with_it, without)


def test_importance_of_a_column_is_shared_by_rows():
    x, importance = rows(2), torch.linspace(0, 3, 32)
    shared, full = MSE(SPEC), MSE(SPEC)
    shared.observe(x, importance)
    full.observe(x, importance.expand_as(x))
    assert torch.equal(shared.scale(), full.scale())


def test_a_value_without_importance_may_be_clipped():
    x = torch.full((1, 16), 1.0)
    x[0, 0] = 2.0
    observer = MSE(EXACT)
    observer.observe(x, torch.tensor([0.0] + [1.0] * 15))
    # The fifteen ones are then reproduced better than with the outlier's own scale.
    assert observer.scale().item() < observed(MinMax(EXACT), x).item()
    assert observer.scale().item() < observed(MSE(EXACT), x).item() * 1.0001


def test_several_observations_with_importance_are_one_observation_of_all():
    x, importance = rows(3), torch.rand(64, 32, generator=torch.Generator().manual_seed(0))
    parts, whole = MSE(SPEC), MSE(SPEC)
    for columns in (slice(0, 10), slice(10, 32)):
        parts.observe(x[:, columns], importance[:, columns])
    whole.observe(x, importance)
    assert torch.equal(parts.scale(), whole.scale())


def test_a_sample_of_many_values_keeps_its_importance():
    x, importance = rows(4, 2, 4096), torch.ones(4096)
    observer = MSE(SPEC, most=512)
    observer.observe(x, importance)
    plain = MSE(SPEC, most=512)
    plain.observe(x)
    assert torch.equal(observer.scale(), plain.scale())


@pytest.mark.parametrize("features", [2, 64, 96, 1024])
def test_the_sample_of_an_activation_sees_every_feature(features):
    """Every nth value of (tokens, features), n a multiple of `features`, would be always the same feature."""
    most, tokens = 4096, 512
    x = torch.zeros(tokens, features)
    x[:, 1] = 1.0 + torch.arange(tokens) / tokens
    observer = MSE(SPEC, most=min(most, x.numel() // 4))
    observer.observe(x.reshape(1, -1))
    seen = (observer.values != 0).float().mean().item()
    # Binomial: five standard deviations.
    share = 1 / features
    assert seen == pytest.approx(share, abs=5 * (share / observer.most) ** 0.5)
    assert seen > 0


def test_of_many_observations_no_more_is_held_than_of_one_and_each_has_its_share():
    observer, most = MSE(SPEC, most=1024), 1024
    for number in range(1, 11):
        observer.observe(torch.full((2, 700), float(number)))
        assert observer.values.shape == (2, min(700 * number, most))
    assert torch.equal(*observer.values)  # the same columns in every row
    for number in range(1, 11):  # binomial: five standard deviations
        share = (observer.values == number).float().mean().item()
        assert share == pytest.approx(0.1, abs=5 * (0.1 / most) ** 0.5)


def test_a_large_sample_finds_nearly_the_scale_of_all_values():
    x = torch.randn(1, 1 << 16, generator=torch.Generator().manual_seed(5))
    sampled = observed(MSE(EXACT, most=1 << 13), *x.split(1 << 14, -1))
    full = observed(MSE(EXACT), x)
    # The error is flat around its minimum: a few coarse steps of two percent of the start.
    assert abs(sampled / full - 1) < 0.1
    best, least = (squared_error(x, s, EXACT).item() for s in (sampled, full))
    assert least <= best < 1.02 * least


@pytest.mark.parametrize("observer", [MinMax, EMA, MSE, Percentile, partial(Entropy, bins=256)])
def test_nothing_observed_names_the_calibration_data(observer):
    with pytest.raises(ValueError, match="no value was observed: the calibration data has no usable token"):
        observer(SPEC).scale()


@pytest.mark.parametrize("observer", [MinMax, EMA, MSE, Percentile, partial(Entropy, bins=256)])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite_are_refused(observer, bad):
    watched = observer(SPEC)
    watched.observe(torch.tensor([[1.0, bad], [1.0, 2.0]]))
    watched.observe(torch.ones(2, 2))
    with pytest.raises(ValueError, match="NaN or infinite values were observed"):
        watched.scale()


@pytest.mark.parametrize("observer", [MinMax, EMA, MSE, Percentile, partial(Entropy, bins=256)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_scale_is_float32_and_one_a_row(observer, dtype):
    scale = observed(observer(SPEC), rows(n=8).clamp(-100, 100).to(dtype))
    assert scale.shape == (64,)
    assert scale.dtype == torch.float32
    assert torch.equal(scale, store_scale(scale, SPEC))


@pytest.mark.parametrize("observer", [MinMax, EMA, MSE, Percentile, partial(Entropy, bins=256)])
def test_a_row_of_zeros_has_a_positive_scale(observer):
    assert observed(observer(SPEC), torch.zeros(2, 4)).gt(0).all()


@pytest.mark.parametrize("observer", [MinMax, EMA, MSE, Percentile, partial(Entropy, bins=256)])
def test_observing_changes_nothing_and_keeps_no_graph(observer):
    x = torch.randn(2, 8, requires_grad=True)
    before = x.detach().clone()
    assert not observed(observer(SPEC), x * 1).requires_grad
    assert torch.equal(x, before)


def test_the_search_does_not_depend_on_torchs_default_dtype():
    values = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))

    def searched():
        observer = MSE(QuantSpec(bits=4, granularity="channel", scale_dtype="float32"))
        observer.observe(values)
        return observer.scale()

    expected, default = searched(), torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)  # as Lightning does around every forward of bf16-true
        found = searched()
    finally:
        torch.set_default_dtype(default)
    assert torch.equal(found, expected)


INT8 = QuantSpec(bits=8, granularity="tensor", scale_dtype="float32")
SIGNLESS = QuantSpec(bits=8, granularity="tensor", symmetric=False, scale_dtype="float32")


def tailed(count: int = 1 << 15, seed: int = 0) -> torch.Tensor:
    """Gaussian, but one value in 4096 up to a hundred times as large."""
    x = torch.randn(1, count, generator=torch.Generator().manual_seed(seed))
    x[:, ::4096] *= 100
    return x


def test_a_histogram_that_grew_has_the_counts_of_one_that_did_not():
    parts = [
        scale * torch.randn(3, 500, generator=torch.Generator().manual_seed(i)) for i, scale in enumerate((1, 40, 3))
    ]
    parts[1][1] /= 40  # a row that hardly grows
    parts[1][2] /= 2
    grown = Histogram(INT8, bins=64)
    for part in parts:
        grown.observe(part)
    assert len(set(grown.limit[:, 0].tolist())) == 3
    for row, (counts, limit) in enumerate(zip(grown.counts, grown.limit[:, 0].tolist(), strict=True)):
        values = torch.cat([part[row] for part in parts])
        assert torch.equal(counts.float(), torch.histc(values, 64, -limit, limit))
    assert grown.centers[0, [0, 31, 32, 63]].tolist() == pytest.approx(
        [limit * share for limit in grown.limit[:1, 0].tolist() for share in (-63 / 64, -1 / 64, 1 / 64, 63 / 64)]
    )


@pytest.mark.parametrize("percentile", [60.0, 99.0, 99.9, 100.0])
def test_a_percentile_is_that_of_the_values_to_the_width_of_a_bin(percentile):
    x, observer = tailed(), Percentile(INT8, percentile)
    reach = observed(observer, *x.split(5000, -1)) * 127.5
    width = 2 / observer.bins * observer.limit
    exact = torch.quantile(x.abs(), percentile / 100, interpolation="higher")
    slack = 2**-22 * reach  # a float32 division into a scale, and the product that undoes it
    assert exact - slack <= reach <= exact + width + slack
    assert reach <= x.abs().amax() + slack


def test_an_asymmetric_percentile_clips_as_much_at_both_ends():
    x = torch.cat([torch.zeros(1, 10), torch.linspace(0, 1, 100_000)[None] ** 2], -1) - 0.25
    observer = Percentile(SIGNLESS, 99.0)
    scale = observed(observer, x)
    offset = observer.offset(scale)
    low, high = offset - 128 * scale, offset + 127 * scale
    ends = torch.quantile(x, torch.tensor([0.005, 0.995]))
    assert torch.stack([low, high])[:, 0] == pytest.approx(ends, abs=2 / observer.bins * observer.limit.item())


def published_divergence(x: torch.Tensor, reach: float, bins: int, spec: QuantSpec) -> float:
    """KL of the histograms, bin by bin."""
    limit, total = 2.0 ** x.abs().max().log2().ceil().item(), x.numel()
    centers = [limit * ((b + 0.5) * 2 / bins - 1) for b in range(bins)]
    counts = torch.histc(x, bins, -limit, limit).tolist()
    inside = [b for b in range(bins) if -reach <= centers[b] <= reach]
    p = {b: counts[b] for b in inside}
    p[inside[0]] += sum(counts[: inside[0]])
    p[inside[-1]] += sum(counts[inside[-1] + 1 :])
    code_of = {b: fake_quantize(torch.tensor([centers[b]]), torch.tensor([reach / 7.5]), spec).item() for b in inside}
    kept, result = sum(counts[b] for b in inside), 0.0
    for b in inside:
        if p[b]:
            mates = [m for m in inside if code_of[m] == code_of[b]]
            q = sum(counts[m] for m in mates) / sum(p[m] > 0 for m in mates)
            result += p[b] / total * torch.tensor(p[b] / total / ((q or 0.5) / kept)).log().item()
    return result


def test_the_entropy_range_has_the_least_divergence_of_all_that_are_tried():
    x, bins = tailed(4097), 512
    observer = Entropy(EXACT, bins)
    reach = observed(observer, x).item() * 7.5
    by_ratio = {k: published_divergence(x, x.abs().max().item() * (1 - k / 128), bins, EXACT) for k in range(121)}
    best = min(by_ratio, key=by_ratio.__getitem__)
    assert reach == pytest.approx(x.abs().max().item() * (1 - best / 128), rel=1e-6)
    assert 0 < best < 120


def test_entropy_clips_a_thin_tail_and_keeps_a_full_range():
    assert observed(Entropy(INT8), tailed()).item() < 0.5 * observed(MinMax(INT8), tailed()).item()
    even = torch.linspace(-1, 1, 1 << 15)[None]
    assert observed(Entropy(INT8), even).item() > 0.95 * observed(MinMax(INT8), even).item()


def test_entropy_shrinks_each_end_of_an_asymmetric_range_for_itself():
    x = tailed().abs() - 0.2  # a tail above alone
    observer = Entropy(SIGNLESS)
    scale = observed(observer, x)
    low, high = (observer.offset(scale) + code * scale for code in (-128, 127))
    assert high < 0.5 * x.max()
    # Nothing thin lies below, so that end stays: to the float32 rounding of a sum in which 128 scales cancel.
    assert low == pytest.approx(x.min().item(), abs=128 * scale.item() * 2**-22)
