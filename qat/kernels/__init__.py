"""One operator, `qat::packed_linear`, and what computes it."""

from qat.kernels import cuda  # noqa: F401  registers for CUDA tensors
from qat.kernels.ops import packed_linear

__all__ = ["packed_linear"]
