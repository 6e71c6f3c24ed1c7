"""The CUDA kernels, whole and unchanged, in the emulator of `simt/` against the reference."""

from dataclasses import replace
from itertools import cycle, islice, product
from random import Random

import pytest
from emulator import DEQUANTIZE, MEDIUM, ORDERS, SMALL, Case, Emulator, why_no_emulator

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
    draw = Random(0)
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
                case = Case(kernel, variant, dtype, bits, group_size, m, n, k, *splits)
                cases.append(replace(case, bias=bias, float_scale=float_scale, touch_start=touch_start))
    return cases


CASES = every_case()


def failures(runs) -> list[str]:
    return [f"{case} {order}: {wrong}" for case, order, outcome in runs if (wrong := outcome.wrong(case))]


def test_there_are_more_than_200_cases():
    assert len(CASES) > 200 and len(set(CASES)) == len(CASES)


def test_kernels_equal_the_reference_bit_for_bit_in_every_order_of_threads(tmp_path):
    assert failures(Emulator(tmp_path / "all", checked=False).run(CASES, ORDERS)) == []


def test_kernels_touch_no_memory_wrongly_and_have_no_races(tmp_path):
    emulator = Emulator(tmp_path / "all", checked=True)
    for turn, order in enumerate(ORDERS):
        assert failures(emulator.run(CASES[turn :: len(ORDERS)], [order])) == []
