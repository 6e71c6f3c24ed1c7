"""Codes to bytes and back: a dense little-endian bitstream in int32 words, one stream a row.

Code q of `bits` = b is stored as the unsigned number u = q + 2^(b-1).  Element j of a row occupies bits
j * b ... j * b + b - 1 of the row's stream; bit i of the stream is bit i % 32 of word i // 32.

    b = 4    word 0   bit 31                              bit 0
             |  u7  |  u6  |  u5  |  u4  |  u3  |  u2  |  u1  |  u0  |

    b = 3    word 0   bit 31                              bit 0
             |u10[1:0]|  u9  |  u8  | ...  |  u2  |  u1  |  u0  |
             word 1
             |u21[0]|  u20 | ...            |  u12 |  u11 |u10[2]|

Odd codes (spacing 2; at 2 bits -3, -1, 1, 3) take no more room: u counts them from the smallest, (q + 2^b - 1) / 2.

What is left of the last word is zero.  This is `weight_packed` of compressed-tensors' `pack-quantized`; on a
little-endian machine the words of 8-bit codes are bytes u0, u1, ..., those of 4-bit codes u0 | u1 << 4, ...
"""

from math import gcd

import torch
from torch import Tensor
from torch.nn import functional as F


def words_of(in_features: int, bits: int) -> int:
    """Words in one packed row: ceil(in_features * bits / 32)."""
    return -(-in_features * bits // 32)


def pack(codes: Tensor, bits: int, spacing: int = 1) -> Tensor:
    """Pack the rows of `codes`.

    Args:
        codes: (out, in), integers in [-2^(bits-1), 2^(bits-1) - 1], any integer dtype.
        bits: 2 to 8.
        spacing: 2 for codes that are odd integers in [1 - 2^bits, 2^bits - 1].

    Returns:
        (out, ceil(in * bits / 32)), int32.

    Raises:
        ValueError: a wrong width, dtype or shape, or a code beyond the width, or even where `spacing` is 2.
    """
    _check_bits(bits)
    if codes.ndim != 2 or codes.is_floating_point():
        raise ValueError(f"codes must be integers of shape (out, in), got {codes.dtype} {tuple(codes.shape)}")
    half = 2 ** (bits - 1)
    if spacing == 2:
        if not bool((codes & 1).all()):
            raise ValueError("codes of spacing 2 must be odd")
        codes = codes >> 1
    if codes.numel() and not (-half <= int(codes.min()) and int(codes.max()) < half):
        raise ValueError(f"codes from {int(codes.min())} to {int(codes.max())} do not fit {bits} bits")
    period, words = _period(bits)
    stream = F.pad(codes.to(torch.int32) + half, (0, -codes.shape[1] % period)).unflatten(1, (-1, period))
    packed = torch.zeros(*stream.shape[:2], words, dtype=torch.int32, device=codes.device)
    for j in range(period):
        word, shift = divmod(j * bits, 32)
        packed[..., word] |= stream[..., j] << shift
        if shift + bits > 32:  # the code's high bits open the next word
            packed[..., word + 1] |= stream[..., j] >> (32 - shift)
    return packed.flatten(1)[:, : words_of(codes.shape[1], bits)].contiguous()


def unpack(packed: Tensor, bits: int, in_features: int, spacing: int = 1) -> Tensor:
    """The codes that `pack` packed.

    Args:
        packed: (out, ceil(in_features * bits / 32)), int32.
        bits: 2 to 8.
        in_features: codes in a row.
        spacing: as it was packed with.

    Returns:
        (out, in_features), int8.

    Raises:
        ValueError: a wrong width, dtype or shape.
    """
    _check_bits(bits)
    if packed.dtype != torch.int32 or packed.ndim != 2 or packed.shape[1] != words_of(in_features, bits):
        raise ValueError(
            f"packed must be int32 of shape (out, {words_of(in_features, bits)}) for {in_features} codes of {bits} "
            f"bits, got {packed.dtype} {tuple(packed.shape)}"
        )
    period, words = _period(bits)
    stream = F.pad(packed, (0, -packed.shape[1] % words)).unflatten(1, (-1, words))
    codes = torch.empty(*stream.shape[:2], period, dtype=torch.int8, device=packed.device)
    for j in range(period):
        word, shift = divmod(j * bits, 32)
        value = stream[..., word] >> shift  # arithmetic: the copies of the sign are masked off
        if shift + bits > 32:
            value = value & (2 ** (32 - shift) - 1) | stream[..., word + 1] << (32 - shift)
        codes[..., j] = (value & (2**bits - 1)) - 2 ** (bits - 1)
    codes = codes.flatten(1)[:, :in_features].contiguous()
    return codes if spacing == 1 else codes.mul_(2).add_(1)


def _period(bits: int) -> tuple[int, int]:
    """After how many codes, and how many words, the pattern of word borders repeats."""
    common = gcd(32, bits)
    return 32 // common, bits // common


def _check_bits(bits: int) -> None:
    if not 2 <= bits <= 8:
        raise ValueError(f"bits must be from 2 to 8, got {bits}")
