"""Block reconstruction: a quantized block learns to answer what the float model has in its place.

For each block, with the inputs x' that the quantized blocks before it make of what the float ones make into x, minimise

    || block_q(x') - block_float(x) ||^2          over real tokens (BRECQ, arXiv 2102.05426, without Fisher weights)

so that a block also makes up for the error of those before it.  What learns is the `rounding`: whether each weight goes
to the code below or above it (AdaRound, arXiv 2004.10568, section 3.3, which treats a layer at a time); or the
`weights`: all parameters of the block and its scales (Block-AP of EfficientQAT, arXiv 2407.11062, section 3.2; zero
points are 0 here, and rates fall in a straight line where the authors' code has a cosine).
"""

import logging
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from qat.calibration.awq import ClipSearch
from qat.calibration.blocks import Run, find_blocks, steps, stream
from qat.calibration.gptq import GPTQ
from qat.calibration.method import Calibration, check_layers, described, write_back
from qat.calibration.ranges import RangeCalibration
from qat.fake_quantizer import Stage, real_tokens, token_mask
from qat.functional import (
    SCALE_FLOOR,
    away_from_zero,
    dequantize,
    floor_codes,
    quantize,
    rectified_sigmoid,
    store_scale,
)
from qat.insertion import layers, quantizers, set_stage
from qat.nn import FakeQuantLayer
from qat.structure import keep_modes

log = logging.getLogger(__name__)

WARM_UP = 0.2  # share of the steps before rounding is made to harden
TINY = 1e-30  # the least error that losses are divided by


