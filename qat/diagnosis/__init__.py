"""Where quantization costs how much, which widths fit a budget best, and whether training is healthy."""

from qat.diagnosis.sensitivity import measure
from qat.diagnosis.widths import Group, WidthSearch, assign, frontier

__all__ = ["Group", "WidthSearch", "assign", "frontier", "measure"]
