"""What learns, as a callback: the interface of `LoRA` and `ScalesOnly`."""

from collections.abc import Mapping
from pathlib import Path

import lightning as L
from torch import nn

from qat.callbacks.quantization import QuantizationAwareTraining
from qat.scheme import QuantScheme


class Trainable(L.Callback):
    """Chooses what learns; comes after `QuantizationAwareTraining` in the trainer's callbacks.

    Attributes:
        folder: where it writes what belongs beside the export, if anything; None writes nothing.
        base: name or path of the float model, for that folder.
    """

    folder: Path | None = None
    base: str = ""

    @property
    def weights_learn(self) -> bool:
        """Whether the float weights of quantized layers do."""
        raise NotImplementedError

    def check(
        self, model: nn.Module, chosen: Mapping[str, QuantScheme], quantization: QuantizationAwareTraining
    ) -> None:
        """Refuse what does not fit before anything long.

        Args:
            model: before or after insertion.
            chosen: the schemes of the layers that are quantized, by dotted name.
            quantization: how they are.

        Raises:
            ValueError: names what does not fit, and the remedy.
        """
        raise NotImplementedError
