import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st

from qat.packing import pack, unpack

BITS = range(2, 9)


def random_codes(rows: int, columns: int, bits: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (rows, columns), generator=generator, dtype=torch.int8)


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 5), st.integers(1, 200), st.sampled_from(BITS), st.integers(0, 1000))
def test_roundtrip_is_exact(rows, columns, bits, seed):
    codes = random_codes(rows, columns, bits, seed)
    packed = pack(codes, bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (rows, -(-columns * bits // 32))
    restored = unpack(packed, bits, columns)
    assert restored.dtype == torch.int8
    assert torch.equal(restored, codes)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("columns", [1, 31, 32, 100, 172])
def test_bytes_equal_those_of_compressed_tensors(bits, columns):
    codes = random_codes(3, columns, bits)
    assert torch.equal(pack(codes, bits), pack_to_int32(codes, bits))
    assert torch.equal(unpack_from_int32(pack(codes, bits), bits, codes.shape), codes)


def test_int4_layout_is_low_nibble_first_with_offset_8():
    codes = torch.tensor([[-8, -7, -6, -5, -4, -3, -2, 7]], dtype=torch.int8)
    assert pack(codes, 4).tolist() == [[0xF6543210 - 2**32]]


def test_int8_words_are_bytes_in_order_with_offset_128():
    codes = torch.tensor([[-128, -1, 0, 127]], dtype=torch.int8)
    assert pack(codes, 8).view(torch.uint8).tolist() == [[0, 127, 128, 255]]


def test_a_3_bit_code_crosses_the_word_border_low_bits_first():
    codes = torch.full((1, 11), -4, dtype=torch.int8)
    codes[0, 10] = 1  # u = 5 = 0b101: bits 30 and 31 are 0b01, bit 32 is 1
    assert pack(codes, 3).tolist() == [[1 << 30, 1]]


def test_bits_after_the_last_code_are_zero():
    assert pack(torch.full((1, 1), 7, dtype=torch.int8), 4).tolist() == [[15]]


@pytest.mark.parametrize("extreme", [-9, 8], ids=["below", "above"])
def test_a_code_beyond_the_width_is_refused(extreme):
    with pytest.raises(ValueError, match="do not fit 4 bits"):
        pack(torch.tensor([[extreme]]), 4)


@pytest.mark.parametrize("bits", [1, 9])
def test_other_widths_are_refused(bits):
    with pytest.raises(ValueError, match="bits must be from 2 to 8"):
        pack(torch.zeros(1, 8, dtype=torch.int8), bits)


def test_float_codes_are_refused():
    with pytest.raises(ValueError, match="codes must be integers"):
        pack(torch.zeros(1, 8), 4)


def test_unpacking_checks_the_number_of_words():
    with pytest.raises(ValueError, match=r"shape \(out, 2\)"):
        unpack(torch.zeros(1, 1, dtype=torch.int32), 4, 9)
