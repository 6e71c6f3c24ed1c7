"""The CUDA kernels, whole and unchanged, in the emulator of `simt/` against the reference."""

from dataclasses import replace
from itertools import cycle, islice, product
from random import Random

import pytest
from emulator import DEQUANTIZE, MEDIUM, ORDERS, SMALL, Case, Emulator, why_no_emulator

from qat.functional import dequantize
from qat.kernels import packed_linear
from qat.packing import pack

pytestmark = pytest.mark.skipif(why_no_emulator() is not None, reason=str(why_no_emulator()))

# (m, n, k, group_size): tails of every kind.  512 columns are one round of the 8 warps of linear_small, 2048 all that
# it requests ahead; linear_medium has 4 stages of 64 columns and 128 rows.
SMALL_SHAPES = [
    (1, 16, 32, 32),
    (8, 5, 96, 32),
    (3, 37, 672, 32),
    (2, 16, 64, 64),
    (8, 33, 320, 64),
    (1, 40, 2432, 64),
    (5, 17, 128, 128),
    (7, 1, 1152, 128),
    (6, 20, 2304, 128),
    (1, 48, 7, 7),
    (4, 31, 129, 129),
    (8, 50, 250, 250),
    (1, 18, 4168, 4168),
]
# ... and splits of k
MEDIUM_SHAPES = [
    (9, 16, 32, 32, 1),
    (16, 130, 352, 32, 2),
    (27, 5, 480, 32, 1),
    (11, 33, 64, 64, 1),
    (32, 129, 704, 64, 3),
    (19, 40, 320, 64, 5),
    (64, 17, 256, 128, 2),
    (13, 144, 640, 128, 1),
    (24, 48, 7, 7, 1),
    (49, 31, 451, 451, 4),
    (16, 50, 1100, 1100, 2),
]


def every_case() -> list[Case]:
    """Each shape, type and width; R and NT take turns, and what else can be is drawn."""
    draw, draw_epilogue = Random(0), Random(1)
    cases = []
    for kernel, shapes, variants in (
        (SMALL, SMALL_SHAPES, (1, 2)),
        (MEDIUM, MEDIUM_SHAPES, (2, 4, 8)),
        (DEQUANTIZE, SMALL_SHAPES, (0,)),
    ):
        turn = cycle(variants)
        for (m, n, k, group_size, *splits), dtype, bits in product(shapes, ["f16", "bf16"], [4, 8]):
            for variant in islice(turn, min(2, len(variants))):
                if group_size == 32 and variant == 8:
                    variant = 4  # what plan.token_tiles does
                bias, float_scale, touch_start = (draw.random() < 0.5 for _ in range(3))
                epilogue = draw_epilogue.choice(["", "residual", "swiglu"] if n % 2 == 0 else ["", "residual"])
                case = Case(kernel, variant, dtype, bits, group_size, m, n, k, *splits)
                case = replace(case, bias=bias, float_scale=float_scale, touch_start=touch_start)
                cases.append(case if kernel == DEQUANTIZE else replace(case, epilogue=epilogue))
    return cases


CASES = every_case()


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return Emulator(tmp_path_factory.mktemp("emulator") / "all", checked=False)


def failures(runs) -> list[str]:
    return [f"{case} {order}: {wrong}" for case, order, outcome in runs if (wrong := outcome.wrong(case))]


def test_there_are_more_than_200_cases():
    assert len(CASES) > 200 and len(set(CASES)) == len(CASES)


def test_kernels_equal_the_reference_bit_for_bit_in_every_order_of_threads(plain):
    assert failures(plain.run(CASES, ORDERS)) == []


def test_kernels_touch_no_memory_wrongly_and_have_no_races(tmp_path):
    emulator = Emulator(tmp_path / "all", checked=True)
    for turn, order in enumerate(ORDERS):
        assert failures(emulator.run(CASES[turn :: len(ORDERS)], [order])) == []


GENERAL = [
    Case(kernel, variant, dtype, bits, group_size, m, 37, 1152, splits, general=True)
    for kernel, variant, m, splits in [(SMALL, 1, 5, 1), (SMALL, 2, 8, 1), (MEDIUM, 2, 11, 1), (MEDIUM, 4, 23, 3)]
    for dtype, bits, group_size in product(["f16", "bf16"], [4, 8], [32, 128, 1152])
]


def test_real_valued_layers_stay_within_the_rounding_of_sums_and_results(plain):
    # u is half a unit in the last place of the type, e that of float32, A = sum |w x| + |bias|.  The kernel makes at
    # most 2 k float operations (k sums in the MMA, the groups' scaling and sums, warps or splits, the bias), each
    # wrong by e times a partial sum that is at most A; then it rounds once to the type.
    # The reference rounds each weight first, which may be another u A, sums in float32 too, and may round before it
    # adds the bias.
    e = 2.0**-24
    for case, _, outcome in plain.run(GENERAL, ["random"]):
        assert outcome.error == "", case
        given, u = case.operands, {"f16": 2.0**-11, "bf16": 2.0**-8}[case.dtype]
        weight, x, bias = dequantize(given.codes, given.scale).double(), given.x.double(), given.bias.double()
        exact, size = x @ weight.T + bias, x.abs() @ weight.abs().T + bias.abs()
        got, sums = outcome.result.double(), 2 * case.k * e * size
        assert ((got - exact).abs() <= sums + u * (exact.abs() + sums)).all(), case
        packed = pack(given.codes, case.bits)
        reference = packed_linear(given.x, packed, given.scale, None, given.bias, case.bits, case.group_size)
        apart = u * size + 2 * sums + 3 * u * (exact.abs() + bias.abs())
        assert ((got - reference.double()).abs() <= apart).all(), case