class _Example(NamedTuple):
    """One batch: how the block is called, what it should answer (on the CPU), and which tokens are real."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: Tensor
    mask: Tensor | None
    autocast: torch.dtype | None


def rounding_regularizer(v: Tensor, beta: float) -> Tensor:
    """Mean of 1 - |2 h(v) - 1|^beta, h the `rectified_sigmoid`: 0 where all bits are hard, 1 where all are 1/2.

    arXiv 2004.10568, eq. 24, where it is a sum.
    """
    return (1 - (2 * rectified_sigmoid(v) - 1).abs().pow(beta)).mean()


@dataclass
class Reconstruction:
    """Learns the rounding, or the weights and scales, of one block at a time.

    A calibration (see `qat.calibration`).  Afterwards every quantized weight is on its grid: fq(w) == w bit for bit.  A
    block whose error did not fall keeps what `first` gave it, which the log says.  While a block learns, about eight
    times its weights are held.

    Attributes:
        name: what tables call it.
        learn: `rounding` (at the scales of `first`: down or up from the float weight, or, where `first` chose codes,
            between them and the next ones towards the float weight) or `weights` (with scales, norms and biases, from
            the weights that `first` left; float32 only).
        first: sets the scales, and weights, that learning starts from; what lies outside the blocks it treats alone.
        steps: of Adam in each block; each sees one calibration batch.
        lr: of the rounding variables, constant; or of weights, falling linearly to 0.
        scale_lr: of scales, falling likewise, where weights learn and the estimator learns scales.
        regularization: weight of the rounding regularizer, beside an error that is 1 at the start.
        seed: of the order of batches; the same in every block.
        offload: map finished blocks from their files.
    """

    name: str = "adaround"
    learn: Literal["rounding", "weights"] = "rounding"
    first: Calibration = field(default_factory=GPTQ)
    steps: int = 40
    lr: float = 0.1
    scale_lr: float = 1e-4
    regularization: float = 10.0
    seed: int = 0
    offload: bool = False
    changes_weights: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.learn not in ("rounding", "weights"):
            raise ValueError(f"calibration {self.name}: learn must be rounding or weights, got {self.learn!r}")
        if self.steps < 1 or self.lr <= 0 or self.scale_lr < 0 or self.regularization < 0:
            raise ValueError(
                f"calibration {self.name}: steps must be at least 1, lr above 0, scale_lr and regularization 0 or above"
            )
        if not isinstance(self.first, RangeCalibration | ClipSearch | GPTQ):
            raise ValueError(
                f"calibration {self.name}: first sets scales block by block, which {type(self.first).__name__} does "
                "not; nest the other way round, as its `then`"
            )

    def check(self, model: nn.Module) -> None:
        """Refuse what this method cannot treat; `model` may be float still."""
        check_layers(self.name, model)
        self.first.check(model)
        if self.learn == "rounding":
            return
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point() and parameter.dtype != torch.float32:
                raise ValueError(
                    f"calibration {self.name}: {name} is {str(parameter.dtype).removeprefix('torch.')}, which loses "
                    "the small steps of learned weights; load the model in float32, or learn the rounding "
                    "(calibration=adaround)"
                )
        for name, layer in layers(model).items():
            if layer.weight_quantizer.estimator.relative:
                raise ValueError(
                    f"calibration {self.name}: {name} has {layer.weight_quantizer.estimator}, whose scales learn by "
                    "their logarithms, which blocks cannot; use estimator=lsq, or calibration=adaround"
                )

    def needs_data(self, model: nn.Module) -> bool:
        """True: blocks learn from data."""
        return True

    def __call__(self, model: nn.Module, run: Run, folder: Path | None = None) -> None:
        """Calibrate by `first`, then learn, block by block; the stage of all quantizers is FLOAT afterwards.

        A model without blocks is one block.

        Args:
            model: with fake quantizers inserted.
            run: runs the calibration data through `model`, with padding announced by `token_mask`.
            folder: where finished blocks are kept, so that a killed run goes on; None keeps nothing.

        Raises:
            ValueError: an error that is not finite (the block is left as `first` left it), a block that answers with no
                tensor, weights that are not float32 where they learn, or as `first` raises; names the block and layer.
        """
        self.check(model)
        blocks = {id(block) for block in find_blocks(model)[1]} or {id(model)}
        targets: list[Tensor] = []

        def treat(module: nn.Module, run_module: Run) -> None:
            if id(module) in blocks and type(module) is not nn.Module:  # not layers outside all blocks, in a bare one
                self.reconstruct(module, run_module, targets)
            else:
                self.first(module, run_module)

        estimators = {str(layer.weight_quantizer.estimator) for layer in layers(model).values()}
        key = f"{described(self)}, {sorted(estimators)}"
        stream(model, run, treat, self.name, key=key, folder=folder, offload=self.offload, targets=targets)

    def reconstruct(self, block: nn.Module, run: Run, targets: list[Tensor] | None = None) -> tuple[float, float]:
        """Treat one block.

        Args:
            block: its quantizers in any stage; in FLOAT afterwards.
            run: runs the calibration data through it.
            targets: what it should answer to each batch; empty or None for what it answers in float.

        Returns:
            Its mean squared error after `first` and after learning.
        """
        set_stage(block, Stage.FLOAT)
        examples = _examples(block, run, targets or [])
        weights = {name: layer.matrix.detach().clone() for name, layer in layers(block).items() if layer.multiplies}
        self.first(block, run)
        if self.learn == "rounding":
            _harden(block)  # at once, where a dtype cannot hold the grid
        start = {name: tensor.clone() for name, tensor in block.state_dict().items()}
        try:
            with keep_modes(block):
                block.eval()
                before = _error(block, examples)
                with torch.enable_grad():
                    if self.learn == "rounding":
                        self._learn_rounding(block, examples, weights, before)
                    else:
                        self._learn_weights(block, examples, before)
                after = _error(block, examples)
            if not after <= before:
                block.load_state_dict(start)
            _harden(block)
            log.info("%s: error %.4g, %s %.4g", self.name, before, "kept, not" if after > before else "then", after)
        except ValueError:
            block.load_state_dict(start)
            raise
        finally:
            set_stage(block, Stage.FLOAT)
        return before, min(before, after)

    def _order(self, examples: list[_Example]) -> list[_Example]:
        generator = torch.Generator().manual_seed(self.seed)
        return [examples[i] for i in torch.randint(len(examples), (self.steps,), generator=generator).tolist()]

    def _learn_rounding(
        self, block: nn.Module, examples: list[_Example], weights: dict[str, Tensor], before: float
    ) -> None:
        treated = {name: layer for name, layer in layers(block).items() if name in weights}
        lower, soft = {}, {}
        for name, layer in treated.items():
            scale, spec = _scale(layer), layer.scheme.weight
            codes = quantize(layer.matrix.detach(), scale, spec) if self.first.changes_weights else None
            lower[name], rest = floor_codes(weights[name], scale, spec, codes)
            soft[name] = torch.logit((rest + 0.1) / 1.2).requires_grad_()  # h(v) == rest
            layer.weight_quantizer.set_stage(Stage.FLOAT)  # the weight comes quantized, the input does not
        variables = list(soft.values())
        optimizer = torch.optim.Adam(variables, lr=self.lr)
        order = self._order(examples)
        for step in steps(self.steps, "rounding"):
            quantized = {}
            for name, layer in treated.items():
                codes = lower[name] + layer.scheme.weight.spacing * rectified_sigmoid(soft[name])
                matrix = dequantize(codes, _scale(layer))
                weight = torch.empty_like(layer.weight, requires_grad=False)
                layer.as_matrix(weight).copy_(matrix)
                quantized[f"{name}.weight" if name else "weight"] = weight
            loss = _loss(block, order[step], step, quantized) / max(before, TINY)
            done = step / self.steps
            if done >= WARM_UP:
                beta = 20 - 18 * (done - WARM_UP) / (1 - WARM_UP)
                loss = (
                    loss + self.regularization * torch.stack([rounding_regularizer(v, beta) for v in variables]).mean()
                )
            # Not backward(), which would leave gradients in the block's parameters; an expert may have got no token.
            for v, gradient in zip(variables, torch.autograd.grad(loss, variables, allow_unused=True), strict=True):
                v.grad = gradient
            optimizer.step()
        for name, layer in treated.items():
            write_back(layer, lower[name] + layer.scheme.weight.spacing * (soft[name].detach() > 0))  # h(v) > 1/2

    def _learn_weights(self, block: nn.Module, examples: list[_Example], before: float) -> None:
        treated = list(layers(block).values())
        for layer in treated:
            layer.weight_quantizer.set_stage(Stage.TRAIN)
        added = {id(tensor) for layer in treated for tensor in layer.added()}  # an adapter is merged, and stays so
        added |= {id(scale) for quantizer in quantizers(block) for scale in quantizer.parameters()}
        parameters = [p for p in block.parameters() if id(p) not in added]
        learned = [layer.weight_quantizer for layer in treated if layer.weight_quantizer.estimator.learns_scale]
        scales = [quantizer.scale for quantizer in learned if quantizer.scale is not None]
        flags = [p.requires_grad for p in parameters]
        for parameter in parameters:
            parameter.requires_grad_()
        optimizer = torch.optim.Adam([{"params": parameters, "lr": self.lr}, {"params": scales, "lr": self.scale_lr}])
        falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / self.steps)
        order = self._order(examples)
        try:
            for step in steps(self.steps, "weights"):
                (_loss(block, order[step], step) / max(before, TINY)).backward()
                optimizer.step()
                falling.step()
                optimizer.zero_grad()
                with torch.no_grad():
                    for scale in scales:
                        scale.copy_(away_from_zero(scale, SCALE_FLOOR[torch.float32]))
        finally:
            optimizer.zero_grad()
            for parameter, flag in zip(parameters, flags, strict=True):
                parameter.requires_grad_(flag)
        for layer in treated:  # what forward would quantize with: an estimator may follow the weights
            layer.weight_quantizer.set_scale(layer.weight_quantizer.weight_scale(layer.matrix.detach()))


def _scale(layer: FakeQuantLayer) -> Tensor:
    """The scales of a weight as the artifact stores them, one row for each of the matrix's."""
    quantizer = layer.weight_quantizer
    assert quantizer.scale is not None
    return store_scale(quantizer.scale.detach(), quantizer.spec).expand(layer.matrix.shape[0], -1)


