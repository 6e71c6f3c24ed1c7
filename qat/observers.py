"""Observers watch values and answer with a scale, and with an offset where the spec is asymmetric.

Each observes rows of values that will share a scale, (rows, n), any number of times, and then gives
one scale a row.  For a weight the rows are its groups; for an activation there is one row.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from qat.functional import absmax_scale, fake_quantize, store_scale, zero_point
from qat.scheme import QuantSpec


class MinMax:
    """The largest absolute value ever seen; for an asymmetric spec, how far values reach below 0 and above.

    Args:
        spec: of the tensor that is observed.
    """

    def __init__(self, spec: QuantSpec):
        self.spec = spec
        self.reach: Tensor | None = None  # (rows, 1), or (rows, 2): below, above; not negative

    def observe(self, values: Tensor) -> None:
        """Watch `values` (rows, n), floating."""
        seen = self._reach(values)
        self.reach = seen if self.reach is None else torch.maximum(self.reach, seen)

    def _reach(self, values: Tensor) -> Tensor:
        if self.spec.symmetric:
            return values.detach().abs().amax(-1, keepdim=True).float()
        low, high = values.detach().aminmax(dim=-1)
        return torch.stack([-low, high], -1).float().clamp_(min=0)

    def scale(self) -> Tensor:
        """(rows,), float32.

        Raises:
            ValueError: nothing was observed, or a value was not finite.
        """
        if self.reach is None:
            raise ValueError("no value was observed: the calibration data has no usable token")
        if not torch.isfinite(self.reach).all():
            raise ValueError("NaN or infinite values were observed")
        return self._covering(self.reach)

    def _covering(self, reach: Tensor) -> Tensor:
        """The scales (rows,) whose codes cover `reach`."""
        if self.spec.symmetric:
            return absmax_scale(reach[:, 0], self.spec)
        return store_scale(reach.sum(-1) / (self.spec.qmax - self.spec.qmin), self.spec)

    def offset(self, scale: Tensor) -> Tensor | None:
        """The offsets (rows,) that go with `scale`, float32: qmin is the smallest value.  None for symmetric specs."""
        return None if self.spec.symmetric else self._offset(self.reach, scale)

    def _offset(self, reach: Tensor | None, scale: Tensor) -> Tensor:
        assert reach is not None
        return -reach[:, 0] - self.spec.qmin * scale

    def _shrunk(self, ratios: list[float], cost: Callable[[Tensor, Tensor, Tensor | None], Tensor]) -> Tensor:
        """`reach`, each end of it in turn (the upper one first) multiplied by the ratio of the least cost.

        Args:
            ratios: tried in this order; the first of equals stays.
            cost: (rows,), of a reach and of the scales (rows, 1) and zero points (rows, 1), or None, that it has.
        """
        assert self.reach is not None
        reach = self.reach
        for end in reversed(range(reach.shape[1])):
            whole, best = reach.clone(), reach
            least = torch.full_like(reach[:, 0], torch.inf)
            for ratio in ratios:
                tried = whole.clone()
                tried[:, end] *= ratio
                scale = self._covering(tried)
                zero = (
                    None if self.spec.symmetric else zero_point(self._offset(tried, scale), scale, self.spec)[:, None]
                )
                found = cost(tried, scale[:, None], zero)
                best = torch.where((found < least)[:, None], tried, best)
                least = torch.minimum(found, least)
            reach = best
        return reach


class EMA(MinMax):
    """An exponential moving average of each observation's largest absolute value (after arXiv 1712.05877, section 3.1).

    The paper averages both ends of the range, as is done here for asymmetric specs.

    Args:
        spec: of the tensor that is observed.
        momentum: weight of the past; the first observation counts whole.
    """

    def __init__(self, spec: QuantSpec, momentum: float = 0.9):
        super().__init__(spec)
        self.momentum = momentum

    def observe(self, values: Tensor) -> None:
        seen = self._reach(values)
        self.reach = seen if self.reach is None else self.momentum * self.reach + (1 - self.momentum) * seen


# The search goes a little beyond absmax: with absmax / 7.5 the largest weight is clipped to code 7.
_WIDEST = 1.12
# Ratios tried within one coarse step on either side of the best coarse one.
_REFINED = 11


def _evenly(first: float, last: float, count: int) -> list[float]:
    # float32 by name: the default is bfloat16 within a forward of bf16-true, where STE(follow="mse") searches.
    return torch.linspace(first, last, count, dtype=torch.float32).tolist()


class MSE(MinMax):
    """The scale with the smallest squared error, searched over shrunk ranges.

    Minimises sum_j h_j (x_j - fq(x_j))^2 over scale = ratio * absmax scale, one ratio a row; h is the
    importance of each column: 1 where none is given; E[x_j^2] of a layer's inputs makes it the layer's output error
    (arXiv 2004.10568, eq. 19) with E[x x^T] taken for its diagonal.

    Args:
        spec: of the tensor that is observed.
        signed: give a row a negative scale where the unpaired code qmin then serves its positive extreme better.
        shrink: the smallest ratio tried.
        steps: how many ratios are tried at first, from 1.12 down; 11 finer ones around the best follow.
        most: values a row kept for the search (a random sample of more, the same columns in every row).
    """

    def __init__(
        self, spec: QuantSpec, signed: bool = False, shrink: float = 0.4, steps: int = 37, most: int = 1 << 16
    ):
        super().__init__(spec)
        self.signed = signed
        self.ratios = _evenly(_WIDEST, shrink, steps)
        self.coarse = self.ratios[0] - self.ratios[1]
        self.most = most
        self.values: Tensor | None = None
        self.importance: Tensor | None = None
        self.seen = 0  # sampled values a row that `values` stands for
        self.sampler = torch.Generator().manual_seed(0)

    def observe(self, values: Tensor, importance: Tensor | None = None) -> None:
        """Watch `values` (rows, n), with `importance` (rows, n) or (n,) where columns differ in weight."""
        super().observe(values)
        assert self.values is None or (importance is None) == (self.importance is None), "with all values or with none"
        sample = self._sample(values.shape[-1])
        found = values.detach()[..., sample].float()
        weight = None if importance is None else importance.expand_as(values)[..., sample]
        if self.values is not None:
            places = self._places(self.values.shape[-1], found.shape[-1])
            found = torch.cat((self.values, found), -1)[..., places]
            if weight is not None and self.importance is not None:
                weight = torch.cat((self.importance, weight), -1)[..., places]
        self.values, self.importance = found, weight

    def _sample(self, count: int) -> Tensor | slice:
        # Not every nth: with n a multiple of the features of a token, the same few features would be all it sees.
        # And not without repetition, for which all `count` places would have to be shuffled.
        return slice(None) if count <= self.most else torch.randint(count, (self.most,), generator=self.sampler)

    def _places(self, kept: int, new: int) -> Tensor | slice:
        """Which of `kept` values and, behind them, `new` ones stay: at most `most`, each as likely as any before."""
        before, self.seen = max(self.seen, kept), max(self.seen, kept) + new
        if kept + new <= self.most:
            return slice(None)
        stays = torch.arange(kept) if kept == self.most else torch.randint(kept, (self.most,), generator=self.sampler)
        comes = kept + torch.randint(new, (self.most,), generator=self.sampler)
        return torch.where(torch.rand(self.most, generator=self.sampler) * self.seen < before, stays, comes)

    def scale(self) -> Tensor:
        start, values, importance = super().scale(), self.values, self.importance
        assert values is not None
        if not self.spec.symmetric:
            return self._shrink_ends(values)
        best, least = torch.ones_like(start), torch.full_like(start, torch.inf)
        signs = (1, -1) if self.signed and self.spec.grid == "full" else (1,)  # others have no unpaired code
        coarse = [sign * ratio for sign in signs for ratio in self.ratios]
        for tried in (coarse, _evenly(-self.coarse, self.coarse, _REFINED)):
            middle = torch.zeros_like(best) if tried is coarse else best.clone()
            for ratio in tried:
                scale = store_scale(start * (middle + ratio), self.spec)
                error = fake_quantize(values, scale[:, None], self.spec).sub_(values).square_()
                if importance is not None:
                    error *= importance
                error = error.sum(-1)
                better = error < least
                best, least = torch.where(better, middle + ratio, best), torch.where(better, error, least)
        return store_scale(start * best, self.spec)

    def _shrink_ends(self, values: Tensor) -> Tensor:
        """Of an asymmetric tensor: shrink what is covered above 0, then below, each to the least squared error."""

        def squared_error(_: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
            return fake_quantize(values, scale, self.spec, zero).sub_(values).square_().sum(-1)

        self.reach = self._shrunk(self.ratios, squared_error)
        return self._covering(self.reach)


class Histogram(MinMax):
    """Counts values in equal bins over [-limit, limit) of each row; a limit doubles until every value lies within.

    Limits are powers of two and doubling joins the bins in pairs, so the counts are exactly those of all values in the
    bins of the last limit.

    Args:
        spec: of the tensor that is observed.
        bins: a power of two.
    """

    def __init__(self, spec: QuantSpec, bins: int = 8192):
        super().__init__(spec)
        self.bins = bins
        self.counts = self.limit = torch.empty(0)  # (rows, bins), float64; (rows, 1), float32

    def observe(self, values: Tensor) -> None:
        super().observe(values)
        values = values.detach().float()
        absmax = values.abs().amax(-1, keepdim=True)
        if not torch.isfinite(absmax).all():
            return  # which `scale` refuses
        if not len(self.limit):
            self.limit = torch.ldexp(torch.ones_like(absmax), absmax.frexp().exponent)  # the first power above
            self.counts = values.new_zeros((len(values), self.bins), dtype=torch.float64)
        while (beyond := absmax >= self.limit).any():
            self.limit = torch.where(beyond, 2 * self.limit, self.limit)
            joined = self.counts.view(len(values), -1, 2).sum(-1)
            joined = torch.nn.functional.pad(joined, (self.bins // 4, self.bins // 4))
            self.counts = torch.where(beyond, joined, self.counts)
        index = (values / self.limit * (self.bins // 2)).floor().long() + self.bins // 2
        self.counts.scatter_add_(1, index, torch.ones_like(index, dtype=torch.float64))

    @property
    def centers(self) -> Tensor:
        """(rows, bins), float32."""
        middle = torch.arange(self.bins, device=self.limit.device) + 0.5
        return (middle * (2 / self.bins) - 1) * self.limit


class Percentile(Histogram):
    """Covers a share of all values, and clips the rest (the "percentile" of arXiv 2004.09602).

    Args:
        spec: of the tensor that is observed.
        percentile: of the values that are covered, above 50 and at most 100.  What an asymmetric spec clips is shared
            by both ends.
        bins: of the histogram that the range is read from, to a bin's width.
    """

    def __init__(self, spec: QuantSpec, percentile: float = 99.99, bins: int = 8192):
        super().__init__(spec, bins)
        self.percentile = percentile

    def scale(self) -> Tensor:
        super().scale()
        assert self.reach is not None
        below, above = self.counts[:, : self.bins // 2].flip(-1), self.counts[:, self.bins // 2 :]  # from 0 outwards
        clipped = (1 - self.percentile / 100) * self.counts.sum(-1, keepdim=True)
        if self.spec.symmetric:
            ends = [self._end(below + above, clipped)]
        else:
            ends = [self._end(side, clipped / 2) for side in (below, above)]
        self.reach = torch.minimum(torch.stack(ends, -1), self.reach)
        return self._covering(self.reach)

    def _end(self, side: Tensor, clipped: Tensor) -> Tensor:
        """(rows,): the outer edge of the first bin beyond which at most `clipped` values lie."""
        beyond = side.sum(-1, keepdim=True) - side.cumsum(-1)
        bins = (beyond > clipped).sum(-1) + 1
        return bins * (2 / self.bins) * self.limit[:, 0]


# Of the whole range; at the last, 1/16, the bins of a histogram are hardly finer than 8-bit codes.
_NARROWER = [1 - step / 128 for step in range(121)]


class Entropy(Histogram):
    """The range whose quantized histogram says most of the original one (TensorRT's "entropy"; arXiv 2004.09602).

    Minimises KL(P || Q) over ranges.  P is the histogram within the range, what lies beyond it added at its ends.  Q is
    what codes keep of the values within: the count of each code, spread evenly over those of its bins that P fills.  A
    bin that P fills and Q does not counts as half a value in Q, where NVIDIA's code has an infinite divergence; nor are
    signs dropped here, as they are there.

    Args:
        spec: of the tensor that is observed.
        bins: of the histogram.
    """

    def scale(self) -> Tensor:
        super().scale()
        self.reach = self._shrunk(_NARROWER, self._divergence)
        return self._covering(self.reach)

    def _divergence(self, reach: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        centers = self.centers
        below, above = centers < -reach[:, :1], centers > reach[:, -1:]
        inside = self.counts.masked_fill(below | above, 0)
        full = inside.clone()
        for beyond, edge in ((below, below.sum(-1)), (above, self.bins - 1 - above.sum(-1))):
            full.scatter_add_(1, edge[:, None], (self.counts * beyond).sum(-1, keepdim=True))
        codes = fake_quantize(centers, scale, self.spec, zero)
        code = torch.nn.functional.pad(codes.diff(dim=-1) != 0, (1, 0)).cumsum(-1)  # numbered along the bins
        held, filled = (torch.zeros_like(full).scatter_add_(1, code, x) for x in (inside, (full > 0).double()))
        kept = (held / filled.clamp(min=1)).gather(1, code)
        kept = torch.where(kept > 0, kept, 0.5) / inside.sum(-1, keepdim=True).clamp(min=1)
        share = full / full.sum(-1, keepdim=True)
        return torch.xlogy(share, share / kept).sum(-1).float()


# Rows of a weight searched at a time: bounds the memory of the search to a few times 32 MB.
_CHUNK = 1 << 23


def mse_scale(
    weight: Tensor, shape: tuple[int, int], spec: QuantSpec, signed: bool = False, importance: Tensor | None = None
) -> Tensor:
    """The scales of a weight with the smallest squared error, as `MSE` finds them.

    Args:
        weight: (out, in), floating.
        shape: of its scales: (out, groups), or (1, 1) for one of the whole tensor.
        spec: of the weight.
        signed: as in `MSE`.
        importance: (in,), of each input column; all alike where it is None.

    Returns:
        `shape`, float32.

    Raises:
        ValueError: a weight is not finite.
    """
    scales, per_scale = [], weight.numel() // (shape[0] * shape[1])
    for rows in weight.reshape(shape[0], -1).split(max(1, _CHUNK * shape[0] // weight.numel())):
        values = rows.reshape(-1, per_scale)
        weights = None
        if importance is not None:
            weights = importance.repeat(rows.numel() // len(importance)).view(values.shape)
        observer = MSE(spec, signed, most=per_scale)
        observer.observe(values, weights)
        scales.append(observer.scale().view(-1, shape[1]))
    return torch.cat(scales)
