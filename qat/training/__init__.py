"""How weights and scales learn."""

from qat.training.distillation import divergence
from qat.training.parameters import parameter_groups, scale_parameters, scale_steps

__all__ = ["divergence", "parameter_groups", "scale_parameters", "scale_steps"]
