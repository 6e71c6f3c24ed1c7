"""Block reconstruction: a quantized block learns to answer what the float block answers.

For each block, with the inputs x that the quantized blocks before it give, minimise over real tokens

    || block_q(x) - block_float(x) ||^2        (BRECQ, arXiv 2102.05426, without its Fisher weights)

by what is learned: `rounding`, whether each weight goes to the code below or above it (AdaRound, arXiv 2004.10568), or
`weights`, all parameters of the block and its scales (Block-AP of EfficientQAT, arXiv 2407.11062, section 3.2).
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from qat.calibration.blocks import Run, find_blocks, stream
from qat.calibration.gptq import GPTQ
from qat.calibration.method import Calibration, check_layers, described, write_back
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
from qat.insertion import layers, set_stage
from qat.nn import FakeQuantLayer

log = logging.getLogger(__name__)


class _Example(NamedTuple):
    """One batch: how the block was called, what the float block answered (CPU), and which tokens are real."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: Tensor
    mask: Tensor | None
    autocast: torch.dtype | None


def rounding_regularizer(v: Tensor, beta: float) -> Tensor:
    """Mean of 1 - |2 h(v) - 1|^beta (arXiv 2004.10568, eq. 24, divided by the number of weights): 0 for hard bits."""
    return (1 - (2 * rectified_sigmoid(v) - 1).abs().pow(beta)).mean()


@dataclass
class Reconstruction:
    """Learns the rounding, or the weights and scales, of one block at a time.

    A block whose error did not fall keeps what `first` gave it, which the log says.

    Attributes:
        name: what tables call it.
        learn: `rounding` (the float weights' floor or ceiling, at the scales of `first`) or `weights` (with scales and
            norms, from the weights that `first` left; float32 only).
        first: sets the scales, and weights, that learning starts from.
        steps: of Adam in each block; each sees one calibration batch.
        lr: of the rounding variables, or of weights.
        scale_lr: of scales, where weights learn and the estimator learns scales.
        regularization: weight of the rounding regularizer, beside an error that is 1 at the start.
        seed: of the order of batches; the same in every block.
        offload: map finished blocks from their files.
    """

    name: str = "adaround"
    learn: Literal["rounding", "weights"] = "rounding"
    first: Calibration = field(default_factory=GPTQ)
    steps: int = 40
    lr: float = 0.03
    scale_lr: float = 1e-4
    regularization: float = 1.0
    seed: int = 0
    offload: bool = False
    changes_weights: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.learn not in ("rounding", "weights"):
            raise ValueError(f"calibration {self.name}: learn must be rounding or weights, got {self.learn!r}")
        if self.steps < 1 or self.lr <= 0:
            raise ValueError(f"calibration {self.name}: steps must be at least 1 and lr above 0")

    def check(self, model: nn.Module) -> None:
        """Refuse what this method cannot treat; `model` may be float still."""
        check_layers(self.name, model)
        self.first.check(model)

    def needs_data(self, model: nn.Module) -> bool:
        """True: blocks learn from data."""
        return True

    def __call__(self, model: nn.Module, run: Run, folder: Path | None = None) -> None:
        """Calibrate by `first`, then learn, block by block; the stage of all quantizers is FLOAT afterwards.

        What lies outside the blocks is calibrated by `first` alone; a model without blocks is one block.

        Args:
            model: with fake quantizers inserted.
            run: runs the calibration data through `model`, with padding announced by `token_mask`.
            folder: where finished blocks are kept, so that a killed run goes on; None keeps nothing.

        Raises:
            ValueError: an error that is not finite, weights that are not float32 where they learn, or as `first`
                raises; names the block.
        """
        self.check(model)
        blocks = {id(block) for block in find_blocks(model)[1]} or {id(model)}

        def treat(module: nn.Module, run_module: Run) -> None:
            (self.reconstruct if id(module) in blocks else self.first)(module, run_module)

        stream(model, run, treat, self.name, key=described(self), folder=folder, offload=self.offload)

    def reconstruct(self, block: nn.Module, run: Run) -> tuple[float, float]:
        """Treat one block; its mean squared error after `first` and after learning."""
        set_stage(block, Stage.FLOAT)
        examples = _examples(block, run)
        float_weights = {name: layer.weight.detach().clone() for name, layer in layers(block).items()}
        self.first(block, run)
        training = block.training
        block.eval()
        try:
            start = {name: tensor.clone() for name, tensor in block.state_dict().items()}
            before = self._error(block, examples)
            learn = self._learn_rounding if self.learn == "rounding" else self._learn_weights
            with torch.enable_grad():
                learn(block, examples, float_weights, before)
            after = self._error(block, examples)
            if after > before:
                block.load_state_dict(start)
                log.info(
                    "calibration %s: a block kept its start, whose error is %.4g, not %.4g", self.name, before, after
                )
        finally:
            block.train(training)
            set_stage(block, Stage.FLOAT)
        return before, after

    def _order(self, examples: list[_Example]) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randint(len(examples), (self.steps,), generator=generator).tolist()

    def _learn_rounding(
        self, block: nn.Module, examples: list[_Example], weights: dict[str, Tensor], before: float
    ) -> None:
        treated = {name: layer for name, layer in layers(block).items() if layer.multiplies}
        lower, soft, scales = {}, {}, {}
        for name, layer in treated.items():
            scales[name] = _stored(layer)
            lower[name], rest = floor_codes(layer.as_matrix(weights[name]), scales[name], layer.scheme.weight)
            soft[name] = torch.logit((rest + 0.1) / 1.2).requires_grad_()  # h(v) is where the weight lies
            layer.weight_quantizer.set_stage(Stage.FLOAT)  # quantized here; inputs are by the layer
        optimizer = torch.optim.Adam(soft.values(), lr=self.lr)
        for step, index in enumerate(self._order(examples)):
            quantized = {}
            for name, layer in treated.items():
                matrix = dequantize(lower[name] + rectified_sigmoid(soft[name]), scales[name]).to(layer.weight.dtype)
                matrix = matrix.T if layer.as_matrix(layer.weight).shape != layer.weight.shape[:2] else matrix
                quantized[f"{name}.weight" if name else "weight"] = matrix.reshape(layer.weight.shape)
            loss = _squared_error(block, examples[index], quantized) / max(before, 1e-30)
            done = step / self.steps
            if done >= 0.2:  # first let the error choose, then harden with beta from 20 to 2
                beta = 20 - 18 * (done - 0.2) / 0.8
                loss = loss + self.regularization * sum(rounding_regularizer(v, beta) for v in soft.values()) / len(
                    soft
                )
            _check(loss, step)
            for v, gradient in zip(soft.values(), torch.autograd.grad(loss, list(soft.values())), strict=True):
                v.grad = gradient
            optimizer.step()
        for name, layer in treated.items():
            write_back(layer, lower[name] + (soft[name].detach() > 0))  # h(v) > 1/2

    def _learn_weights(
        self, block: nn.Module, examples: list[_Example], weights: dict[str, Tensor], before: float
    ) -> None:
        treated = list(layers(block).values())
        scales = [q.scale for layer in treated if (q := layer.weight_quantizer).estimator.learns_scale]
        if any(layer.weight.dtype != torch.float32 for layer in treated):
            raise ValueError("half precision loses the steps of learned weights; load the model in float32")
        if any(getattr(layer.weight_quantizer.estimator, "relative", False) for layer in treated):
            raise ValueError("an estimator of relative scale steps cannot learn here; use estimator=lsq")
        for layer in treated:
            layer.weight_quantizer.set_stage(Stage.TRAIN)
        known = {id(t) for layer in treated for q in layer.quantizers for t in q.parameters()}
        parameters = [p for p in block.parameters() if id(p) not in known]
        flags = [p.requires_grad for p in parameters]
        for parameter in parameters:
            parameter.requires_grad_()
        optimizer = torch.optim.Adam([{"params": parameters, "lr": self.lr}, {"params": scales, "lr": self.scale_lr}])
        try:
            for step, index in enumerate(self._order(examples)):
                loss = _squared_error(block, examples[index]) / max(before, 1e-30)
                _check(loss, step)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                with torch.no_grad():
                    for scale in scales:
                        scale.copy_(away_from_zero(scale, SCALE_FLOOR[torch.float32]))
        finally:
            optimizer.zero_grad()
            for parameter, flag in zip(parameters, flags, strict=True):
                parameter.requires_grad_(flag)
        for layer in treated:
            scale = _stored(layer)
            layer.weight_quantizer.set_scale(scale if layer.weight_quantizer.scale.shape == scale.shape else scale[:1])
            write_back(layer, quantize(layer.matrix.detach(), scale, layer.scheme.weight))

    @torch.no_grad()
    def _error(self, block: nn.Module, examples: list[_Example]) -> float:
        set_stage(block, Stage.FROZEN)
        errors = [_squared_error(block, example).item() for example in examples]
        return sum(errors) / len(errors)


