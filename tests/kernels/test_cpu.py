"""The CPU kernels against the reference.  The AVX512 path runs under emulation where the processor lacks it."""

import itertools

import pytest
import torch

from qat.functional import dequantize
from qat.kernels import cpu, packed_linear, reference
from qat.packing import pack

SCHEMES = {"w4a16": (4, 0), "w8a16": (8, 0), "w4a8": (4, 8), "w8a8": (8, 8)}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (group size, inputs): whole and cut blocks, one group, several; 0 is one scale a channel.
SHAPES = [(32, 32), (32, 96), (64, 192), (128, 384), (256, 768), (0, 1), (0, 37), (0, 100), (0, 1024), (0, 1031)]
TOKENS = (1, 2, 5, 16, 33, 97)  # 97: torch's int8 product, with VNNI


def layer(bits: int, group: int, inputs: int, outputs: int = 7, scale=None, dtype=torch.float32) -> tuple:
    """Operands packed, scale, zero_point, bias, bits, group_size."""
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (outputs, inputs))
    if scale is None:
        shape = outputs, inputs // (group or inputs)
        scale = torch.exp2(torch.randint(-3, 3, shape)) * (1 - 2 * torch.randint(0, 2, shape))
    bias = torch.randint(-3, 4, (outputs,)).to(dtype)
    return pack(codes, bits), scale, None, bias, bits, group or inputs


# -- equality ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SCHEMES)
def test_integers_and_powers_of_two_equal_the_reference_bit_for_bit(name, dtype, kernels):
    torch.manual_seed(0)
    bits, input_bits = SCHEMES[name]
    for (group, inputs), tokens, scale_dtype in itertools.product(SHAPES, TOKENS, DTYPES):
        packed, scale, *rest = layer(bits, group, inputs, dtype=dtype)
        # Sums stay below 3 * 128 * 1031 < 2^24 in units of the smallest scale, 1/8: exact in any order.
        x = torch.randint(-3, 4, (tokens, inputs)).to(dtype)
        given = (x, packed, scale.to(scale_dtype), *rest, input_bits, torch.ones(1) if input_bits else None, "qmax")
        expected, found = reference.packed_linear(*given), cpu.packed_linear(*given, use=kernels)
        assert found.dtype == dtype
        assert torch.equal(found, expected), (group, inputs, tokens, scale_dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SCHEMES)
