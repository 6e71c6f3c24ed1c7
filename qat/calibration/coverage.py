"""What calibration data reaches: tokens that arrive at each layer, and its channels that are always 0, or outliers."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from qat.calibration.blocks import Run
from qat.fake_quantizer import unmasked
from qat.insertion import layers
from qat.nn import FakeQuantLayer

log = logging.getLogger(__name__)

OUTLIER = 10.0
"""From how many times the median channel's root mean square on a channel is an outlier.  The largest of the embedded
model are 2 to 5 times the median, those of its outlier twin 57 to 103."""


@dataclass(frozen=True)
class Reached:
    """What of the calibration data one layer saw.

    Attributes:
        tokens: real ones; positions, for a convolution.
        inputs: channels of its input.
        dead: of them, those that were 0 for every token, so that no measured error depends on their weights.
        outliers: of them, those whose root mean square is over `OUTLIER` times the median one's.
    """

    tokens: int
    inputs: int
    dead: int
    outliers: int = 0


class Coverage:
    """A calibration (see `qat.calibration`) that sets nothing: it watches the float model run, and refuses data.

    Attributes:
        reached: what each layer saw, by name, after the call; embeddings, which look rows up, have no row here.
    """

    name = "coverage"
    changes_weights: ClassVar[bool] = False

    def __init__(self) -> None:
        self.reached: dict[str, Reached] = {}

    def check(self, model: nn.Module) -> None:
        """Every model can be watched."""

    def needs_data(self, model: nn.Module) -> bool:
        """True: it looks at nothing else."""
        return True

    @torch.no_grad()
    def __call__(self, model: nn.Module, run: Run, folder: Path | None = None) -> None:
        """Watch `run()`; the log says what was thin.

        Raises:
            ValueError: no usable token at all, or none that reaches some layers; names them and the remedy.
        """
        watched = {name: layer for name, layer in layers(model).items() if layer.multiplies}
        squares = {name: torch.zeros(layer.matrix.shape[1]) for name, layer in watched.items()}
        tokens = dict.fromkeys(watched, 0)
        with _watch(watched, squares, tokens):
            run()
        if watched and not any(tokens.values()):
            raise ValueError("the calibration data has no usable token; more documents, or fewer masked ones")
        if unreached := [name for name, count in tokens.items() if not count]:
            shown = ", ".join(unreached[:3]) + (", ..." if len(unreached) > 3 else "")
            raise ValueError(
                f"the calibration data never reaches {len(unreached)} of {len(watched)} layers ({shown}): their inputs "
                "are unknown. Give more or other data (data.calibration_windows), calibrate without data "
                "(calibration=mse), or leave these layers in float (quant.ignore)"
            )
        for name, count in tokens.items():
            size, dead = squares[name].sqrt(), int((squares[name] == 0).sum())
            large = size > OUTLIER * size[size > 0].median() if dead < len(size) else size > 0
            self.reached[name] = Reached(count, len(size), dead, int(large.sum()))
        self._say()

    def _say(self) -> None:
        if not self.reached:
            return
        fewest = min(self.reached, key=lambda name: self.reached[name].tokens)
        few, most = self.reached[fewest].tokens, max(r.tokens for r in self.reached.values())
        log.info("calibration data reaches all %d layers with %s tokens", len(self.reached),
                 f"{few}" if few == most else f"{few} ({fewest}) to {most}")  # fmt: skip
        if thin := [name for name, r in self.reached.items() if r.tokens < r.inputs]:
            log.warning(
                "%d layers see fewer calibration tokens than they have inputs, such as %s (%d tokens, %d inputs): what "
                "is learned from them there is mostly chance; raise data.calibration_windows",
                len(thin), thin[0], self.reached[thin[0]].tokens, self.reached[thin[0]].inputs,
            )  # fmt: skip
        if dead := {name: r.dead for name, r in self.reached.items() if r.dead}:
            worst = max(dead, key=lambda name: dead[name])
            log.warning(
                "%d input channels in %d layers are 0 for all calibration tokens, most of them in %s (%d of %d): their "
                "weights are rounded to nearest",
                sum(dead.values()), len(dead), worst, dead[worst], self.reached[worst].inputs,
            )  # fmt: skip


@contextmanager
def _watch(watched: dict[str, FakeQuantLayer], squares: dict[str, Tensor], tokens: dict[str, int]) -> Iterator[None]:
    def note(name: str, layer: FakeQuantLayer, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        real = unmasked(layer.rows(args[0] if args else kwargs["input"]))
        tokens[name] += len(real)
        squares[name] += real.float().square().sum(0).cpu()

    hooks = [layer.register_forward_pre_hook(partial(note, name), with_kwargs=True) for name, layer in watched.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
