"""How weights and scales learn."""

from qat.training.parameters import parameter_groups, scale_parameters

__all__ = ["parameter_groups", "scale_parameters"]
