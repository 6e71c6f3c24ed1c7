"""A fake quantizer owns one tensor's scale and the stage it is in: float, observe, train, frozen."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor, nn

from qat.estimators import Estimator, FakeQuantize, FakeQuantizeShifted
from qat.functional import dynamic_scale, quantize, store_scale, zero_point
from qat.observers import MinMax
from qat.packing import pack
from qat.scheme import QuantSpec

# Which tokens of the current batch are real, (batch, tokens) bool: padding must not move a range.
_token_mask: ContextVar[Tensor | None] = ContextVar("token_mask", default=None)


@contextmanager
def token_mask(mask: Tensor | None) -> Iterator[None]:
    """Within, observers see only tokens where `mask` (batch, tokens) is true."""
    token = _token_mask.set(None if mask is None else mask.bool())
    try:
        yield
    finally:
        _token_mask.reset(token)


def real_tokens() -> Tensor | None:
    """The mask (batch, tokens) that `token_mask` set for the current batch; None where all tokens are real."""
    return _token_mask.get()


def unmasked(x: Tensor) -> Tensor:
    """The real tokens of activations x (batch, tokens, features), as (tokens, features)."""
    mask, tokens = _token_mask.get(), x.reshape(-1, x.shape[-1])
    # A layer may be given its tokens flattened, as experts and some output layers are.
    if mask is not None and x.shape[:-1] in (mask.shape, (mask.numel(),)):
        return tokens[mask.flatten()]
    return tokens


class Stage(IntEnum):
    """What a quantizer does in forward; the order in which a run passes through them."""

    FLOAT = 0
    """Nothing: the layer computes exactly as before insertion."""
    OBSERVE = 1
    """Float, while observers watch."""
    TRAIN = 2
    """Fake-quantized; the scale learns if the estimator learns scales."""
    FROZEN = 3
    """Fake-quantized with a scale that no longer moves."""


class FakeQuantizer(nn.Module):
    """The scale of one tensor, float32 whatever the model's dtype, and its stage.

    State: `scale` (out, groups) for a weight, (1,) for a static activation, absent for a dynamic one; `offset` (1,) of
    an asymmetric activation, the value of code 0 (`qat.functional.zero_point`);
    `stage`, a uint8 buffer, so that a checkpoint carries it; `packed` (out, words) int32, once codes are held.
    `spec` is in no checkpoint: that of the width at which forward quantizes now, one of those that `full` nests.

    Args:
        spec: how the tensor is quantized.
        scale_shape: of the scale; ignored where `spec.dynamic`.
        estimator: the gradient.
        device: of the scale.
    """

    scale: Tensor | None
    offset: Tensor | None
    stage: Tensor
    packed: Tensor | None

    def __init__(
        self, spec: QuantSpec, scale_shape: tuple[int, ...], estimator: Estimator, device: torch.device | None = None
    ):
        super().__init__()
        self.full = self.spec = spec
        self.estimator = estimator
        self.observer: MinMax | None = None
        self.recorder: Callable[[Tensor, Tensor, Tensor], None] | None = None
        scale = None if spec.dynamic else nn.Parameter(torch.ones(scale_shape, dtype=torch.float32, device=device))
        self.register_parameter("scale", scale)
        offset = None if spec.symmetric else nn.Parameter(torch.zeros(scale_shape, dtype=torch.float32, device=device))
        self.register_parameter("offset", offset)
        self.register_buffer("stage", torch.zeros((), dtype=torch.uint8, device=device))
        self.register_buffer("packed", None)
        self.set_stage(Stage.FLOAT)

    def set_stage(self, stage: Stage) -> None:
        """Enter `stage`."""
        if self.stage.device.type != "meta":
            self.stage.fill_(int(stage))
        self._observed: Any = None  # weakly, the last: layers that share a quantizer show it the same input
        self._current = stage  # a copy for forward, which must not wait for a device to read a buffer
        for learned in self.learned:
            learned.requires_grad_(self.estimator.learns_scale and stage != Stage.FROZEN)

    @property
    def learned(self) -> list[Tensor]:
        """The scale and the offset, as far as it has them."""
        return [part for part in (self.scale, self.offset) if part is not None]

    @property
    def current_stage(self) -> Stage:
        """The stage, without reading the buffer."""
        return self._current

    @torch.no_grad()
    def hold(self, weight: Tensor) -> None:
        """Keep the codes of `weight` (out, in), packed; they are constants from now on."""
        codes = quantize(weight, self.weight_scale(weight), self.spec)
        self.packed = pack(codes.to(torch.int8), self.spec.bits, self.spec.spacing)

    @property
    def active(self) -> bool:
        """Whether forward quantizes."""
        return self._current >= Stage.TRAIN

    @torch.no_grad()
    def set_scale(self, scale: Tensor, offset: Tensor | None = None) -> None:
        """Overwrite the scale, and the offset where there is one.

        Args:
            scale: the quantizer's scale shape, floating.
            offset: the same; None for symmetric tensors.

        Raises:
            ValueError: a scale is not finite.
        """
        if not torch.isfinite(scale).all():
            raise ValueError(f"a scale is NaN or beyond the range of {self.spec.scale_dtype}")
        assert self.scale is not None and self.scale.shape == scale.shape, (self.scale, scale.shape)
        self.scale.copy_(scale)
        assert (self.offset is None) == (offset is None), "an offset goes with asymmetric tensors, and only with them"
        if self.offset is not None and offset is not None:
            self.offset.copy_(offset)

    def static_qparams(self) -> tuple[Tensor, Tensor | None]:
        """What a forward quantizes static activations with: the scale (1,) and the zero point (1,) or None, float32."""
        assert self.scale is not None
        scale = store_scale(self.scale.detach(), self.spec)
        return scale, None if self.offset is None else zero_point(self.offset.detach(), scale, self.spec)

    def weight_scale(self, weight: Tensor, every: int = 1) -> Tensor:
        """The scale this forward quantizes `weight` (out, in) with: (out, groups), float32, as an artifact stores it.

        With `every`, the same for weight[::every]; a tensor's only scale serves any rows.
        """
        assert self.scale is not None
        stored = self.scale.detach()[::every]
        if self._current == Stage.FROZEN:
            scale = store_scale(stored, self.full)
        else:
            scale = self.estimator.scale(weight, stored, self.full)
        return scale if self.spec.step == 1 else scale * self.spec.step

    def rows(self, x: Tensor) -> Tensor:
        """Values of real tokens that share a scale, (scales, n)."""
        return unmasked(x).reshape(1, -1)

    def dynamic_scale(self, x: Tensor) -> Tensor:
        """The scale of each token, (..., 1) float32."""
        return dynamic_scale(x, self.spec)

    def forward(self, x: Tensor) -> Tensor:
        """Activations x (..., in), fake-quantized according to the stage; same shape and dtype."""
        last = None if self._observed is None else self._observed()
        if self._current == Stage.OBSERVE and self.observer is not None and x is not last:
            rows, self._observed = self.rows(x), weakref.ref(x)
            if rows.numel():
                self.observer.observe(rows)
        if not self.active:
            return x
        if self.scale is None:
            scale = self.dynamic_scale(x)
            return FakeQuantize.apply(x, scale, scale, self.spec, self.estimator)
        # One scale for the tensor, or one for each head; the last dimension is its only group.
        shape = *x.shape[:-1], 1
        stored, (scale, zero) = self.scale.expand(shape), self.static_qparams()
        if self.offset is None or zero is None:
            return FakeQuantize.apply(x, stored, scale.expand(shape), self.spec, self.estimator)
        qparams = stored, self.offset.expand(shape), scale.expand(shape), zero.expand(shape)
        return FakeQuantizeShifted.apply(x, *qparams, self.spec, self.estimator)

    def _apply(self, fn: Any, recurse: bool = True) -> "FakeQuantizer":
        """Follow the model to another device, never to another dtype: bf16 scales lose small updates."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        unborn = self.stage.device.type == "meta"
        super()._apply(move, recurse)
        if unborn:  # to_empty leaves whatever was in memory
            self.set_stage(self._current)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        if self.packed is None and prefix + "packed" in state_dict:
            self.packed = torch.empty_like(state_dict[prefix + "packed"], device=self.stage.device)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if prefix + "stage" in state_dict and self.stage.device.type != "meta":
            self.set_stage(Stage(int(self.stage)))

    def extra_repr(self) -> str:
        widths = ".".join(map(str, self.full.widths))
        return f"{self.spec.element}{widths}, {self.spec.granularity}, {self._current.name.lower()}"
