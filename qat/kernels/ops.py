"""The schema of `qat::packed_linear`, its checks, its fake, and the reference as its default implementation.

The reference is registered for every device, and is what a call gets that asks for nothing else: proofs of exports
compare with it.  A faster backend is registered for its device and asked for by name.
"""

import torch
from torch import Tensor

from qat.kernels import cpu, reference
from qat.packing import words_of

torch.library.define(
    "qat::packed_linear",
    "(Tensor x, Tensor packed, Tensor scale, Tensor? zero_point, Tensor? bias, int bits, int group_size, "
    "int input_bits, Tensor? input_scale=None, str input_rule='qmax', str backend='reference') -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_operator = torch.ops.qat.packed_linear.default  # its only overload: found once, not in every call


def packed_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    input_bits: int = 0,
    input_scale: Tensor | None = None,
    input_rule: str = "qmax",
    backend: str = "reference",
) -> Tensor:
    """A linear layer on packed integer weights.

    Args:
        x: (..., in), floating.
        packed: (out, ceil(in * bits / 32)), int32, as `qat.packing.pack` lays it out.
        scale: (out, in // group_size), bfloat16, float16 or float32.
        zero_point: (out, in // group_size), int8, subtracted from the codes; None for symmetric weights.
        bias: (out,), floating, or None.
        bits: of a weight, 2 to 8.
        group_size: consecutive inputs that share a scale; in for one scale a channel.
        input_bits: 0 leaves the activations as they are; else they are quantized to that many bits.
        input_scale: (1,), floating: the static scale of the activations; None for one scale a token.
        input_rule: how a token's scale follows from its absolute maximum, the spec's `absmax_rule`.
        backend: `reference`, which computes what training did; `cpu`, `qat.kernels.cpu`; or `cuda`,
            `qat.kernels.cuda`.

    Returns:
        (..., out), x's dtype.

    Raises:
        ValueError: a wrong dtype, shape, width or group size, or what the backend cannot compute.
        BuildError: the backend cannot be compiled.
    """
    return _operator(x, packed, scale, zero_point, bias, bits, group_size, input_bits, input_scale, input_rule, backend)


@torch.library.impl("qat::packed_linear", "CompositeExplicitAutograd")
def _reference(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    input_bits: int,
    input_scale: Tensor | None = None,
    input_rule: str = "qmax",
    backend: str = "reference",
) -> Tensor:
    check(x, packed, scale, zero_point, bias, bits, group_size, input_bits, input_scale, input_rule)
    if backend != "reference":
        _refuse(f"backend {backend!r} has no kernel for {x.device.type}")
    return reference.packed_linear(
        x, packed, scale, zero_point, bias, bits, group_size, input_bits, input_scale, input_rule
    )


@torch.library.impl("qat::packed_linear", "CPU")
def _cpu(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    input_bits: int,
    input_scale: Tensor | None = None,
    input_rule: str = "qmax",
    backend: str = "reference",
) -> Tensor:
    arguments = (x, packed, scale, zero_point, bias, bits, group_size, input_bits, input_scale, input_rule)
    check(*arguments)
    if backend not in ("reference", "cpu"):
        _refuse(f"backend must be reference or cpu, got {backend!r}")
    return (cpu if backend == "cpu" else reference).packed_linear(*arguments)


@torch.library.register_fake("qat::packed_linear")
def _fake(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    input_bits: int,
    input_scale: Tensor | None = None,
    input_rule: str = "qmax",
    backend: str = "reference",
) -> Tensor:
    check(x, packed, scale, zero_point, bias, bits, group_size, input_bits, input_scale, input_rule)
    return x.new_empty(*x.shape[:-1], packed.shape[0])


def check(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    input_bits: int,
    input_scale: Tensor | None,
    input_rule: str,
) -> None:
    """Refuse arguments of `packed_linear` that contradict each other, from dtypes and shapes alone.

    Raises:
        ValueError: as `packed_linear`; names the argument.
    """
    if not (2 <= bits <= 8 and (input_bits == 0 or 2 <= input_bits <= 8)):
        _refuse(f"bits must be 2 to 8 and input_bits 0 or 2 to 8, got {bits} and {input_bits}")
    if input_rule not in ("half_range", "qmax"):
        _refuse(f"input_rule must be half_range or qmax, got {input_rule!r}")
    if x.ndim < 1 or packed.ndim != 2:
        _refuse(f"x must be (..., in) and packed (out, words), got {tuple(x.shape)} and {tuple(packed.shape)}")
    in_features, out_features = x.shape[-1], packed.shape[0]
    if group_size < 1 or in_features % group_size:
        _refuse(f"group_size {group_size} does not divide {in_features} inputs")
    groups = (out_features, in_features // group_size)
    _expect("x", x, None, _FLOATING)
    _expect("packed", packed, (out_features, words_of(in_features, bits)), (torch.int32,))
    _expect("scale", scale, groups, (torch.bfloat16, torch.float16, torch.float32))
    _expect("zero_point", zero_point, groups, (torch.int8,))
    _expect("bias", bias, (out_features,), _FLOATING)
    _expect("input_scale", input_scale, (1,), _FLOATING)
    if input_scale is not None and input_bits == 0:
        _refuse("input_scale was given, but input_bits is 0: the activations are not quantized")


_FLOATING = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def _expect(name: str, tensor: Tensor | None, shape: tuple[int, ...] | None, dtypes: tuple[torch.dtype, ...]) -> None:
    if tensor is None:
        return
    if tensor.dtype not in dtypes:
        _refuse(f"{name} must be {' or '.join(str(d) for d in dtypes)}, got {tensor.dtype}")
    if shape is not None and tuple(tensor.shape) != shape:
        _refuse(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")


def _refuse(what: str) -> None:
    raise ValueError(f"qat::packed_linear: {what}")
