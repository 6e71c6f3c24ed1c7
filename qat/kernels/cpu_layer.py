"""A linear layer on the CPU kernels whose operands were checked once and do not change.

`qat::packed_linear` looks at every operand in every call, which at one token costs as much as a small layer itself.
Here the weights' addresses are resolved when the layer is made, and a call looks at x alone.
"""

import torch
from torch import Tensor

from qat.kernels import cpu
from qat.kernels.ops import check
from qat.kernels.reference import input_spec


class CpuLayer:
    """The operands of `qat.kernels.packed_linear` but x, on backend cpu; or a bfloat16 weight.

    Args:
        packed: (out, words) int32; or for `bits` 16 (out, in) bfloat16, which is multiplied exactly and summed in
            float32.
        scale: (out, groups), bfloat16, float16 or float32; None for `bits` 16.
        bias: (out,), floating, or None.
        bits, group_size, input_bits, input_scale, input_rule: as `packed_linear`'s.
        in_features: of x.
        dtype: of x and of the result.
        use: kernels; those of this machine by default.

    Raises:
        ValueError: the operands do not fit together, are not contiguous, or no kernel computes such a layer.
        BuildError: the kernels cannot be compiled.
    """

    def __init__(
        self,
        packed: Tensor,
        scale: Tensor | None,
        bias: Tensor | None,
        bits: int,
        group_size: int,
        input_bits: int = 0,
        input_scale: Tensor | None = None,
        input_rule: str = "qmax",
        *,
        in_features: int,
        dtype: torch.dtype,
        use: cpu.Kernels | None = None,
    ):
        self.kernels = use or cpu.kernels()
        if scale is not None:
            x = torch.empty(1, in_features, dtype=dtype, device="meta")
            check(x, packed, scale, None, bias, bits, group_size, input_bits, input_scale, input_rule)
            reason = cpu.unsupported(bits, group_size, in_features, input_bits)
        else:
            fits = bits == 16 and packed.dtype == torch.bfloat16 and packed.shape[1] == in_features and not input_bits
            reason = None if fits else f"weights of {packed.dtype}"
        if dtype not in cpu.TYPES:
            reason = f"activations of {dtype}"
        if reason or not (packed.is_contiguous() and (scale is None or scale.is_contiguous())):
            raise ValueError(f"backend cpu has no kernel for {reason or 'weights that are not contiguous'}")
        self.in_features, self.out_features, self.dtype, self.input_bits = in_features, len(packed), dtype, input_bits
        bias = None if bias is None else bias.detach().to(dtype).contiguous()
        # Kept alive: the kernels have their addresses.
        self.operands = packed, scale, bias, input_scale
        self.addresses = tuple(0 if t is None else t.data_ptr() for t in (bias, packed, scale))
        mode, static, divisor = 0, 0.0, 1.0
        if input_bits:
            mode, static = (1, 0.0) if input_scale is None else (2, float(input_scale.float()))
            divisor = input_spec(input_bits, input_rule).absmax_divisor
        row_bytes = packed.shape[1] * packed.element_size()
        scale_type = 0 if scale is None else cpu.TYPES[scale.dtype]
        self._shape = self.out_features, in_features, group_size, row_bytes, bits, cpu.TYPES[dtype], scale_type
        self._input = mode, input_bits, self.kernels.isa
        self._scales = static, divisor

    def arguments(self, x: int, y: int, tokens: int, residual: int = 0) -> bytes:
        """Those of `Kernels.linear`: y = residual + x @ weight.T + bias.

        Args:
            x: address of (tokens, in), contiguous, the layer's dtype.
            y: of (tokens, out); may be the residual's.
            tokens: how many.
            residual: of (tokens, out), or 0.
        """
        bias, packed, scale = self.addresses
        threads = torch.get_num_threads()
        return cpu.ARGUMENTS.pack(
            x, y, bias, residual, packed, scale, tokens, *self._shape, *self._input, threads, *self._scales
        )

    def __call__(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), for contiguous x of the layer's dtype and fewer than `cpu.MANY_TOKENS` tokens.

        Raises:
            MemoryError: there is none for the prepared activations.
        """
        out = torch.empty((*x.shape[:-1], self.out_features), dtype=self.dtype)
        tokens = x.numel() // self.in_features
        if tokens and self.kernels.linear(self.arguments(x.data_ptr(), out.data_ptr(), tokens)):
            raise MemoryError(f"no memory for {tuple(x.shape)} activations")
        return out

    def takes(self, x: Tensor) -> bool:
        """Whether `__call__` computes this x: else the operator does, and says what is wrong with it."""
        return (
            type(x) is Tensor
            and x.is_cpu
            and x.dtype is self.dtype
            and x.is_contiguous()
            and x.ndim > 0
            and x.shape[-1] == self.in_features
            and x.numel() < cpu.MANY_TOKENS * self.in_features
            and not (x.requires_grad and torch.is_grad_enabled())
        )
