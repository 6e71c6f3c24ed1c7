"""Equalization: move a factor for each input feature from where it is hard to round to where it is easy.

    y = W x = (W diag(s)) (diag(1/s) x)

diag(1/s) goes into what makes x, a norm's gain or a linear layer's rows, so the float function stays.  The methods
differ in the statistic that s is made of, and in where they apply it; both search its exponent by the error of the
quantized layers' outputs.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qat.calibration.blocks import Run, find_blocks, stream
from qat.calibration.llama_like import Pair, check_llama_like, find_pairs
from qat.calibration.method import Calibration, described
from qat.calibration.ranges import RangeCalibration
from qat.fake_quantizer import unmasked
from qat.functional import absmax_scale, dynamic_scale, fake_quantize
from qat.insertion import layers
from qat.nn import FakeQuantLinear

log = logging.getLogger(__name__)

# Factors are kept within this of 1: beyond, the features left behind vanish in bfloat16.
_WIDEST_FACTOR = 2.0**12


@dataclass(frozen=True)
class Inputs:
    """What was seen of the inputs of one pair's consumers.

    Attributes:
        absmax: (in,), float32, over all real tokens.
        mean: (in,), float32, of absolute values.
        sample: (tokens, in), float32, evenly spread over the data.
    """

    absmax: Tensor
    mean: Tensor
    sample: Tensor


@dataclass
class Equalization:
    """Equalizes each block of a Llama-like model, then has its scales set by another calibration.

    Attributes:
        name: what tables call it.
        then: sets scales (and rounds weights) in each block after it was equalized.
        exponents: tried for each pair; 0 leaves the pair as it is.
        pairs: where factors are moved: `qkv` and `gate_up` (from the norms), `o` (from v), `down` (from up).
        tokens: kept of each pair's inputs to compute the output error with.
        sequential: blocks see the outputs of the quantized blocks before them.
        offload: map finished blocks from their files, so that a model larger than memory passes.
    """

    name: str
    then: Calibration = field(default_factory=lambda: RangeCalibration("mse"))
    exponents: tuple[float, ...] = tuple(i / 20 for i in range(20))
    pairs: tuple[str, ...] = ("qkv", "o", "gate_up", "down")
    tokens: int = 1024
    sequential: bool = True
    offload: bool = False
    changes_weights: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.exponents, self.pairs = tuple(self.exponents), tuple(self.pairs)
        if not self.exponents or not all(0 <= a <= 1 for a in self.exponents):
            raise ValueError(f"calibration {self.name}: exponents must be in [0, 1], got {list(self.exponents)}")
        if unknown := set(self.pairs) - {"qkv", "o", "gate_up", "down"}:
            raise ValueError(f"calibration {self.name}: pairs are qkv, o, gate_up and down, not {sorted(unknown)[0]}")

    def factor(self, inputs: Inputs, pair: Pair, exponent: float) -> Tensor:
        """s (producer's out,) before it is limited; what a method is."""
        raise NotImplementedError

    def check(self, model: nn.Module) -> None:
        """Refuse what this method cannot treat; `model` may be float still."""
        check_llama_like(self.name, model)
        self.then.check(model)

    def needs_data(self, model: nn.Module) -> bool:
        """True: factors are made of data."""
        return True

    def __call__(self, model: nn.Module, run: Run, folder: Path | None = None) -> None:
        """Equalize, set scales; the stage of all quantizers is FLOAT afterwards.

        Args:
            model: a Llama-like transformers model with fake quantizers inserted.
            run: runs the calibration data through `model`, with padding announced by `token_mask`.
            folder: where finished blocks are kept, so that a killed run goes on; None keeps nothing.

        Raises:
            ValueError: the model is not Llama-like, or as `then` and `stream` raise.
        """
        self.check(model)
        inside = {id(block) for block in find_blocks(model)[1]}

        def treat(module: nn.Module, run_module: Run) -> None:
            if id(module) in inside:
                self.equalize(module, run_module)
            self.then(module, run_module)

        options: dict[str, Any] = {"sequential": self.sequential, "folder": folder, "offload": self.offload}
        stream(model, run, treat, self.name, key=described(self), **options)

    @torch.no_grad()
    def equalize(self, block: nn.Module, run: Run) -> dict[str, float]:
        """Move factors in one decoder block; its float function stays.  Returns the exponent of each pair."""
        quantized = {id(layer) for layer in layers(block).values()}
        places = [p for p in find_pairs(block, self.pairs) if any(id(c) in quantized for c in p.consumers.values())]
        chosen = {}
        seen = _observed(places, run, self.tokens)
        for pair in places:
            if pair.name not in seen:
                raise ValueError(f"calibration {self.name}, after {pair.name}: no usable token reaches it")
            inputs = seen[pair.name]
            if not torch.isfinite(inputs.absmax).all():
                raise ValueError(f"calibration {self.name}, after {pair.name}: NaN or infinite values were observed")
            targets = [c for c in pair.consumers.values() if isinstance(c, FakeQuantLinear)]
            best, least = torch.ones(()), torch.inf
            for exponent in self.exponents:
                factor = _limited(self.factor(inputs, pair, exponent)) if exponent else pair.shared(inputs.mean * 0 + 1)
                error = sum(_error(layer, inputs.sample, pair.spread(factor)) for layer in targets)
                if error < least:
                    best, least, chosen[pair.name] = factor, error, exponent
            if chosen[pair.name]:
                pair.fold(best)
        log.debug("%s: exponents %s", self.name, chosen)
        return chosen


def _limited(factor: Tensor) -> Tensor:
    """`factor` around 1, finite and positive; features that were never active keep theirs."""
    live = torch.isfinite(factor) & (factor > 0)
    if not live.any():
        return torch.ones_like(factor)
    centre = (factor[live].amax() * factor[live].amin()).sqrt()
    return torch.where(live, factor / centre, 1.0).clamp(1 / _WIDEST_FACTOR, _WIDEST_FACTOR)


def _error(layer: FakeQuantLinear, sample: Tensor, factor: Tensor) -> float:
    """||fq(x / s) fq(W s)^T - x W^T||^2 over the sample, with absmax scales."""
    weight = layer.weight.float()
    quantizer, scheme = layer.weight_quantizer, layer.scheme
    assert quantizer.scale is not None
    scaled, x = weight * factor, sample / factor
    rows, groups = quantizer.scale.shape
    absmax = scaled.reshape(rows, groups, -1).abs().amax(-1)
    quantized = fake_quantize(scaled, absmax_scale(absmax, scheme.weight).expand(len(weight), -1), scheme.weight)
    if scheme.input is not None:
        static = absmax_scale(x.abs().amax().view(1), scheme.input).expand(len(x), 1)
        x = fake_quantize(x, dynamic_scale(x, scheme.input) if scheme.input.dynamic else static, scheme.input)
    return float((F.linear(x, quantized) - F.linear(sample, weight)).square().sum())


def _observed(places: list[Pair], run: Run, tokens: int) -> dict[str, Inputs]:
    """The inputs of each pair's consumers over `run`, by the producer's name.

    Runs twice: how many tokens there are says which to keep, so that no more than those are held.
    """
    watched = {pair.name: next(iter(pair.consumers.values())) for pair in places}
    counts: dict[str, list[int]] = {}  # tokens of each batch that has some
    parts: dict[str, list[Inputs]] = {}

    def count(name: str, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        if found := len(unmasked(args[0])):
            counts.setdefault(name, []).append(found)

    def note(name: str, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = unmasked(args[0].detach()).float()
        if len(x):
            size, seen = x.abs(), parts.setdefault(name, [])
            here = spread[name] - sum(counts[name][: len(seen)])
            kept = x[here[(here >= 0) & (here < len(x))].to(x.device)]
            seen.append(Inputs(size.amax(0), size.sum(0) / len(x), kept))

    with _hooked(watched, count):
        run()
    totals = {name: sum(found) for name, found in counts.items()}
    spread = {name: torch.linspace(0, total - 1, min(tokens, total)).long() for name, total in totals.items()}
    with _hooked(watched, note):
        run()
    found = {}
    for name, seen in parts.items():
        weights = torch.tensor(counts[name], dtype=torch.float32)
        mean = torch.stack([p.mean for p in seen]).mul(weights[:, None].to(seen[0].mean)).sum(0) / weights.sum()
        absmax = torch.stack([p.absmax for p in seen]).amax(0)
        found[name] = Inputs(absmax, mean, torch.cat([p.sample for p in seen]))
    return found


@contextmanager
def _hooked(watched: dict[str, nn.Linear], note: Callable[..., None]) -> Iterator[None]:
    hooks = [layer.register_forward_pre_hook(partial(note, name)) for name, layer in watched.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
