"""INT8 activations, RMSNorm with quantization, and the epilogues on a GPU.  Nothing here runs without one."""

import pytest
import torch
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from qat.functional import dequantize, dynamic_scale, quantize
from qat.kernels import cuda
from qat.kernels.reference import input_spec
from qat.kernels.tiles import tile_scale
from qat.packing import pack

if not torch.cuda.is_available():
    pytest.skip("no GPU: tests/kernels/ has the same tests on an emulator", allow_module_level=True)

DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


def weight(n: int, k: int, bits: int, group_size: int, dtype: torch.dtype):
    """codes (n, k) int8, scales, powers of two, and what the kernels read of both."""
    g = torch.Generator("cuda").manual_seed(n)
    half = 2 ** (bits - 1)
    codes = torch.randint(-half, half, (n, k), generator=g, device="cuda", dtype=torch.int32)
    scale = (2.0 ** -torch.randint(7, 10, (n, k // group_size), generator=g, device="cuda")).to(dtype)
    return codes, scale, cuda.repack(pack(codes, bits), bits, k), tile_scale(scale, dtype)


@DTYPES
@pytest.mark.parametrize("scheme", [(8, 4096), (4, 4096), (4, 128), (4, 32)], ids=str)
@pytest.mark.parametrize("m", [1, 8, 9, 33, 64, 65, 300])
def test_int8_activations_are_multiplied_exactly(m, scheme, dtype):
    (bits, group_size), n, k = scheme, 6144, 4096
    codes, scale, tiles, runtime_scale = weight(n, k, bits, group_size, dtype)
    g = torch.Generator("cuda").manual_seed(m)
    x = torch.randint(-128, 128, (m, k), generator=g, device="cuda", dtype=torch.int8)
    token_scale = torch.rand(m, generator=g, device="cuda") * 2**-6
    bias = torch.randn(n, generator=g, device="cuda").to(dtype)
    out = torch.ops.qat.tiled_linear_int8(x, token_scale, tiles, runtime_scale, bias, bits, group_size, n, dtype)
    # exact in float64; in units of 2^-9 they are below 2^24 for groups, and are rounded once for channels
    sums = (x.double() @ dequantize(codes, scale).double().T).float()
    assert torch.equal(out, (sums * token_scale[:, None] + bias.float()).to(dtype))


@DTYPES
@pytest.mark.parametrize("rule", ["qmax", "half_range"])
@pytest.mark.parametrize(("m", "k"), [(1, 4096), (33, 14336), (5, 250)])
def test_codes_and_scales_are_the_references(m, k, rule, dtype):
    x = torch.randn(m, k, device="cuda", generator=torch.Generator("cuda").manual_seed(k)).to(dtype)
    spec = input_spec(8, rule)
    codes, scale = cuda.quantize_tokens(x, rule=rule)
    assert torch.equal(scale, dynamic_scale(x, spec)[:, 0])
    assert torch.equal(codes[:, :k], quantize(x, scale[:, None], spec).to(torch.int8)) and not codes[:, k:].any()


@DTYPES
def test_a_norm_and_its_quantization_are_those_of_llama(dtype, k=4096):
    x = (32 * torch.randn(7, k, device="cuda")).round().clamp(-127, 127).div(32).to(dtype)  # whose squares sum exactly
    norm = LlamaRMSNorm(k, 1e-5).to("cuda", dtype)
    norm.weight.data = (1 + 0.3 * torch.randn(k, device="cuda")).to(dtype)
    codes, scale = cuda.rmsnorm_quantize(x, norm.weight.data, 1e-5)
    # torch's rsqrt may differ from 1 / sqrt by a unit in the last place: the same steps with sqrt
    wide = x.float()
    inverse = 1 / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    expected = norm.weight.data * (wide * inverse).to(dtype)
    spec = input_spec(8, "qmax")
    assert torch.equal(scale, dynamic_scale(expected, spec)[:, 0])
    assert torch.equal(codes, quantize(expected, scale[:, None], spec).to(torch.int8))
    torch.testing.assert_close(expected, norm(x).detach())


@DTYPES
@pytest.mark.parametrize("m", [1, 8, 17, 64, 65])
@pytest.mark.parametrize("int8", [False, True])
def test_a_fused_epilogue_gives_the_bits_of_the_same_steps_apart(int8, m, dtype, n=1024, k=1024):
    _, _, tiles, scale = weight(n, k, 4, 128, dtype)
    x = torch.randn(m, k, device="cuda").to(dtype)
    residual = torch.randn(m, n, device="cuda").to(dtype)

    def linear(**epilogue):
        if not int8:
            return torch.ops.qat.tiled_linear(x, tiles, scale, None, 4, 128, n, **epilogue)
        return torch.ops.qat.tiled_linear_int8(
            *cuda.quantize_tokens(x), tiles, scale, None, 4, 128, n, dtype, **epilogue
        )

    plain = linear()
    assert torch.equal(linear(residual=residual), residual + plain)
    fused, apart = linear(swiglu=True), F.silu(plain[:, ::2]) * plain[:, 1::2]
    # the two exponentials may differ, and then one rounding to the type
    torch.testing.assert_close(fused, apart, rtol=torch.finfo(dtype).eps, atol=1e-6)
