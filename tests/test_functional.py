import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qat.functional import (
    SCALE_FLOOR,
    absmax_scale,
    dequantize,
    dynamic_scale,
    fake_quantize,
    grouped,
    quantize,
    scale_dtype,
    store_scale,
)
from qat.scheme import QuantSpec

BITS = range(2, 9)
DTYPES = ["bfloat16", "float16", "float32"]


def channel(bits: int = 4, dtype: str = "bfloat16", rule: str = "half_range") -> QuantSpec:
    return QuantSpec(bits=bits, granularity="channel", scale_dtype=dtype, absmax_rule=rule)


def all_codes(bits: int) -> torch.Tensor:
    return torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1)).float()


def test_halves_round_to_the_even_code():
    x = torch.tensor([-3.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5])
    assert quantize(x, torch.tensor([1.0]), channel()).tolist() == [-4, -2, -2, 0, 0, 2, 2, 4]


def test_codes_come_from_division_and_not_from_a_reciprocal():
    # Search float32 pairs for which x / s and x * (1 / s) lie on different sides of a half.
    scales = np.arange(65, 128, dtype=np.float32)[:, None] / 64  # bfloat16 represents them
    x = np.nextafter((np.arange(8, dtype=np.float32) + 0.5) * scales, np.float32(0))
    x = np.concatenate([x, (np.arange(8, dtype=np.float32) + 0.5) * scales], 1)
    divided, multiplied = np.round(x / scales), np.round(x * (np.float32(1) / scales))
    rows, columns = np.nonzero(divided != multiplied)
    assert len(rows), "no pair tells the two apart: the test has lost its point"
    codes = quantize(torch.tensor(x[rows, columns])[:, None], torch.tensor(scales[rows]), channel(8))
    assert codes.flatten().tolist() == divided[rows, columns].tolist()


@pytest.mark.parametrize("bits", BITS)
def test_values_beyond_the_range_get_the_outermost_codes(bits):
    spec = channel(bits)
    x = torch.tensor([-1e30, spec.qmin - 0.51, spec.qmax + 0.51, 1e30, -torch.inf, torch.inf])
    expected = [spec.qmin, spec.qmin, spec.qmax, spec.qmax, spec.qmin, spec.qmax]
    assert quantize(x, torch.tensor([1.0]), spec).tolist() == expected


@pytest.mark.parametrize(
    ("bits", "rule", "divisor"), [(4, "half_range", 7.5), (4, "qmax", 7), (8, "half_range", 127.5), (8, "qmax", 127)]
)
def test_an_absolute_maximum_is_divided_by_the_rule(bits, rule, divisor):
    spec = channel(bits, "float32", rule)
    assert absmax_scale(torch.tensor([3.0]), spec).item() == np.float32(3) / np.float32(divisor)


def test_the_qmax_rule_clips_nothing_and_the_half_range_rule_clips_the_positive_end():
    x = torch.tensor([-3.0, 3.0])
    assert quantize(x, absmax_scale(torch.tensor([3.0]), channel(4, "float32", "qmax")), channel()).tolist() == [-7, 7]
    codes = quantize(x, absmax_scale(torch.tensor([3.0]), channel(4, "float32")), channel())
    assert codes.tolist() == [-8, 7]


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_a_scale_is_rounded_to_what_the_artifact_stores(name):
    dtype = getattr(torch, name)
    scale = torch.linspace(0.01, 3, 1001)
    stored = store_scale(scale, channel(4, name))
    assert stored.dtype == torch.float32
    assert torch.equal(stored, scale.to(dtype).float())
    assert (stored != scale).any()
    assert torch.equal(store_scale(stored, channel(4, name)), stored)


@pytest.mark.parametrize("name", DTYPES)
def test_a_stored_scale_keeps_its_sign_and_is_never_zero(name):
    floor = SCALE_FLOOR[getattr(torch, name)]
    scale = torch.tensor([0.5, -0.5, 0.0, -0.0, floor / 8, -floor / 8])
    assert store_scale(scale, channel(4, name)).tolist() == [0.5, -0.5, floor, -floor, floor, -floor]


@pytest.mark.parametrize("bits", BITS)
def test_a_negative_scale_reaches_one_step_further_up_than_down(bits):
    spec, scale = channel(bits), torch.tensor([-0.25])
    assert fake_quantize(torch.tensor([-1e3, 1e3]), scale, spec).tolist() == [-0.25 * spec.qmax, -0.25 * spec.qmin]
    x = torch.linspace(-40, 40, 641)[:, None]
    assert torch.equal(quantize(x, scale, spec), quantize(-x, -scale, spec))


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_codes_are_computed_with_the_rounded_scale(name):
    # 4.5 * s with s just below a representable t: by s the quotient is over 4.5, by t it is not.
    dtype = getattr(torch, name)
    spec = channel(4, name)
    step = torch.finfo(dtype).eps
    scale = torch.tensor([1 + step - step / 4])
    x = scale * 4.5 + step / 4
    assert quantize(x, scale, spec).item() == 5
    assert quantize(x, store_scale(scale, spec), spec).item() == 4


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("value", [0.0, 1e-45, 2.0**-100], ids=["zero", "subnormal", "tiny"])
def test_a_scale_never_falls_below_the_floor(name, value):
    dtype = getattr(torch, name)
    stored = store_scale(torch.tensor([value]), channel(4, name))
    assert stored.item() == SCALE_FLOOR[dtype] == float(torch.tensor(SCALE_FLOOR[dtype], dtype=dtype))
    assert stored.item() >= torch.finfo(dtype).tiny, "a subnormal scale may be flushed to zero"


