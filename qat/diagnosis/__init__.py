"""What quantization costs where: each layer's sensitivity at each width, and the widths that fit a budget best."""

from qat.diagnosis.sensitivity import measure
from qat.diagnosis.widths import Group, WidthSearch, assign, frontier

__all__ = ["Group", "WidthSearch", "assign", "frontier", "measure"]
