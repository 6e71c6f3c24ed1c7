"""Distillation as a callback: the module's own loss is mixed with, or replaced by, its distance from the float model.

The module it works on knows nothing of it.  The part that is distilled is watched while `training_step` runs, and the
teacher is called with what that part was called with.
"""

import copy
import functools
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning_utilities import apply_to_collection
from torch import Tensor, nn
from torch.nn import functional as F

from qat.calibration import Rotation
from qat.calibration.blocks import find_blocks
from qat.callbacks.batches import after, restore
from qat.callbacks.quantization import QuantizationAwareTraining
from qat.insertion import layers
from qat.structure import keep_frequencies
from qat.training import divergence, hidden_error


class Distillation(L.Callback):
    """Trains a quantized model towards the distribution of a float one.

    The loss is (1 - weight) * what `training_step` returns + weight * T² KL(teacher || student) in nats, over the rows
    whose label is known (arXiv 1503.02531; from the model's own float weights, as LLM-QAT: arXiv 2305.17888), plus
    hidden * the mean of `qat.training.hidden_error` over the outputs of all blocks.  Comes before
    `QuantizationAwareTraining` in the trainer's callbacks.  Logs `train/kl` and `train/hidden`.

    Args:
        weight: share of the divergence, from 0 to 1.  With 0 and hidden=0 the module's own loss is all there is, and
            nothing is held in memory.
        temperature: T of `qat.training.divergence`.
        hidden: weight of the error of the blocks' outputs, a block being an entry of the `ModuleList` that holds most
            quantized layers.
        submodule: dotted name of the part of the LightningModule that returns logits, as a tensor (..., classes) or as
            an object with `logits`; `training_step` calls it once.
        teacher: a float model with the same classes, called as that part is.  By default a frozen copy of that part as
            it is before anything is quantized; it is never in a checkpoint, so a resumed run needs the same weights
            to start from (`train.py` sees to that).
        dtype: of the teacher's parameters, such as `bfloat16`; by default as the model trains.
        device: of the teacher; by default the model's.
    """

    def __init__(
        self,
        weight: float = 1.0,
        temperature: float = 1.0,
        submodule: str = "model",
        teacher: nn.Module | None = None,
        dtype: str | None = None,
        device: str | None = None,
        hidden: float = 0.0,
    ):
        if not 0 <= weight <= 1:
            raise ValueError(f"the weight of distillation must be in [0, 1], got {weight}")
        if not (temperature > 0 and math.isfinite(temperature)):
            raise ValueError(f"the temperature of distillation must be positive, got {temperature}")
        if not (hidden >= 0 and math.isfinite(hidden)):
            raise ValueError(f"the weight of hidden states must not be negative, got {hidden}")
        if not submodule:
            raise ValueError("distillation needs the name of the part that returns logits, such as submodule=model")
        if dtype is not None and not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ValueError(f"distillation's dtype must be one of torch's, such as bfloat16, got {dtype}")
        self.weight, self.temperature, self.submodule, self.hidden = weight, temperature, submodule, hidden
        self.teacher, self.dtype, self.device = teacher, dtype, device
        self._answered: tuple[list[Tensor], tuple[Tensor, dict[str, Tensor]]] | None = None

    @property
    def _teaches(self) -> bool:
        return bool(self.weight or self.hidden)

    def check(
        self, pl_module: L.LightningModule, quantization: QuantizationAwareTraining | None, quantizes: bool = True
    ) -> None:
        """Refuse what cannot be distilled before anything long.

        Args:
            pl_module: its model built; the blocks that hidden=... compares are looked for once it is quantized.
            quantization: how it is quantized, if it is.
            quantizes: whether the run quantizes anything: a control that is taught does not, and its run does.

        Raises:
            ValueError: another vocabulary, a model that is its own teacher, no blocks to compare, or blocks whose
                outputs are rotated.
        """
        if not self._teaches:
            return
        own, start_step = self.teacher is None, 0 if quantization is None else quantization.start_step
        if own and not quantizes:
            raise ValueError(
                "nothing is quantized, so the model's own float weights have nothing to teach it: objective=next_token "
                "trains it plainly"
            )
        if own and start_step and self.weight == 1:
            raise ValueError(
                f"until step {start_step} the model is its own teacher and learns nothing: set start_step=0, or a "
                "distillation weight below 1"
            )
        if self.hidden and quantization is not None and isinstance(quantization.calibration, Rotation):
            raise ValueError(
                f"calibration {quantization.calibration.name} rotates what the blocks hand on, and not what the "
                "teacher's do: their hidden states cannot be compared (objective.hidden=0)"
            )
        part = pl_module.get_submodule(self.submodule)
        if layers(part):
            self._blocks(part)
        ours, theirs = (_vocabulary(m) for m in (part, self.teacher))
        if ours is not None and theirs is not None and ours != theirs:
            raise ValueError(
                f"the model has {ours} tokens and the teacher {theirs}: distillation needs a teacher with the same "
                "vocabulary"
            )

    # -- hooks --------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit" or not self._teaches:
            return
        if not pl_module.automatic_optimization:
            raise ValueError(
                f"{type(pl_module).__name__} optimizes manually: distillation changes the loss that training_step "
                "returns, and there is none. Call qat.training.divergence in it instead"
            )
        try:
            pl_module.get_submodule(self.submodule)
        except AttributeError:
            after(pl_module, "configure_model", lambda _: self._copy(trainer, pl_module))
        else:
            self._copy(trainer, pl_module)
        original = pl_module.training_step

        @functools.wraps(original)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            calls: list[tuple[Any, Any, Any]] = []
            part = pl_module.get_submodule(self.submodule)
            watched = part.register_forward_hook(lambda _, a, k, out: calls.append((a, k, out)), with_kwargs=True)
            with watched, _outputs(part, self._blocks(part)) as states:
                result = original(*args, **kwargs)
            batch = args[0] if args else None
            return None if result is None else self._mixed(pl_module, result, calls, states, batch)

        pl_module.training_step = training_step  # type: ignore[method-assign]

    def _copy(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        found = [c for c in trainer.callbacks if isinstance(c, QuantizationAwareTraining)]  # type: ignore[attr-defined]
        self.check(pl_module, found[0] if found else None)
        if self.teacher is not None:
            return
        part = pl_module.get_submodule(self.submodule)
        if layers(part):
            raise ValueError(
                f"{self.submodule} is quantized already, so it cannot be copied as its own teacher: put Distillation "
                "before QuantizationAwareTraining in the trainer's callbacks, or give it a teacher"
            )
        self.teacher = copy.deepcopy(part)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._teaches:
            return
        assert self.teacher is not None
        keep_frequencies(self.teacher)
        self.teacher = trainer.precision_plugin.convert_module(self.teacher)
        dtype = None if self.dtype is None else getattr(torch, self.dtype)
        self.teacher.to(device=self.device or pl_module.device, dtype=dtype).eval().requires_grad_(False)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        restore(pl_module, "training_step", "configure_model")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")

    # -- loss ---------------------------------------------------------------------------------------

    def _mixed(
        self, pl_module: L.LightningModule, result: Any, calls: list[tuple[Any, Any, Any]], states: Any, batch: Any
    ) -> Any:
        if len(calls) != 1:
            raise ValueError(
                f"training_step called {self.submodule} {len(calls)} times, and distillation compares one call: "
                "name the part that returns the logits as its submodule"
            )
        args, kwargs, output = calls[0]
        student = _logits(output, self.submodule)
        logits, theirs = self._taught(args, kwargs, list(states))
        teacher = logits.to(student.device)
        known = _known(batch, kwargs, student, pl_module.get_submodule(self.submodule))
        own = result["loss"] if isinstance(result, dict) else result
        loss = 0.0 if self.weight == 1 else (1 - self.weight) * own
        if self.weight:
            kl = divergence(student, teacher, known, self.temperature)
            pl_module.log("train/kl", kl, prog_bar=True)
            loss = loss + self.weight * kl
        if self.hidden:
            errors = [hidden_error(s, theirs[n].to(s.device), _rows(known, s)) for n, s in states.items()]
            hidden = torch.stack(errors).mean()
            pl_module.log("train/hidden", hidden, prog_bar=True)
            loss = loss + self.hidden * hidden
        return {**result, "loss": loss} if isinstance(result, dict) else loss

    def _blocks(self, part: nn.Module) -> list[str]:
        """Names of the modules whose outputs are compared."""
        if not self.hidden:
            return []
        name, blocks = find_blocks(part)
        if not blocks:
            raise ValueError(
                f"{self.submodule} has no chain of blocks with quantized layers, so there are no hidden states to "
                "compare: set objective.hidden=0"
            )
        teacher = part if self.teacher is None else self.teacher  # before training, the model is its own
        names, theirs = [f"{name}.{i}" for i in range(len(blocks))], dict(teacher.named_modules())
        if missing := [n for n in names if n not in theirs]:
            raise ValueError(f"the teacher has no {missing[0]}, so it has no hidden states for it: objective.hidden=0")
        return names

    @torch.no_grad()
    def _taught(self, args: Any, kwargs: Any, blocks: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """The teacher's logits and the outputs of its `blocks`; asked once about the same tensors, in one batch."""
        assert self.teacher is not None
        asked: list[Tensor] = []
        apply_to_collection((args, kwargs), Tensor, asked.append)
        if self._answered is not None and _same(self._answered[0], asked):
            return self._answered[1]
        like = next(self.teacher.parameters())

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(like.device, like.dtype if tensor.is_floating_point() else None)

        with _outputs(self.teacher, blocks) as states:
            answer = self.teacher(
                *apply_to_collection(args, Tensor, moved), **apply_to_collection(kwargs, Tensor, moved)
            )
        self._answered = asked, (_logits(answer, "the teacher"), states)
        return self._answered[1]

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._answered = None


@contextmanager
def _outputs(model: nn.Module, names: list[str]) -> Iterator[dict[str, Tensor]]:
    """Within, what each of these modules returned last: its first tensor, where it returns several."""
    found: dict[str, Tensor] = {}

    def kept(name: str, _: nn.Module, __: Any, output: Any) -> None:
        found[name] = output if isinstance(output, Tensor) else output[0]

    handles = [model.get_submodule(name).register_forward_hook(functools.partial(kept, name)) for name in names]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _same(one: list[Tensor], other: list[Tensor]) -> bool:
    """Whether these are the same tensors, and not equal ones."""
    return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))


