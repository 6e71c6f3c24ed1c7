import re

import pytest
import torch

from qat.kernels import plan as planning
from qat.kernels.cubins import SOURCES
from qat.kernels.plan import Layer, every_kernel, plan, why_not

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
H100 = 132  # multiprocessors


def layer(n: int, k: int, group_size: int = 128, bits: int = 4) -> Layer:
    return Layer(n, k, bits, group_size, BF16, BF16)


@pytest.mark.parametrize(
    ("m", "kernel"), [(1, "linear_small"), (8, "linear_small"), (9, "linear_medium"), (64, "linear_medium")]
)
def test_tokens_choose_the_kernel(m, kernel):
    assert plan(layer(4096, 4096), m, H100).linear.name.startswith(f"qat::{kernel}<")


def test_names_say_types_bits_passes_and_variant():
    assert plan(layer(4096, 4096), 1, H100).linear.name == "qat::linear_small<qat::bf16, qat::bf16, qat::bf16, 4, 1, 1>"
    wide = Layer(28672, 4096, 8, 32, F16, F32)
    assert plan(wide, 1, H100).linear.name == "qat::linear_small<qat::f16, qat::f16, float, 8, 2, 2>"
    assert plan(wide, 64, H100).linear.name == "qat::linear_medium<qat::f16, qat::f16, float, 8, 2, 4>"
    int8 = Layer(28672, 4096, 4, 4096, F16, F32, True)
    assert plan(int8, 1, H100).linear.name == "qat::linear_small<qat::s8, qat::f16, float, 4, 0, 2>"
    assert plan(Layer(64, 4096, 4, 4096, F16, F32, True), 9, H100).sum_splits.name == (
        "qat::sum_splits<qat::f16, float, int, 16>"
    )


@pytest.mark.parametrize("m", [1, 7, 8, 9, 16, 17, 33, 64])
@pytest.mark.parametrize("n", [1, 16, 17, 4096, 128256])
@pytest.mark.parametrize(("k", "group_size"), [(7, 7), (32, 32), (96, 32), (4096, 128), (14336, 64), (250, 250)])
def test_a_grid_covers_all_rows_tokens_and_columns(m, n, k, group_size):
    chosen = plan(layer(n, k, group_size), m, H100)
    variant = int(re.search(r", (\d+)>$", chosen.linear.name)[1])
    rows, _, token_blocks = chosen.linear.grid
    if "small" in chosen.linear.name:
        assert rows * variant * 16 >= n > (rows - 1) * variant * 16
        assert chosen.linear.grid[1:] == (1, 1) and chosen.splits == 1
        return
    assert rows * 128 >= n > (rows - 1) * 128
    assert token_blocks * 8 * variant >= m > (token_blocks - 1) * 8 * variant
    assert 1 <= chosen.splits == chosen.linear.grid[1] <= -(-k // 64)
    assert (chosen.sum_splits is None) == (chosen.splits == 1)
    if chosen.sum_splits is not None:
        assert chosen.sum_splits.grid[0] * 256 >= m * n


def test_k_is_split_until_the_device_is_full_and_no_further():
    assert plan(layer(4096, 4096), 64, H100).splits == 4  # 32 blocks of 128 rows, 132 multiprocessors
    assert plan(layer(28672, 4096), 64, H100).splits == 1
    assert plan(layer(128, 1024), 64, H100).splits == 2  # shorter splits only fill their pipeline


def test_a_plan_names_only_kernels_that_are_compiled_in_the_tests():
    known = set(every_kernel())
    assert len(known) == len(every_kernel()) == 182
    for m in (1, 8, 9, 20, 64):
        for n in (16, 100000):
            for given in (
                layer(n, 4096, 32),
                layer(n, 96, 32, 8),
                layer(n, 4096),
                layer(n, 77, 77),
                *(Layer(n, 4096, 4, group_size, BF16, F32, True) for group_size in (32, 64, 4096)),
                Layer(n, 4096, 8, 4096, F16, F16, True),
            ):
                chosen = plan(given, m, H100)
                named = {chosen.linear.name, planning.repack_launch(given).name}
                if not given.int8_input:
                    named.add(planning.dequantize_launch(given).name)
                assert named | ({chosen.sum_splits.name} if chosen.sum_splits else set()) <= known


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ((4, 128, 256, BF16, False, 0), None),
        ((8, 32, 96, F16, False, 0), None),
        ((4, 77, 77, F16, False, 0), None),
        ((4, 128, 256, BF16, True, 0), "asymmetric weights"),
        ((4, 128, 256, BF16, False, 8), None),
        ((4, 256, 256, BF16, False, 4), None),
        ((8, 256, 256, BF16, False, 8), None),
        ((8, 128, 256, BF16, False, 8), "groups of 128 in 8-bit weights with 8-bit activations"),
        ((8, 65536, 65536, BF16, False, 8), "8-bit activations of 65536 inputs"),
        ((3, 128, 256, BF16, False, 0), "3-bit weights"),
        ((4, 128, 256, F32, False, 0), "activations in float32"),
        ((4, 16, 256, BF16, False, 0), "groups of 16"),
        ((4, 96, 192, BF16, False, 0), "groups of 96"),
    ],
)
def test_what_no_kernel_computes_is_named(given, reason):
    assert why_not(*given) == reason


def test_constants_are_those_of_the_headers():
    text = "".join(path.read_text() for path in sorted(SOURCES.glob("*.cuh")))
    for name in (
        "TILE_N",
        "TILE_K",
        "SMALL_TOKENS",
        "MEDIUM_STAGES",
        "DEQUANTIZE_WARPS",
        "REPACK_THREADS",
        "SUM_THREADS",
    ):
        (value,) = re.findall(rf"\b{name} = (\d+)[,;]", text)
        assert int(value) == getattr(planning, name), name
    (warps, rows) = re.search(r"MEDIUM_WARPS = (\d+), MEDIUM_R = (\d+)", text).groups()
    assert planning.MEDIUM_THREADS == 32 * int(warps)
    assert planning.MEDIUM_ROW_TILES == int(warps) * int(rows)
    assert planning.QUANTIZE_THREADS == 32 * int(re.search(r"QUANTIZE_WARPS = (\d+)", text)[1])
    assert planning.SMALL_THREADS == 32 * int(re.search(r"SMALL_WARPS = (\d+)", text)[1])


def test_any_number_of_tokens_is_multiplied_where_activations_are_int8():
    chosen = plan(Layer(4096, 4096, 8, 4096, BF16, BF16, True), 300, H100)
    assert chosen.linear.name == "qat::linear_medium<qat::s8, qat::bf16, qat::bf16, 8, 0, 8>"
    assert chosen.linear.grid == (32, 1, 5)
