"""The CPU kernels between a decoder's linear layers, against torch.  AVX512 is emulated where it is missing."""

import pytest
import torch
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from qat.kernels import cpu_decode
from qat.kernels.cpu_layer import CpuLayer
from qat.packing import pack

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def units(dtype: torch.dtype, roundings: int) -> dict[str, float]:
    """So many roundings to `dtype`, or to float32 with the reordered sums of it, on results of about 1."""
    eps = roundings * max(torch.finfo(dtype).eps, 2.0**-20)
    return {"rtol": eps, "atol": eps}


@DTYPES
@pytest.mark.parametrize(("rows", "size"), [(1, 2048), (3, 100), (2, 17), (1, 1)])
def test_a_norm_is_transformers_rms_norm(rows, size, dtype, kernels):
    torch.manual_seed(0)
    module = LlamaRMSNorm(size, 1e-5).to(dtype)
    module.weight.data.copy_(torch.randn(size))
    x, y = torch.randn(rows, size).to(dtype), torch.empty(rows, size, dtype=dtype)
    assert kernels.norm(cpu_decode.norm(x, module.weight, y, 1e-5), kernels.isa) == 0
    # The squares' sum in another order can move the first rounding by a unit, and so the product's.
    torch.testing.assert_close(y, module(x), **units(dtype, 2))


@DTYPES
@pytest.mark.parametrize(("rows", "size"), [(1, 8192), (3, 513), (2, 7), (1, 1)])
def test_a_gate_is_silu_times_up(rows, size, dtype, kernels):
    torch.manual_seed(0)
    both = (4 * torch.randn(rows, 2 * size)).to(dtype)
    both[0, 0], y = -200.0, torch.empty(rows, size, dtype=dtype)
    assert kernels.gate(cpu_decode.gate(both, y, threads=2), kernels.isa) == 0
    gate, up = both.chunk(2, -1)
    torch.testing.assert_close(y, F.silu(gate) * up, **units(dtype, 2))


def some_heads(batch: int, heads: int, kv_heads: int, head_dim: int, slot: int, padding: int = 0):
    start = torch.zeros(batch, dtype=torch.int64)
    start[-1] = padding
    return cpu_decode.Heads(batch, heads, kv_heads, head_dim, 11, torch.tensor([slot]), start)


HEADS = [(1, 4, 1, 64), (2, 8, 2, 16), (3, 3, 3, 10), (2, 6, 2, 2)]