def _rows(known: Tensor | None, states: Tensor) -> Tensor | None:
    """Those rows of the logits that count, where hidden states have the same ones."""
    return known if known is not None and known.shape == states.shape[:-1] else None


def _logits(output: Any, name: str) -> Tensor:
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        kind = type(output).__name__
        raise ValueError(f"{name} returned {kind}: distillation needs a tensor, or an object with logits")
    return logits


def _known(batch: Any, kwargs: Mapping[str, Any], logits: Tensor, part: nn.Module) -> Tensor | None:
    """Rows whose label is known, (...), bool, where the batch has one for each; else those not padded.

    Labels lie beside the logits that predict them, except those that a transformers language model is given itself,
    which it shifts: its logits at t are for the label at t + 1.
    """
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if isinstance(labels, Tensor) and labels.shape == logits.shape[:-1]:
        known = labels != -100  # torch's ignore_index
        shifts = getattr(getattr(part, "loss_function", None), "__name__", None) == "ForCausalLMLoss"
        return F.pad(known[..., 1:], (0, 1)) if shifts and kwargs.get("labels") is not None else known
    mask = kwargs.get("attention_mask")
    return mask.bool() if isinstance(mask, Tensor) and mask.shape == logits.shape[:-1] else None


def _vocabulary(model: nn.Module | None) -> int | None:
    return getattr(getattr(model, "config", None), "vocab_size", None)