def _harden(block: nn.Module) -> None:
    """Round all quantized weights to their grids, in place."""
    for name, layer in layers(block).items():
        try:
            write_back(layer, quantize(layer.matrix.detach(), _scale(layer), layer.scheme.weight))
        except ValueError as error:
            raise ValueError(f"layer {name}: {error}") from error


def _examples(block: nn.Module, run: Run, targets: list[Tensor]) -> list[_Example]:
    found: list[_Example] = []
    waiting = iter(targets)

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        answer, mask = _tensor(output), real_tokens()
        target = next(waiting) if targets else answer.detach().cpu()
        kind = answer.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        if mask is None or mask.any():
            on_cpu = tuple(a.cpu() if isinstance(a, Tensor) else a for a in args)
            found.append(_Example(on_cpu, kwargs, target, mask, autocast))

    with block.register_forward_hook(note, with_kwargs=True), torch.no_grad():
        run()
    if not found:
        raise ValueError("the calibration data has no usable token, or never reaches this block")
    for example in found:
        if not torch.isfinite(_real(example.target, example.mask)).all():
            raise ValueError(
                f"{_culprit(block, example)} NaN or infinite values in float; look for them in the model's weights and "
                "in the calibration data"
            )
    return found


def _tensor(output: Any) -> Tensor:
    answer = output[0] if isinstance(output, tuple) else output
    if not isinstance(answer, Tensor):
        raise ValueError(
            f"reconstruction needs a block that answers with a tensor, not {type(answer).__name__}; calibration=gptq "
            "treats any model"
        )
    return answer


