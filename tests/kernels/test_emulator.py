"""The emulator finds bugs: one at a time is planted into a copy of the real kernels, and must be caught."""

import shutil
from dataclasses import dataclass

import pytest
from emulator import DEQUANTIZE, KERNELS, MEDIUM, ORDERS, SMALL, Case, Emulator, why_no_emulator
from test_cuda_int8 import CASES as INT8_CASES
from test_cuda_kernels import CASES

pytestmark = pytest.mark.skipif(why_no_emulator() is not None, reason=str(why_no_emulator()))


@dataclass(frozen=True)
class Bug:
    """A replacement in one file; where it shows: a kernel, an activation type, a width, passes over a tile."""

    name: str
    file: str
    old: str
    new: str
    kernel: int = SMALL
    dtype: str = "bf16"
    bits: int = 4
    passes: int = 1
    int8: bool = False
    seen_as: str = ""  # part of what the emulator must say; "differ": a wrong result

    @property
    def cases(self) -> list[Case]:
        """Those of the real kernels' that run the instance it is planted in."""
        mine = (self.kernel, self.dtype, self.bits, self.passes, False)
        cases = INT8_CASES if self.int8 else CASES
        return [c for c in cases if (c.kernel, c.dtype, c.bits, c.layer.passes, c.float_scale) == mine]


def layout(*args, **where) -> Bug:
    return Bug(args[0], "layout.cuh", *args[1:], **where)


def repack(*args, **where) -> Bug:
    return Bug(args[0], "repack.cuh", *args[1:], **where)


def small(*args, **where) -> Bug:
    return Bug(args[0], "linear_small.cuh", *args[1:], **where)


def medium(*args, **where) -> Bug:
    return Bug(args[0], "linear_medium.cuh", *args[1:], kernel=MEDIUM, **where)


def int8(*args, bits=8, passes=0, dtype="f16", **where) -> Bug:
    return Bug(*args, int8=True, bits=bits, passes=passes, dtype=dtype, **where)


def dense(*args, **where) -> Bug:
    return Bug(args[0], "dequantize.cuh", *args[1:], kernel=DEQUANTIZE, **where)


