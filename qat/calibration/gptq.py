"""GPTQ: round a column of weights, then let the columns that are still free make up for its error (arXiv 2210.17323).

For one layer and inputs X (tokens, in), rounding W to Q costs tr((W - Q) H (W - Q)^T) with H = X^T X.  With column q
fixed, the best change of the free columns F is (eq. 2)

    delta_F = -(w_q - quant(w_q)) / [H_F^-1]_qq * (H_F^-1)_q,F

and all the inverses H_F^-1 that the columns need in turn are rows of one upper triangular U with H^-1 = U^T U
(section 4, "Cholesky reformulation"): the update of column j > q is err * U_qj / U_qq.  (The paper's H is twice this,
which changes nothing.)  The paper takes columns in order and sets a group's scales when it comes to it; here, as with
`--act-order --static-groups` of the authors' code, scales are set first, from the weights as they were, so that columns
may be taken in any order and exports need no permutation.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from qat.calibration.blocks import Run, stream
from qat.calibration.method import check_layers, described, write_back
from qat.calibration.ranges import RangeCalibration, set_tables
from qat.fake_quantizer import Stage, unmasked
from qat.functional import dequantize, quantize
from qat.insertion import layers, set_stage
from qat.nn import FakeQuantLayer
from qat.scheme import QuantSpec

log = logging.getLogger(__name__)

# Shares of the mean diagonal tried, in this order, where the factorization fails with less.
_DAMPINGS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


@dataclass
class GPTQ:
    """Weights on the grid with the smallest error of each layer's output, block by block.

    A calibration (see `qat.calibration`).  Afterwards every quantized weight is on its grid: fq(w) == w bit for bit.

    An embedding's inputs are one-hot, so its H is diagonal: it is rounded to nearest, which is all there is to do.

    Attributes:
        name: what tables call it.
        ranges: sets the scales, from weights not yet changed.
        act_order: take columns by falling diag(H), the hardest to make up for first.
        damping: added to diag(H), as a share of its mean; raised where the factorization fails.
        columns: updated together ("lazy batch updates"); changes speed and the rounding of sums only.
        sequential: what a layer's H is made of. `layer`: the inputs that all quantized layers before it make; `block`:
            those that the blocks before make; `none`: those of the float model.
        precision: of the factorization.
        offload: map finished blocks from their files, so that a model larger than memory passes.
    """

    name: str = "gptq"
    ranges: RangeCalibration = field(
        default_factory=lambda: RangeCalibration("weighted_mse", importance=0.5, signed=True)
    )
    act_order: bool = True
    damping: float = 0.01
    columns: int = 128
    sequential: Literal["layer", "block", "none"] = "layer"
    precision: Literal["float32", "float64"] = "float64"
    offload: bool = False
    changes_weights: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, choices in (("sequential", ("layer", "block", "none")), ("precision", ("float32", "float64"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"calibration {self.name}: {name} must be one of {', '.join(choices)}")
        if not 0 <= self.damping <= 1:
            raise ValueError(f"calibration {self.name}: damping must be in [0, 1], got {self.damping}")

    def check(self, model: nn.Module) -> None:
        """Refuse what this method cannot treat; `model` may be float still."""
        check_layers(self.name, model)

    def needs_data(self, model: nn.Module) -> bool:
        """True: H is made of data."""
        return True

    def __call__(self, model: nn.Module, run: Run, folder: Path | None = None) -> None:
        """Set the scales and weights of all quantized layers of `model`; their stage is FLOAT afterwards.

        Args:
            model: with fake quantizers inserted.
            run: runs the calibration data through `model`, with padding announced by `token_mask`.
            folder: where finished blocks are kept, so that a killed run goes on; None keeps nothing.

        Raises:
            ValueError: NaN in a weight or an activation, a layer that no usable token reaches, or a weight dtype that
                cannot hold the grid; names the layer and the remedy.
        """
        self.check(model)
        options: dict[str, Any] = {"sequential": self.sequential != "none", "folder": folder, "offload": self.offload}
        stream(model, run, self._treat, self.name, key=described(self), **options)

    def _treat(self, module: nn.Module, run: Run) -> None:
        """Quantize the layers of one module, in the order in which it calls them."""
        pending = {name: layer for name, layer in layers(module).items() if layer.multiplies}
        set_tables(module, self.ranges)
        while pending:
            for layer in pending.values():
                self.ranges.observe(layer)
            grams = Grams(pending, first_only=self.sequential == "layer")
            with grams.watch():
                run()
            ready = [name for name in pending if name in grams.leader] if grams.first_only else list(pending)
            for name in ready or list(pending):
                layer = pending.pop(name)
                try:
                    self._quantize(layer, grams.of(name), name)
                except ValueError as error:
                    raise ValueError(f"calibration {self.name}, layer {name}: {error}") from error
                for quantizer in layer.quantizers:
                    quantizer.set_stage(Stage.FROZEN if self.sequential == "layer" else Stage.FLOAT)
        self.ranges.set_caches(module, run)
        set_stage(module, Stage.FLOAT)

    def _quantize(self, layer: FakeQuantLayer, gram: Tensor, name: str) -> None:
        self.ranges.set_layer(layer, gram.diagonal() if self.ranges.importance else None)
        scale = layer.weight_quantizer.scale
        assert scale is not None
        codes = gptq_codes(
            layer.matrix.detach(),
            gram,
            scale.detach(),
            layer.scheme.weight,
            act_order=self.act_order,
            damping=self.damping,
            columns=self.columns,
            dtype=getattr(torch, self.precision),
            name=name,
        )
        write_back(layer, codes)


def gptq_codes(
    weight: Tensor,
    gram: Tensor,
    scale: Tensor,
    spec: QuantSpec,
    act_order: bool = True,
    damping: float = 0.01,
    columns: int = 128,
    dtype: torch.dtype = torch.float64,
    name: str = "the layer",
) -> Tensor:
    """Codes that minimise tr((W - Q) H (W - Q)^T) greedily, column by column.

    A column whose input was always 0 (a dead one) is rounded to nearest (the authors' code sets it to 0), and takes no
    part in the others' updates.

    Args:
        weight: (out, in), floating.
        gram: H = X^T X, (in, in), floating.
        scale: (out, groups), or (1, 1) for a tensor's only scale, float32, as stored.
        spec: of the weight.
        act_order, damping, columns, dtype: as `GPTQ` has them; dtype is its precision.
        name: for messages.

    Returns:
        (out, in), float32 holding integers in [qmin, qmax].

    Raises:
        ValueError: H is not finite, or cannot be factorized.
    """
    inputs = weight.shape[1]
    scales = scale.expand(weight.shape[0], -1)
    group_of = torch.arange(inputs, device=weight.device) // (inputs // scale.shape[1])
    diagonal = gram.diagonal()
    order = torch.argsort(diagonal, descending=True, stable=True) if act_order else torch.arange(inputs)
    order = order.to(weight.device)
    factor = inverse_factor(gram[order][:, order], damping, dtype, name).float()
    work, groups = weight.float()[:, order], group_of[order].tolist()
    codes = torch.empty_like(work)
    for start in range(0, inputs, columns):
        end = min(start + columns, inputs)
        errors = torch.empty_like(work[:, start:end])
        for j in range(start, end):
            column, step = work[:, j : j + 1], scales[:, groups[j]].unsqueeze(1)
            code = quantize(column, step, spec)
            error = (column - dequantize(code, step)) / factor[j, j]
            work[:, j + 1 : end] -= error * factor[j, j + 1 : end]
            codes[:, j : j + 1], errors[:, j - start : j - start + 1] = code, error
        work[:, end:] -= errors @ factor[start:end, end:]
    return torch.empty_like(codes).index_copy_(1, order, codes)


def inverse_factor(
    gram: Tensor, damping: float = 0.0, dtype: torch.dtype = torch.float64, name: str = "the layer"
) -> Tensor:
    """The upper triangular U with (H + damping * mean(diag H) I)^-1 = U^T U; a dead column's row of U is a unit vector.

    Besides H two matrices of its size are held: LAPACK works in place where columns are contiguous.

    Args:
        gram: H, (in, in), float32 or float64, symmetric and positive semidefinite but for rounding.
        damping: raised, and said in the log, where the factorization fails.
        dtype: of the result, and what is computed in.

    Returns:
        (in, in).

    Raises:
        ValueError: H is NaN or infinite, or no damping up to 1 makes it definite.
    """
    if not _finite(gram):
        raise ValueError("NaN or infinite values were observed in its input")
    live = gram.diagonal() > 0
    if not live.any():
        return torch.eye(len(gram), dtype=dtype, device=gram.device)
    mean = gram.diagonal()[live].mean()
    lower, inverse = (torch.empty_like(gram, dtype=dtype).mT for _ in range(2))
    failed = torch.empty((), dtype=torch.int32, device=gram.device)
    for share in (damping, *(d for d in _DAMPINGS if d > damping)):
        # Reversing rows and columns turns a lower factor into an upper one: H = R R^T, so U = R^-1.
        lower.copy_(gram.flip(0, 1)).div_(mean)
        lower.diagonal()[~live.flip(0)] = 1.0
        lower.diagonal().add_(share)
        torch.linalg.cholesky_ex(lower, out=(lower, failed))
        if int(failed) == 0:
            inverse.zero_().diagonal().fill_(1.0)
            torch.linalg.solve_triangular(lower, inverse, upper=False, out=inverse)
            if _finite(inverse.mT):
                if share > damping:
                    log.warning("%s: its Hessian is singular; damping raised from %g to %g", name, damping, share)
                del lower
                return inverse.flip(0, 1).mul_(mean.to(dtype).rsqrt())
    raise ValueError(
        "its Hessian cannot be factorized even with damping 1: its inputs are not finite or differ too much in size; "
        "calibrate on more data, or by ranges (calibration=mse)"
    )


def _finite(x: Tensor) -> bool:
    """Whether all of x is finite; unlike `isfinite` it makes no other tensor of x's size."""
    return all(bool(torch.isfinite(extreme)) for extreme in x.aminmax())


class Grams:
    """Sums X^T X of the real tokens of each layer's inputs; layers called with the same tensor share one sum.

    Args:
        watched: layers by name.
        first_only: only of the first layer called, and of those that share its input.
    """

    def __init__(self, watched: dict[str, FakeQuantLayer], first_only: bool = False):
        self.watched, self.first_only = watched, first_only
        self.leader: dict[str, str] = {}
        self._sums: dict[str, Tensor] = {}
        self._current: tuple[str, Any] = ("", None)  # who was last called with a new tensor, and the tensor

    def of(self, name: str) -> Tensor:
        """H (in, in), float32, of the layer called `name`.

        Raises:
            ValueError: no usable token reached it.
        """
        if name not in self.leader or self.leader[name] not in self._sums:
            raise ValueError("no value was observed: the calibration data has no usable token, or never reaches it")
        return self._sums[self.leader[name]]

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Within, forwards of the watched layers are summed."""
        hooks = [
            layer.register_forward_pre_hook(self._hook(name), with_kwargs=True) for name, layer in self.watched.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._current = ("", None)

    def _hook(self, name: str) -> Callable[..., None]:
        def note(layer: FakeQuantLayer, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            x = args[0] if args else kwargs["input"]
            if x is not self._current[1]:
                self._current = (name, x)
            if name not in self.leader:
                if self.first_only and self.leader and self._current[0] not in self.leader:
                    return
                self.leader[name] = self._current[0]
            if self.leader[name] == name:
                tokens = unmasked(layer.rows(x.detach())).float()
                if len(tokens):
                    with torch.autocast(tokens.device.type, enabled=False):  # it would multiply, and sum, in 16 bits
                        product = tokens.T @ tokens
                    self._sums[name] = self._sums[name].add_(product) if name in self._sums else product

        return note