def _real(answer: Tensor, mask: Tensor | None) -> Tensor:
    """What an answer (batch, tokens, ...) has for real tokens; all of it where it has no tokens."""
    known = mask is not None and mask.shape == answer.shape[:-1]
    return answer[mask.to(answer.device)] if mask is not None and known else answer


def _call(block: nn.Module, example: _Example, replaced: dict[str, Tensor] | None = None) -> Tensor:
    device = next(block.parameters()).device
    args = tuple(a.to(device) if isinstance(a, Tensor) else a for a in example.args)
    enabled = example.autocast is not None
    with torch.autocast(device.type, dtype=example.autocast, enabled=enabled), token_mask(example.mask):
        return _tensor(functional_call(block, replaced or {}, args, example.kwargs))


def _squared_error(block: nn.Module, example: _Example, replaced: dict[str, Tensor] | None = None) -> Tensor:
    """Mean over real tokens and features of (block(x) - target)^2, float32."""
    answer = _call(block, example, replaced).float()
    target = example.target.to(answer.device).float()
    return _real((answer - target).square(), example.mask).mean()


def _loss(block: nn.Module, example: _Example, step: int, replaced: dict[str, Tensor] | None = None) -> Tensor:
    """`_squared_error`, which must be finite."""
    error = _squared_error(block, example, replaced)
    if not torch.isfinite(error):
        raise ValueError(
            f"{_culprit(block, example, replaced)} NaN or infinite values at step {step}; "
            + ("lower lr and scale_lr" if step else "look for them in the model's weights")
        )
    return error


@torch.no_grad()
def _error(block: nn.Module, examples: list[_Example]) -> float:
    """Mean of the squared errors, everything quantized."""
    set_stage(block, Stage.FROZEN)
    return sum(_squared_error(block, example).item() for example in examples) / len(examples)


@torch.no_grad()
def _culprit(block: nn.Module, example: _Example, replaced: dict[str, Tensor] | None = None) -> str:
    """The first layer that takes or gives a value that is not finite, and which of both: "layer x gives"."""
    found: list[str] = []

    def note(name: str, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if not found and not all(torch.isfinite(x).all() for x in args):
            found.append(f"layer {name} takes")
        if not found and not torch.isfinite(output).all():
            found.append(f"layer {name} gives")

    hooks = [layer.register_forward_hook(partial(note, name)) for name, layer in layers(block).items()]
    try:
        _call(block, example, replaced)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else "behind its last quantized layer it has"
