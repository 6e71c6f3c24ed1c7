"""The same layers through other packages, where these are installed.  None of this has run on a GPU yet.

w4a16  tinygemm      torch's own int4 product, which torchao calls; asymmetric, here with zero points of 0
w4a16  bitsandbytes  NF4, blocks of 128: other codes, the same bytes
w4a16  gemlite       Triton, groups of 128
w4a16  humming       groups of 128
w8a8   int_mm        torch's int8 product alone: neither quantization nor scales
"""

from collections.abc import Callable

import torch
from torch import Tensor

GROUP = 128
Call = Callable[[], Tensor]
_left_out: dict[str, str] = {}


def calls(scheme: str, x: Tensor, weight: Tensor) -> dict[str, Call]:
    """Those for a scheme that work on these operands: each is called once; a failure is kept for `left_out`.

    Args:
        scheme: its short name.
        x: (tokens, in), bfloat16, on a CUDA device.
        weight: (out, in), the same.
    """
    found: dict[str, Call] = {}
    for name, make in PEERS.get(scheme, {}).items():
        try:
            call = make(x, weight)
            call()
            torch.cuda.synchronize()
            found[name] = call
        except Exception as error:  # any failure of a foreign package is a line in the table, not the end of it
            _left_out.setdefault(name, f"{type(error).__name__}: {str(error).splitlines()[:1]}")
    return found


def left_out() -> dict[str, str]:
    """Why packages are missing from the table: the first failure of each."""
    return dict(_left_out)


def tinygemm(x: Tensor, weight: Tensor) -> Call:
    outputs, inputs = weight.shape
    bytes_ = torch.randint(0, 256, (outputs, inputs // 2), dtype=torch.uint8, device=x.device)
    tiles = torch.ops.aten._convert_weight_to_int4pack(bytes_, 8)
    scale = torch.full((inputs // GROUP, outputs, 2), 0.01, dtype=torch.bfloat16, device=x.device)
    return lambda: torch.ops.aten._weight_int4pack_mm(x, tiles, GROUP, scale)


def bitsandbytes(x: Tensor, weight: Tensor) -> Call:
    import bitsandbytes as bnb

    codes, state = bnb.functional.quantize_4bit(weight, blocksize=GROUP, quant_type="nf4")
    return lambda: bnb.matmul_4bit(x, codes.t(), quant_state=state)


def gemlite(x: Tensor, weight: Tensor) -> Call:
    from gemlite.core import DType, GemLiteLinearTriton

    outputs, inputs = weight.shape
    kinds = {"input_dtype": DType.BF16, "output_dtype": DType.BF16}
    layer = GemLiteLinearTriton(4, group_size=GROUP, in_features=inputs, out_features=outputs, **kinds)
    codes = torch.randint(0, 16, (outputs, inputs), dtype=torch.uint8, device=x.device)
    scale = torch.full((outputs, inputs // GROUP), 0.01, dtype=torch.bfloat16, device=x.device)
    layer.pack(codes, scale, torch.full_like(scale, 8), bias=None)
    return lambda: layer.forward(x)


def humming(x: Tensor, weight: Tensor) -> Call:
    from humming.layer import HummingLayer

    outputs, inputs = weight.shape
    config = {"dtype": "int4", "group_size": GROUP}
    layer = HummingLayer(shape_n=outputs, shape_k=inputs, weight_config=config, torch_dtype=torch.bfloat16).cuda()
    layer.load_from_unquantized(weight)
    layer.transform()
    layer.prepare_default_kernel_configs()
    return lambda: layer(x)


def int_mm(x: Tensor, weight: Tensor) -> Call:
    codes, right = (t.mul(8).clamp(-128, 127).to(torch.int8) for t in (x, weight))
    return lambda: torch._int_mm(codes, right.t())


PEERS: dict[str, dict[str, Callable[[Tensor, Tensor], Call]]] = {
    "w4a16": {"tinygemm": tinygemm, "bitsandbytes": bitsandbytes, "gemlite": gemlite, "humming": humming},
    "w8a8": {"int_mm": int_mm},
}