def test_any_numbers_are_as_near_to_the_reference_as_float32_sums_allow(name, dtype, kernels):
    torch.manual_seed(0)
    bits, input_bits = SCHEMES[name]
    for (group, inputs), tokens, rule in itertools.product(SHAPES, TOKENS, ("qmax", "half_range")):
        packed, scale, zero, bias, *rest = layer(bits, group, inputs, dtype=dtype)
        scale = ((0.1 + torch.rand(scale.shape)) * scale.sign()).bfloat16()
        x = torch.randn(tokens, inputs).to(dtype)
        given = (packed, scale, zero, bias, *rest, input_bits, None, rule)
        # The reference in float64: the codes of x are those of float32, products and sums have no error to speak of.
        expected = reference.packed_linear(x.double(), *given)
        found = cpu.packed_linear(x, *given, use=kernels).double()
        exact_x = reference.quantized_input(x.double(), input_bits, None, rule).abs()
        weight = reference.packed_linear(torch.eye(inputs).double(), packed, scale, None, None, *rest, 0, None, rule).T
        magnitude = exact_x @ weight.abs().T + bias.double().abs()
        # A path from a product to the result passes at most `inputs` additions within groups, one for each group and
        # the lanes, and the multiplications by scales: each rounds by 2^-24 of at most the sum of magnitudes.
        steps = inputs + scale.shape[1] + 20
        tolerance = steps * 2.0**-24 * magnitude
        # One rounding to x's dtype: half a unit in the last place, or of the smallest subnormal.
        tolerance += torch.finfo(dtype).eps / 2 * (expected.abs() + tolerance) + torch.finfo(dtype).smallest_normal
        if input_bits == 0 and tokens >= cpu.MANY_TOKENS and cpu._tile_dtype(dtype) != torch.float32:
            tolerance += torch.finfo(dtype).eps * magnitude  # tiles of weights in x's dtype, as in the reference
        assert ((found - expected).abs() <= tolerance).all(), (group, inputs, tokens, rule)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_activations_are_quantized_by_the_rule_of_training(static, dtype, kernels):
    torch.manual_seed(0)
    inputs = 64
    # The weight is one: the result is the quantized input itself.
    eye = (pack(torch.eye(inputs, dtype=torch.int64), 8), torch.ones(inputs, 1), None, None, 8, inputs)
    x = torch.randn(12, inputs) * torch.exp2(torch.linspace(-30, 14, 12))[:, None]
    x[0] = 0
    x[1] = torch.arange(-32, 32) / 2  # ties, where the scale is a power of two
    x[1, 0] = 127
    x[2] = 2.0**-140
    x = x.to(dtype)
    for bits, rule in itertools.product(range(2, 9), ("qmax", "half_range")):
        scale = torch.tensor([0.31]).to(dtype) if static else None
        found = cpu.packed_linear(x, *eye, bits, scale, rule, use=kernels)
        assert torch.equal(found, reference.quantized_input(x, bits, scale, rule)), (bits, rule)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_every_16_bit_number_passes_unchanged(dtype, kernels):
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).view(-1, 32)
    one = (pack(torch.eye(32, dtype=torch.int64), 4), torch.ones(32, 1), None, None, 4, 32)
    finite = torch.where(x.isfinite(), x, 1)  # not infinity: times the zeros beside the one it is NaN
    for rows in finite.split(cpu.MANY_TOKENS - 1):  # torch's product of bfloat16 has no subnormals
        assert torch.equal(cpu.packed_linear(rows, *one, 0, None, "qmax", use=kernels), rows)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_round_half_to_even(dtype, kernels):
    torch.manual_seed(0)
    finfo = torch.finfo(dtype)
    scale = torch.randn(4096, 1) * torch.exp2(torch.randint(-28, 18, (4096, 1)).float())
    ties = torch.tensor(
        [[1 + finfo.eps / 2], [1 + 3 * finfo.eps / 2], [2.0**-25], [3 * 2.0**-25], [65519.0], [65520.0]]
    )
    scale = torch.cat([scale, ties, -ties])
    packed = pack(torch.ones(len(scale), 1, dtype=torch.int64), 8)
    found = cpu.packed_linear(torch.ones(1, 1, dtype=dtype), packed, scale, None, None, 8, 1, 0, None, "qmax", kernels)
    assert torch.equal(found[0], scale[:, 0].to(dtype))
    tile = torch.empty(len(scale), 1, dtype=dtype)
    kernels.dequantize(
        packed.data_ptr(),
        scale.data_ptr(),
        tile.data_ptr(),
        len(scale),
        1,
        1,
        4,
        8,
        0,
        cpu.TYPES[dtype],
        kernels.isa,
        1,
    )
    assert torch.equal(tile, scale.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_tiles_are_the_dequantized_weight(bits, dtype, kernels):
    torch.manual_seed(0)
    for group, inputs in SHAPES:
        codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (5, inputs))
        scale, packed = torch.rand(5, inputs // (group or inputs)).half(), pack(codes, bits)
        tile = torch.empty(5, inputs, dtype=dtype)
        kernels.dequantize(
            packed.data_ptr(), scale.data_ptr(), tile.data_ptr(), 5, inputs, group or inputs, 4 * packed.shape[1], bits,
            2, cpu.TYPES[dtype], kernels.isa, 1,
        )  # fmt: skip
        assert torch.equal(tile, dequantize(codes, scale).to(dtype)), (group, inputs)


# -- hostile numbers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEMES)
def test_scales_may_be_zero_subnormal_or_huge(name, kernels):
    torch.manual_seed(0)
    bits, input_bits = SCHEMES[name]
    exponents = torch.tensor([-149.0, -140, -64, -14, 60, 100])
    scale = torch.cat([torch.exp2(exponents), torch.zeros(1)])[:, None].repeat(1, 3)
    packed, _, *rest = layer(bits, 32, 96)
    x = torch.randint(-3, 4, (3, 96)).float()
    given = (x, packed, scale, None, None, *rest[2:], input_bits, torch.ones(1) if input_bits else None, "qmax")
    assert torch.equal(cpu.packed_linear(*given, use=kernels), reference.packed_linear(*given))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("name", SCHEMES)
def test_nan_and_infinity_in_a_token_do_to_it_what_the_reference_does(name, static, value, kernels):
    torch.manual_seed(0)
    bits, input_bits = SCHEMES[name]
    x = torch.randint(-3, 4, (3, 64)).float()
    x[:, 5] = 127
    x[1, 9] = value
    static_scale = torch.ones(1) if static and input_bits else None
    given = (x, *layer(bits, 32, 64), input_bits, static_scale, "qmax")
    expected = reference.packed_linear(*given)
    assert not expected[1].isfinite().all() or (static and input_bits)
    torch.testing.assert_close(cpu.packed_linear(*given, use=kernels), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", SCHEMES)
def test_a_scale_that_is_nan_makes_its_output_nan(name, kernels):
    bits, input_bits = SCHEMES[name]
    packed, scale, *rest = layer(bits, 32, 64)
    scale[2, 1] = float("nan")
    found = cpu.packed_linear(torch.ones(2, 64), packed, scale, *rest, input_bits, None, "qmax", use=kernels)
    assert found.isnan().any(0).tolist() == [False, False, True, False, False, False, False]


@pytest.mark.parametrize("tokens", [1, 40])
def test_activations_of_a_weight_only_layer_are_not_quantized(tokens, kernels):
    packed, scale, *rest = layer(4, 32, 64)
    small = torch.zeros(tokens, 64)
    small[:, 1] = 2.0**-10
    large = small.clone()
    large[:, 0] = 2.0**10  # INT8 activations would round 2^-10 beside it to zero
    of = lambda x: cpu.packed_linear(x, packed, scale, *rest, 0, None, "qmax", use=kernels)  # noqa: E731
    assert not torch.equal(of(large), of(large - small))
    assert torch.equal(of(large) - of(large - small), of(small) - of(0 * small))


# -- the operator --------------------------------------------------------------------------------------------


def test_the_operator_defaults_to_the_reference_and_takes_the_backend_by_name(library, monkeypatch):
    calls = []
    monkeypatch.setattr(cpu, "packed_linear", lambda *given: calls.append(given) or torch.zeros(()))
    given = (torch.ones(1, 64), *layer(4, 32, 64))
    packed_linear(*given)
    assert not calls
    packed_linear(*given, backend="cpu")
    assert len(calls) == 1
    with pytest.raises(ValueError, match="backend must be reference or cpu, got 'gpu'"):
        packed_linear(*given, backend="gpu")


@pytest.mark.parametrize("name", SCHEMES)
def test_it_compiles_without_graph_breaks(name, library):
    bits, input_bits = SCHEMES[name]
    given = (*layer(bits, 32, 64), input_bits, None, "qmax", "cpu")
    compiled = torch.compile(lambda x: packed_linear(2 * x, *given) + 1, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 64)
    assert torch.equal(compiled(x), packed_linear(2 * x, *given) + 1)
    torch.library.opcheck(torch.ops.qat.packed_linear.default, (x, *given))


def test_activations_may_lie_anyhow(library):
    given = (*layer(4, 32, 64), 8, None, "qmax", "cpu")
    x = torch.randn(2, 64, 6)
    expected = packed_linear(x.transpose(1, 2).contiguous(), *given)
    assert torch.equal(packed_linear(x.transpose(1, 2), *given), expected)
    assert packed_linear(x.transpose(1, 2)[:, :0], *given).shape == (2, 0, 7)
    assert torch.equal(packed_linear(x[0, :, 0], *given), expected[0, 0])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"x": torch.ones(1, 64, dtype=torch.float64)}, "no kernel for activations of torch.float64"),
        ({"x": torch.ones(1, 64, device="meta")}, None),
        ({"packed": torch.zeros(8, 7, dtype=torch.int32).T}, "needs packed contiguous"),
        ({"scale": torch.ones(2, 7).T}, "needs scale contiguous"),
        ({"zero_point": torch.zeros(7, 2, dtype=torch.int8)}, "no kernel for zero points"),
        ({"packed": torch.zeros(7, 6, dtype=torch.int32), "bits": 3}, "no kernel for weights of 3 bits"),
        ({"scale": torch.ones(7, 4), "group_size": 16}, "no kernel for groups of 16"),
    ],
    ids=["float64", "meta", "packed", "scale", "zero_point", "bits", "group"],
)
def test_what_the_kernels_cannot_do_is_refused_by_name(wrong, message, library):
    packed, scale, zero_point, bias, bits, group_size = layer(4, 32, 64)
    given = {"x": torch.ones(1, 64), "packed": packed, "scale": scale, "zero_point": zero_point, "bias": bias}
    given |= {"bits": bits, "group_size": group_size, "backend": "cpu"} | wrong
    if message is None:
        assert packed_linear(**given).shape == (1, 7)  # the fake: shapes only
        return
    with pytest.raises(ValueError, match=message):
        packed_linear(**given)
