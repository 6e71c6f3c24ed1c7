"""One operator, `qat::packed_linear`, and what computes it."""

from qat.kernels.ops import packed_linear

__all__ = ["packed_linear"]