def test_a_row_of_zeros_stays_zeros():
    spec = channel()
    scale = absmax_scale(torch.zeros(1), spec)
    assert torch.equal(fake_quantize(torch.zeros(8), scale, spec), torch.zeros(8))


def test_a_scale_beyond_float16_is_not_silently_finite():
    assert torch.isinf(store_scale(torch.tensor([1e6]), channel(4, "float16")))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_dequantizing_every_code_is_exact(bits, name):
    codes = all_codes(bits)
    dtype = getattr(torch, name)
    # Every significand of the dtype, at three exponents: numpy's float64 product is exact (8 + 11 bits).
    significands = torch.arange(1, 2, torch.finfo(dtype).eps, dtype=torch.float64)
    for exponent in (-12, 0, 9):
        scale = (significands * 2.0**exponent).to(dtype)
        assert torch.equal(scale.double(), significands * 2.0**exponent)
        values = dequantize(codes.expand(len(scale), -1), scale[:, None])
        assert values.dtype == torch.float32
        assert torch.equal(values.double(), codes.double() * scale.double()[:, None])


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(BITS),
    st.sampled_from([1, 2, 5, 8]),
    st.integers(1, 9),
    st.sampled_from(DTYPES),
    st.integers(-40, 40),
    st.integers(0, 2**32 - 1),
)
def test_codes_survive_a_round_trip(bits, groups, n, name, exponent, seed):
    spec = QuantSpec(bits=bits, granularity="group", group_size=n, scale_dtype=name)
    generator = torch.Generator().manual_seed(seed)
    exponent = max(-13, min(exponent, 8)) if name == "float16" else exponent
    codes = torch.randint(spec.qmin, spec.qmax + 1, (3, groups * n), generator=generator).float()
    scale = store_scale((1 + torch.rand(3, groups, generator=generator)) * 2.0**exponent, spec)
    values = dequantize(codes, scale)
    assert torch.equal(quantize(values, scale, spec), codes)
    assert torch.equal(fake_quantize(values, scale, spec), values)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(BITS), st.sampled_from([1, 3, 4]), st.integers(1, 8), st.integers(0, 1000))
def test_a_group_is_quantized_as_if_it_were_alone(bits, groups, n, seed):
    spec = QuantSpec(bits=bits, granularity="group", group_size=n)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, groups * n, generator=generator)
    scale = absmax_scale(grouped(x, torch.empty(2, groups))[0].abs().amax(-1), spec)
    whole = quantize(x, scale, spec)
    for group in range(groups):
        columns = slice(group * n, (group + 1) * n)
        assert torch.equal(whole[:, columns], quantize(x[:, columns], scale[:, group : group + 1], spec))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_grouped_views_share_memory_and_broadcast(groups):
    x = torch.arange(24.0).view(3, 8)
    view, factor = grouped(x, torch.ones(3, groups))
    assert view.shape == (3, groups, 8 // groups)
    assert factor.shape == (3, groups, 1)
    assert view.data_ptr() == x.data_ptr()
    assert view[1, groups - 1, 0] == 16 - 8 // groups


@pytest.mark.parametrize("shape", [(8,), (2, 8), (2, 3, 8), (0, 8)], ids=str)
def test_any_number_of_leading_dimensions_even_an_empty_one(shape):
    x = torch.linspace(-1, 1, 8).expand(shape)
    values = fake_quantize(x, torch.full((1,), 0.25), channel())
    assert values.shape == shape
    assert torch.equal(values, torch.round(x * 4) / 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_inputs_are_upcast_before_the_division(dtype):
    x = torch.linspace(-3, 3, 257).to(dtype)
    scale = torch.tensor([0.328125])
    expected = np.clip(np.round(x.float().numpy() / np.float32(0.328125)), -8, 7)
    assert quantize(x, scale, channel()).tolist() == expected.tolist()
    assert fake_quantize(x, scale, channel()).dtype == dtype


def test_quantizing_leaves_its_input_alone():
    x = torch.randn(4, 8)
    before, scale = x.clone(), torch.full((4, 2), 0.1)
    fake_quantize(x, scale, QuantSpec(bits=4, granularity="group", group_size=4))
    assert torch.equal(x, before)
    assert torch.equal(scale, torch.full((4, 2), 0.1))


def test_a_dynamic_scale_belongs_to_its_token():
    spec = QuantSpec(bits=8, granularity="token", dynamic=True, absmax_rule="qmax")
    x = torch.tensor([[[1.0, -2.0], [0.5, 0.25]], [[0.0, 0.0], [-8.0, 4.0]]])
    scale = dynamic_scale(x, spec)
    expected = np.array([[[2], [0.5]], [[0], [8]]], np.float32) / np.float32(127)
    expected[1, 0] = 2.0**-64
    assert torch.equal(scale, torch.tensor(expected))
    assert torch.equal(dynamic_scale(x.flip(0), spec), scale.flip(0))


@pytest.mark.parametrize("name", DTYPES)
def test_the_scale_dtype_is_torchs(name):
    assert scale_dtype(channel(4, name)) is getattr(torch, name)