WAIT = "        cp_async_wait_group<MEDIUM_STAGES - 2>();\n"
LANDED = (
    "        __syncthreads();  // every thread's part of this stage has landed, and nobody still reads the one before\n"
)
BUGS = [
    layout("swapped nibbles", "w.word[s] >> (4 * i)", "w.word[s] >> (4 * (i ^ 2))", seen_as="differ"),
    layout("swapped nibbles f16", "? w.word[s] : w.word[s] >> 8", "? w.word[s] >> 8 : w.word[s]", dtype="f16"),
    layout("wrong magic constant", "0xc308c308u", "0xc307c307u", seen_as="differ"),
    layout("int8 sign lost", "codes & 0xff80ff80u", "codes & 0xff00ff00u", bits=8, seen_as="differ"),
    layout("int8 bytes swapped", "0x4140u : 0x4342u", "0x4041u : 0x4243u", bits=8, seen_as="differ"),
    layout("wrong scale of a half tile", "2 * k_tile + pass", "2 * k_tile", passes=2, seen_as="differ"),
    layout("wrong scale of a tile", "k_tile / tiles_per_group", "(k_tile + 1) / tiles_per_group"),
    layout("passes swapped", ">> 1 == pass", ">> 1 != pass", passes=2, seen_as="differ"),
    layout("mma without a lane", "s) mma_m16n8k16(", "s) if (threadIdx.x & 31) mma_m16n8k16(", seen_as="deadlock"),
    repack("rows g and g + 8 swapped", "spread(low) | spread(high) << 4", "spread(high) | spread(low) << 4"),
    repack("k tail drops a code", "1u << BITS * left", "1u << BITS * (left - 1)", seen_as="differ"),
    repack("k tail keeps q = -8", " | (ZEROS & ~keep)", "", kernel=DEQUANTIZE, seen_as="differ"),
    repack("n tail off by one", "n >= N ||", "n > N ||", seen_as="reads 'packed'"),
    small("wrong lane", "k_tile * TILE_K + 16 * t, stride", "k_tile * TILE_K + 16 * (g & 3), stride"),
    small("wrong scale rows", "to_float(s[g]), to_float(s[g + 8])", "to_float(s[g + 8]), to_float(s[g])"),
    small("wrong result column", "[2 * t + (i & 1)] = total", "[2 * t + (i >> 1)] = total"),
    small("missing __syncthreads", "    __syncthreads();\n", "", seen_as="shared byte"),
    small("__syncthreads for some", "    __syncthreads();", "    if (warp < 4) __syncthreads();"),
    small("m tail off by one, read", "if (m < M &&", "if (m <= M &&", seen_as="reads 'x'"),
    small("m tail off by one, write", "m >= M) continue", "m > M) continue", seen_as="writes 'y'"),
    small("n tail off by one, write", "if (n >= N ||", "if (n > N ||"),
    small("k tail off by one, read", "k + LOAD<In> * i < stride", "k + LOAD<In> * i <= stride", seen_as="'x'"),
    small("weights past k", "if (k_tile < k_tiles && first", "if (first", seen_as="reads 'tiles'"),
    small("weights past n", " && first_row_tile + r < row_tiles)", ")", seen_as="reads 'tiles'"),
    small("wrong tile ahead", "k_tile + DEPTH * SMALL", "k_tile + (DEPTH - 1) * SMALL", seen_as="differ"),
    small("x of the tile before", "now = next;", "now = d ? now : next;", seen_as="differ"),
    small("x before griddepcontrol.wait", "    griddepcontrol_wait();\n", "", seen_as="before griddepcontrol.wait"),
    small("shared index out of range", "part[SMALL_WARPS][R * TILE_N][", "part[SMALL_WARPS][R * TILE_N - 1]["),
    small(
        "write to an input",
        "        Sum sum = 0;",
        "        const_cast<S*>(scale)[0] = S(); Sum sum = 0;",
        seen_as="writes 'scale'",
    ),
    medium("missing cp.async wait", WAIT, "", seen_as="shared byte"),
    medium("cp.async wait too loose", "MEDIUM_STAGES - 2>()", "MEDIUM_STAGES - 1>()", seen_as="shared byte"),
    medium("missing barrier after the wait", LANDED, "", seen_as="shared byte"),
    medium("barrier before the wait", WAIT + LANDED, LANDED + WAIT, seen_as="shared byte"),
    medium(
        "refill of the stage in use", "stages[(i + MEDIUM_STAGES - 1) % MEDIUM_STAGES]", "stages[i % MEDIUM_STAGES]"
    ),
    medium("missing commit", "        cp_async_commit();\n\n        const", "\n        const"),
    medium("result over stages in use", "    __syncthreads();  // the stages have been read\n", "", seen_as="race"),
    medium("result read too early", "    __syncthreads();\n", "", seen_as="shared byte"),
    medium(
        "a tile in no split",
        "end = int(i64(split + 1) * k_tiles / splits)",
        "end = int(k_tiles / splits * (split + 1))",
    ),
    medium("splits on one another", "(i64(split) * M + m) * N + n", "i64(m) * N + n"),
    medium("a split not added", "int split = 1; split", "int split = 2; split", seen_as="differ"),
    medium("x before griddepcontrol.wait", "stages[i]);\n    griddepcontrol_wait();", "stages[i]);"),
    medium("misaligned rows", "sizeof(In) == 1 ? 0 : 8", "sizeof(In) == 1 ? 0 : 4"),
    medium("too little shared memory", "? MEDIUM_STAGES * sizeof", "? (MEDIUM_STAGES - 1) * sizeof"),
    medium("wrong warp's tile", "stage.tile[MEDIUM_R * warp + r]", "stage.tile[MEDIUM_R * r + warp]", seen_as="differ"),
    medium("token tail", "m < M && k < stride", "m <= M && k < stride", seen_as="reads 'x'"),
    int8(
        "int8 steps mixed",
        "multiply.cuh",
        "total, tile.a[p], x.word[2 * p], x.word[2 * p + 1]",
        "total, tile.a[p], x.word[p], x.word[p + 2]",
    ),
    int8(
        "int8 mma without a lane",
        "multiply.cuh",
        "++p) mma_m16n8k32(total",
        "++p) if (threadIdx.x & 31) mma_m16n8k32(total",
        seen_as="deadlock",
    ),
    int8(
        "int8 k tail off by one",
        "linear_small.cuh",
        "k + LOAD<In> * i < stride",
        "k + LOAD<In> * i <= stride",
        seen_as="'x'",
    ),
    int8(
        "int8 wrong lane",
        "linear_small.cuh",
        "k_tile * TILE_K + 16 * t, stride",
        "k_tile * TILE_K + 16 * (g & 3), stride",
    ),
    int8("int8 missing __syncthreads", "linear_small.cuh", "    __syncthreads();\n", "", seen_as="shared byte"),
    int8("int8 missing cp.async wait", "linear_medium.cuh", WAIT, "", kernel=MEDIUM, seen_as="shared byte"),
    int8("int8 missing barrier after the wait", "linear_medium.cuh", LANDED, "", kernel=MEDIUM, seen_as="shared byte"),
    int8(
        "int8 token tail",
        "linear_medium.cuh",
        "m < M && k < stride",
        "m <= M && k < stride",
        kernel=MEDIUM,
        seen_as="'x'",
    ),
    int8(
        "int8 split twice",
        "linear_medium.cuh",
        "int split = 1; split",
        "int split = 0; split",
        kernel=MEDIUM,
        seen_as="differ",
    ),
    int8("int8 scale index off", "epilogue.cuh", "to_float(scale[n])", "to_float(scale[n + 1])"),
    int8(
        "token scale index off",
        "epilogue.cuh",
        "1.f / UNIT)), ld_global(token_scale + m))",
        "1.f / UNIT)), ld_global(token_scale + m + 1))",
    ),
    int8(
        "gate and up swapped",
        "epilogue.cuh",
        "silu(gate)) * to_float(up)",
        "silu(up)) * to_float(gate)",
        seen_as="differ",
    ),
    int8("up with the scale of gate", "epilogue.cuh", "sum_of(1), m, n + 1)", "sum_of(1), m, n)", seen_as="differ"),
    int8("residual of another token", "epilogue.cuh", "residual + at", "residual + n", seen_as="differ"),
    int8(
        "linear not rounded before the residual",
        "epilogue.cuh",
        "to_float(ld_global(residual + at)) + to_float(out)",
        "to_float(ld_global(residual + at)) + value(sum_of(0), m, n) + (bias ? to_float(bias[n]) : 0)",
        seen_as="differ",
    ),
    int8(
        "int4 rows swapped for s8",
        "multiply.cuh",
        "i & 1 ? w.word[i >> 1] :",
        "!(i & 1) ? w.word[i >> 1] :",
        bits=4,
        dtype="bf16",
    ),
    int8("int4 bytes in plain order", "multiply.cuh", "0x3120u", "0x3210u", bits=4, dtype="bf16", seen_as="differ"),
    int8(
        "int4 offset kept",
        "multiply.cuh",
        "0xf0f0f0f0u, 0x80808080u",
        "0xf0f0f0f0u, 0",
        bits=4,
        dtype="bf16",
        seen_as="differ",
    ),
    int8(
        "unit forgotten",
        "epilogue.cuh",
        "mul_rn(to_float(scale[n]), 1.f / UNIT)",
        "to_float(scale[n])",
        bits=4,
        dtype="bf16",
    ),
    int8("wrong magic sum", "multiply.cuh", "12582912.f", "12582911.f", bits=4, passes=1, seen_as="differ"),
    int8(
        "scales of rows g and g + 8 mixed",
        "multiply.cuh",
        "i < 2 ? scale_g : scale_g8",
        "i & 1 ? scale_g : scale_g8",
        bits=4,
        passes=1,
    ),
    int8(
        "int8 passes swapped",
        "multiply.cuh",
        ">> 1 == pass",
        ">> 1 != pass",
        bits=4,
        passes=2,
        dtype="bf16",
        kernel=MEDIUM,
    ),
    dense("rows g and g + 8 mixed", "half + 2 * (i & 1)", "2 * half + (i & 1)", seen_as="differ"),
    dense("k tail off by one", "k + 8 * i < row_stride<T>(K)", "k + 8 * i <= row_stride<T>(K)"),
]


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name.replace(" ", "-"))
def test_a_planted_bug_is_caught(bug, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "bugs"
    folder.mkdir(exist_ok=True)
    mutant = folder / f"{BUGS.index(bug)}"
    shutil.copytree(KERNELS, mutant)
    text = (mutant / bug.file).read_text()
    assert text.count(bug.old) == 1, f"the text to replace occurs {text.count(bug.old)} times"
    (mutant / bug.file).write_text(text.replace(bug.old, bug.new))
    define = [
        f"INSTANCES=X({'s8' if bug.int8 else bug.dtype}, {bug.dtype}, {bug.dtype}, {bug.bits}, {bug.passes})",
        f"ONLY={bug.kernel}",
    ]
    emulator = Emulator(mutant, checked=True, kernels=mutant, define=define)
    seen = [wrong for case, _, outcome in emulator.run(bug.cases, ORDERS) if (wrong := outcome.wrong(case))]
    assert seen and any(bug.seen_as in wrong for wrong in seen), seen[:3]