@DTYPES
@pytest.mark.parametrize("shape", HEADS, ids=str)
def test_rotary_turns_queries_and_keys_and_stores_the_slot_alone(shape, dtype, kernels):
    torch.manual_seed(0)
    batch, heads, kv_heads, head_dim = shape
    spec = some_heads(*shape, slot=7, padding=3)
    qkv = torch.randn(batch, heads + 2 * kv_heads, head_dim).to(dtype)
    angle = torch.rand(11, head_dim // 2).repeat(1, 2) * 6
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    query = torch.empty(batch, heads * head_dim, dtype=dtype)
    keys, values = (torch.full((batch, kv_heads, 11, head_dim), 9.0, dtype=dtype) for _ in range(2))
    assert kernels.rotary(cpu_decode.rotary(qkv, cos, sin, query, keys, values, spec), kernels.isa) == 0
    at = 7 - spec.start
    q, k, v = qkv[:, :, None].split([heads, kv_heads, kv_heads], 1)
    expected_q, expected_k = apply_rotary_pos_emb(q, k, cos[at][:, None], sin[at][:, None])
    assert torch.equal(query.view(batch, heads, 1, head_dim), expected_q)  # elementwise, rounded in the same places
    assert torch.equal(keys[:, :, 7:8], expected_k)
    assert torch.equal(values[:, :, 7:8], v)
    others = [slot for slot in range(11) if slot != 7]
    assert (keys[:, :, others] == 9).all() and (values[:, :, others] == 9).all()


@DTYPES
@pytest.mark.parametrize("slot", [0, 10])
@pytest.mark.parametrize("shape", HEADS, ids=str)
def test_attention_is_softmax_over_the_slots_in_use(shape, slot, dtype, kernels):
    torch.manual_seed(0)
    batch, heads, kv_heads, head_dim = shape
    spec = some_heads(*shape, slot=slot, padding=min(slot, 4))
    query = torch.randn(batch, heads, 1, head_dim).to(dtype)
    keys, values = (torch.randn(batch, kv_heads, 11, head_dim).to(dtype) for _ in range(2))
    keys[:, :, slot + 1 :] = values[:, :, slot + 1 :] = torch.nan  # never read
    keys[-1, :, : spec.start[-1]] = values[-1, :, : spec.start[-1]] = torch.nan
    out = torch.empty(batch, heads * head_dim, dtype=dtype)
    assert kernels.attend(cpu_decode.attend(query, keys, values, out, spec, threads=2), kernels.isa) == 0
    for row in range(batch):
        used = slice(int(spec.start[row]), slot + 1)
        q, k, v = query[row].double(), keys[row, :, used].double(), values[row, :, used].double()
        expected = F.scaled_dot_product_attention(q[None], k[None], v[None], enable_gqa=True)
        torch.testing.assert_close(out[row].double(), expected.flatten(), **units(dtype, 1))


@DTYPES
@pytest.mark.parametrize(("inputs", "outputs", "tokens"), [(64, 9, 1), (100, 5, 3), (33, 33, 7), (1, 1, 1)])
def test_a_bfloat16_weight_is_multiplied_exactly(inputs, outputs, tokens, dtype, kernels):
    torch.manual_seed(0)
    weight = torch.randint(-8, 9, (outputs, inputs)).bfloat16()
    bias, x = torch.randint(-3, 4, (outputs,)).to(dtype), torch.randint(-2, 3, (tokens, inputs)).to(dtype)
    layer = CpuLayer(weight, None, bias, 16, inputs, in_features=inputs, dtype=dtype, use=kernels)
    assert torch.equal(layer(x), F.linear(x.float(), weight.float(), bias.float()).to(dtype))


@DTYPES
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_a_residual_is_added_to_the_rounded_result(bits, dtype, kernels):
    torch.manual_seed(0)
    codes, x = torch.randint(-8, 8, (7, 96)), torch.randn(5, 96).to(dtype)
    if bits == 16:
        layer = CpuLayer(codes.bfloat16(), None, None, 16, 96, in_features=96, dtype=dtype, use=kernels)
    else:
        layer = CpuLayer(pack(codes, bits), torch.rand(7, 3), None, bits, 32, in_features=96, dtype=dtype, use=kernels)
    residual = torch.randn(5, 7).to(dtype)
    expected, y = residual + layer(x), residual.clone()
    assert kernels.linear(layer.arguments(x.data_ptr(), y.data_ptr(), 5, y.data_ptr())) == 0
    assert torch.equal(y, expected)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"packed": torch.zeros(9, 64, dtype=torch.float16)}, "weights of torch.float16"),
        ({"packed": torch.zeros(64, 9, dtype=torch.bfloat16).T}, "not contiguous"),
        ({"dtype": torch.float64}, "activations of torch.float64"),
    ],
)
def test_a_float_layer_that_no_kernel_takes_is_refused_by_name(wrong, message, library):
    given = {"packed": torch.zeros(9, 64, dtype=torch.bfloat16), "dtype": torch.float32} | wrong
    with pytest.raises(ValueError, match=message):
        CpuLayer(given["packed"], None, None, 16, 64, in_features=64, dtype=given["dtype"])


def test_a_full_range_of_exponents_keeps_its_relative_error(kernels):
    """silu(x) = x / (1 + e^-x): as exact as torch's over all x where e^-x is finite."""
    x = torch.linspace(-80, 80, 4001)
    y = torch.empty(1, 4001)
    assert kernels.gate(cpu_decode.gate(torch.cat([x, torch.ones(4001)])[None], y, 1), kernels.isa) == 0
    expected = F.silu(x.double())
    error = (y[0].double() - expected).abs() / expected.abs().clamp(min=1e-30)
    assert error.max() < 4 * 2.0**-23  # the exponential, 1 +, the division, the rounding of -x log2(e)
