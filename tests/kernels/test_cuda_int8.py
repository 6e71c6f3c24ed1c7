"""W8A8 and W4A8 on the emulator, and the epilogues of all linear kernels, bit for bit."""

from dataclasses import replace
from itertools import cycle, product
from random import Random

import pytest
import torch
from emulator import MEDIUM, ORDERS, SMALL, Case, Emulator, why_no_emulator
from test_cuda_kernels import MEDIUM_SHAPES, SMALL_SHAPES, failures

from qat.functional import dequantize, dynamic_scale, quantize
from qat.kernels import reference
from qat.kernels.reference import input_spec
from qat.packing import pack

pytestmark = pytest.mark.skipif(why_no_emulator() is not None, reason=str(why_no_emulator()))

# Every width, result type and number of passes; the types of scales take turns.
INSTANCES = [
    ("f16", "f16", 8, 0),
    ("bf16", "float", 8, 0),
    ("f16", "float", 4, 0),
    ("bf16", "bf16", 4, 0),
    ("f16", "f16", 4, 1),
    ("bf16", "float", 4, 1),
    ("f16", "float", 4, 2),
    ("bf16", "bf16", 4, 2),
]
DEFINE = ["INSTANCES=" + " ".join(f"X(s8, {t}, {s}, {bits}, {passes})" for t, s, bits, passes in INSTANCES)]
# A channel of every length: tails of 16 bytes, of a tile, of what is requested ahead; and more than 64 tokens.
MORE_SMALL_SHAPES = [(8, 33, 72, 72), (5, 20, 16, 16), (3, 34, 1095, 1095), (4, 18, 160, 32)]
MORE_MEDIUM_SHAPES = [(70, 30, 200, 200, 1), (12, 132, 1033, 1033, 3), (10, 21, 416, 32, 2)]


def every_case() -> list[Case]:
    """Each shape that an instance computes; R and NT take turns, and what else can be is drawn."""
    draw, cases = Random(1), []
    epilogues = {key: cycle(["swiglu", "residual", ""]) for key in product((SMALL, MEDIUM), INSTANCES)}
    for kernel, shapes, variants in (
        (SMALL, SMALL_SHAPES + MORE_SMALL_SHAPES, (1, 2)),
        (MEDIUM, MEDIUM_SHAPES + MORE_MEDIUM_SHAPES, (2, 4, 8)),
    ):
        for (m, n, k, group_size, *splits), instance in product(shapes, INSTANCES):
            dtype, scale, bits, passes = instance
            case = Case(kernel, 1, dtype, bits, group_size, m, n, k, *splits, int8_input=True)
            if case.layer.passes != passes:
                continue
            variant = draw.choice(variants[:2] if passes == 2 else variants)
            epilogue = next(epilogues[kernel, instance])
            bias, touch_start = (draw.random() < 0.5 for _ in range(2))
            case = replace(case, variant=variant, bias=bias, touch_start=touch_start, epilogue=epilogue)
            cases.append(replace(case, float_scale=scale == "float", n=n + n % 2 if epilogue == "swiglu" else n))
    return cases


CASES = every_case()


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return Emulator(tmp_path_factory.mktemp("int8") / "all", checked=False, define=DEFINE)


def test_every_instance_and_epilogue_has_cases():
    assert len(set(CASES)) == len(CASES) > 90
    seen = {(c.kernel, c.dtype, c.bits, c.layer.passes, c.epilogue) for c in CASES}
    assert len(seen) == 2 * 8 * 3


def test_int8_kernels_equal_the_formula_bit_for_bit_in_every_order_of_threads(plain):
    assert failures(plain.run(CASES, ORDERS)) == []


def test_int8_kernels_touch_no_memory_wrongly_and_have_no_races(tmp_path):
    emulator = Emulator(tmp_path / "all", checked=True, define=DEFINE)
    for turn, order in enumerate(ORDERS):
        assert failures(emulator.run(CASES[turn :: len(ORDERS)], [order])) == []


@pytest.mark.parametrize(("bits", "group_size"), [(8, 256), (4, 256), (4, 64), (4, 32)])
def test_the_formula_is_the_references_but_for_the_rounding_of_sums(bits, group_size):
    case = Case(SMALL, 1, "f16", bits, group_size, 5, 24, 256, int8_input=True, float_scale=True)
    given, spec = case.operands, input_spec(8, "half_range")
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(0))
    scale = dynamic_scale(x, spec)
    mine = replace(given, x=quantize(x, scale, spec).to(torch.int8), token_scale=scale[:, 0]).integer_linear(case)
    packed, bias = pack(given.codes, bits), given.bias.float()
    theirs = reference.packed_linear(x, packed, given.scale, None, bias, bits, group_size, 8, None, "half_range")
    # Each is within k + 3 roundings of float32 of the same exact sum, whose products are at most `size` together.
    size = (quantize(x, scale, spec) * scale).abs() @ dequantize(given.codes, given.scale).abs().T + bias.abs()
    assert ((mine - theirs).abs() <= 2 * (256 + 3) * 2.0**-24 * size).all()
