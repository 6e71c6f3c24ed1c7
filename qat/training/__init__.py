"""How weights and scales learn."""

from qat.training.distillation import divergence, hidden_error
from qat.training.lora import add_adapters, load_adapter, save_adapter
from qat.training.parameters import parameter_groups, scale_parameters, scale_steps

__all__ = [
    "add_adapters", "divergence", "hidden_error", "load_adapter", "parameter_groups", "save_adapter",
    "scale_parameters", "scale_steps",
]  # fmt: skip