def _stored(layer: FakeQuantLayer) -> Tensor:
    """The scales of a weight as the artifact stores them, one row for each of the matrix's."""
    quantizer = layer.weight_quantizer
    assert quantizer.scale is not None
    return store_scale(quantizer.scale.detach(), quantizer.spec).expand(layer.matrix.shape[0], -1)


def _examples(block: nn.Module, run: Run) -> list[_Example]:
    found: list[_Example] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        answer, mask = _tensor(output), real_tokens()
        kind = answer.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        if mask is None or mask.any():
            on_cpu = tuple(a.cpu() if isinstance(a, Tensor) else a for a in args)
            found.append(_Example(on_cpu, kwargs, answer.detach().cpu(), mask, autocast))

    with block.register_forward_hook(note, with_kwargs=True), torch.no_grad():
        run()
    if not found:
        raise ValueError("the calibration data has no usable token, or never reaches this block")
    return found


def _tensor(output: Any) -> Tensor:
    answer = output[0] if isinstance(output, tuple) else output
    if not isinstance(answer, Tensor):
        raise ValueError(f"reconstruction needs a block that answers with a tensor, not {type(answer).__name__}")
    return answer


def _squared_error(block: nn.Module, example: _Example, replaced: dict[str, Tensor] | None = None) -> Tensor:
    """Mean over real tokens and features of (block(x) - target)^2, float32."""
    device = next(block.parameters()).device
    args = tuple(a.to(device) if isinstance(a, Tensor) else a for a in example.args)
    with (
        torch.autocast(device.type, dtype=example.autocast, enabled=example.autocast is not None),
        token_mask(example.mask),
    ):
        answer = _tensor(functional_call(block, replaced or {}, args, example.kwargs))
    error = (answer.float() - example.target.to(device).float()).square()
    if example.mask is not None and example.mask.shape == error.shape[:-1]:
        error = error[example.mask.to(device)]
    return error.mean()


def _check(loss: Tensor, step: int) -> None:
    if not torch.isfinite(loss):
        raise ValueError(
            f"the error is NaN or infinite at step {step}; lower lr, or look for NaN in the model's weights"
        )
