"""Scales before training: plain rounding, squared error, and squared error weighted by the layer's inputs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from qat.attention import key_values
from qat.fake_quantizer import FakeQuantizer, Stage, unmasked
from qat.insertion import layers
from qat.nn import FakeQuantLayer
from qat.observers import EMA, MSE, Entropy, MinMax, Percentile, mse_scale
from qat.scheme import QuantSpec

OBSERVERS: dict[str, type[MinMax]] = {
    "absmax": MinMax, "ema": EMA, "mse": MSE, "percentile": Percentile, "entropy": Entropy
}  # fmt: skip


class RangeCalibration:
    """Sets every scale of a model from its weights and, where needed, from calibration data.

    Args:
        name: what tables call it.
        weight: `absmax` (round to nearest over the full range) or `mse` (the ratio of that range with the
            smallest squared error).
        importance: exponent a of the weights E[x_j^2]^a that the squared error of each input column gets, x being
            the layer's inputs over the calibration data.  1 is the diagonal of the layer's output error, 0 the
            plain squared error, which needs no data.
        signed: let each scale of a weight take the sign with the smaller error.  The codes of b bits reach one step
            further below zero than above, which a negative scale turns around; readers that multiply by the
            scale need know nothing of it.
        input: observer of static activations, keys and values among them: `absmax`, `ema`, `mse`, `percentile` or
            `entropy` (see `qat.observers`).
        percentile: of the values that are covered, for input=percentile.

    Raises:
        ValueError: the fields contradict each other.
    """

    def __init__(
        self,
        name: str,
        weight: Literal["absmax", "mse"] = "mse",
        importance: float = 0.0,
        signed: bool = False,
        input: Literal["absmax", "ema", "mse", "percentile", "entropy"] = "mse",
        percentile: float = 99.99,
    ):
        if weight not in ("absmax", "mse"):
            raise ValueError(f"calibration {name}: weight must be absmax or mse, got {weight!r}")
        if input not in OBSERVERS:
            raise ValueError(f"calibration {name}: input must be one of {', '.join(OBSERVERS)}, got {input!r}")
        if not 50 < percentile <= 100:
            raise ValueError(f"calibration {name}: percentile must be above 50 and at most 100, got {percentile}")
        if not 0 <= importance <= 1:
            raise ValueError(f"calibration {name}: importance must be in [0, 1], got {importance}")
        if importance and weight != "mse":
            raise ValueError(f"calibration {name}: importance weights a squared error; use weight=mse with it")
        if signed and weight != "mse":
            raise ValueError(f"calibration {name}: signed chooses by squared error; use weight=mse with it")
        self.name, self.weight, self.importance = name, weight, importance
        self.signed, self.input, self.percentile = signed, input, percentile

    changes_weights: ClassVar[bool] = False

    def check(self, model: nn.Module) -> None:
        """Ranges suit every model."""

    def needs_data(self, model: nn.Module) -> bool:
        """Whether calibrating `model` runs it on data."""
        static = any(q.scale is not None for q in [*_input_quantizers(model), *_cache_quantizers(model).values()])
        return self.importance > 0 or static

    @torch.no_grad()
    def __call__(self, model: nn.Module, run: Callable[[], None], folder: Path | None = None) -> None:
        """Set the scales of all quantizers of `model`; their stage is FLOAT afterwards.

        Args:
            model: with fake quantizers inserted.
            run: runs the calibration data through `model`, with padding announced by `token_mask`.
            folder: not used; ranges are quick.

        Raises:
            ValueError: NaN in a weight or activation, or no usable token, naming the layer.
        """
        for layer in layers(model).values():
            self.observe(layer)
        moments: dict[str, Tensor] = {}
        if self.importance or any(q.scale is not None for q in _input_quantizers(model)):
            with _input_moments(model, moments) if self.importance else _nothing():
                run()
        for name, layer in layers(model).items():
            try:
                self.set_layer(layer, moments.get(name))
            except ValueError as error:
                raise ValueError(f"calibration {self.name}, layer {name}: {error}") from error
        self.set_caches(model, run)

    @torch.no_grad()
    def set_caches(self, model: nn.Module, run: Callable[[], None]) -> None:
        """Set the static scales of keys and values by one run in which nothing but what is FROZEN is quantized.

        Raises:
            ValueError: NaN, or no usable token, naming the quantizer.
        """
        caches = _cache_quantizers(model)
        static = [quantizer for quantizer in caches.values() if quantizer.scale is not None]
        for quantizer in static:
            quantizer.set_stage(Stage.OBSERVE)
            quantizer.observer = self._observer(quantizer.spec)
        if static:
            run()
        for name, quantizer in caches.items():
            try:
                _settle(quantizer)
            except ValueError as error:
                raise ValueError(f"calibration {self.name}, {name}: {error}") from error

    def _observer(self, spec: QuantSpec) -> MinMax:
        return Percentile(spec, self.percentile) if self.input == "percentile" else OBSERVERS[self.input](spec)

    def observe(self, layer: FakeQuantLayer) -> None:
        """Let `layer` compute in float while its static input, if it has one, is watched from now on."""
        for quantizer in layer.quantizers:
            quantizer.set_stage(Stage.OBSERVE)
        if layer.input_quantizer is not None and layer.input_quantizer.scale is not None:
            layer.input_quantizer.observer = self._observer(layer.input_quantizer.spec)

    def set_layer(self, layer: FakeQuantLayer, moment: Tensor | None) -> None:
        """Set the scales of one layer after its inputs were observed; its stage is FLOAT afterwards.

        Args:
            moment: (in,), sums of squares of its inputs, float32; needed where `importance` is above 0 and inputs
                multiply the weight (rows of an embedding are searched by their plain squared error).

        Raises:
            ValueError: NaN, or no usable token.
        """
        if self.importance and moment is None and layer.multiplies:
            raise ValueError("no value was observed: the calibration data has no usable token, or never reaches it")
        if moment is not None and not torch.isfinite(moment).all():
            raise ValueError("NaN or infinite values were observed in its input")
        layer.weight_quantizer.set_scale(self._weight_scale(layer, moment))
        for quantizer in layer.quantizers:
            _settle(quantizer)

    def _weight_scale(self, layer: FakeQuantLayer, moment: Tensor | None) -> Tensor:
        stored, spec, weight = layer.weight_quantizer.scale, layer.weight_quantizer.spec, layer.matrix
        assert stored is not None
        shape = (stored.shape[0], stored.shape[1])
        if self.weight == "mse":
            importance = None if moment is None else moment.pow(self.importance)
            return mse_scale(weight, shape, spec, self.signed, importance)
        observer = MinMax(spec)
        observer.observe(weight.reshape(stored.numel(), -1))
        return observer.scale().view(shape)


def set_tables(model: nn.Module, ranges: RangeCalibration) -> None:
    """Set the scales of the layers whose inputs do not multiply their weights: embeddings."""
    for name, layer in layers(model).items():
        if not layer.multiplies:
            try:
                ranges.set_layer(layer, None)
            except ValueError as error:
                raise ValueError(f"calibration {ranges.name}, layer {name}: {error}") from error


def _input_quantizers(model: nn.Module) -> list[FakeQuantizer]:
    return [layer.input_quantizer for layer in layers(model).values() if layer.input_quantizer is not None]


def _cache_quantizers(model: nn.Module) -> dict[str, FakeQuantizer]:
    found = key_values(model).items()
    return {f"{name}, {kind}s": getattr(kv, f"{kind}_quantizer") for name, kv in found for kind in ("key", "value")}


def _settle(quantizer: FakeQuantizer) -> None:
    """Take the scale that was observed, if one was."""
    if quantizer.observer is not None:
        assert quantizer.scale is not None
        scale = quantizer.observer.scale()
        offset = quantizer.observer.offset(scale)  # of the inputs of layers only, which have one row
        quantizer.set_scale(scale.view_as(quantizer.scale), offset)
        quantizer.observer = None
    quantizer.set_stage(Stage.FLOAT)


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@contextmanager
def _input_moments(model: nn.Module, moments: dict[str, Tensor]) -> Iterator[None]:
    """Within, sum the squares of each layer's real input tokens into `moments[name]` (in,), float32."""

    def watch(name: str, layer: FakeQuantLayer, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        tokens = unmasked(layer.rows((args[0] if args else kwargs["input"]).detach())).float()
        if len(tokens):
            square = tokens.square().sum(0)
            moments[name] = moments[name] + square if name in moments else square

    hooks = [
        layer.register_forward_pre_hook(partial(watch, name), with_kwargs=True)
        for name, layer in layers(model).items()
        if layer.multiplies
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
