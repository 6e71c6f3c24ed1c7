"""Lightning callbacks: quantization, recovery and export for any LightningModule."""

from qat.callbacks.distillation import Distillation
from qat.callbacks.export import Export
from qat.callbacks.guard import NaNGuard, SafeExit
from qat.callbacks.health import TrainingHealth
from qat.callbacks.lora import LoRA
from qat.callbacks.nested import Nested
from qat.callbacks.oscillation import Oscillation
from qat.callbacks.quantization import QuantizationAwareTraining
from qat.callbacks.random_state import RandomState
from qat.callbacks.recovery import Recovery
from qat.callbacks.scales_only import ScalesOnly
from qat.callbacks.trainable import Trainable

__all__ = [
    "Distillation", "Export", "LoRA", "NaNGuard", "Nested", "Oscillation", "QuantizationAwareTraining", "RandomState",
    "Recovery", "SafeExit", "ScalesOnly", "Trainable", "TrainingHealth",
]  # fmt: skip
