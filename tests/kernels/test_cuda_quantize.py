"""Quantization of tokens, alone and behind RMSNorm, on the emulator against `qat.functional` and transformers' norm."""

import shutil
import struct
import subprocess
from dataclasses import dataclass

import pytest
import torch
from emulator import DTYPES, KERNELS, ORDERS, Emulator, why_no_emulator
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from qat.functional import dynamic_scale, quantize
from qat.kernels.reference import input_spec
from qat.kernels.tiles import padded_codes, padded_rows

pytestmark = pytest.mark.skipif(why_no_emulator() is not None, reason=str(why_no_emulator()))

EPS = 1e-5


@dataclass(frozen=True)
class Case:
    """m tokens of k values; `static` is a given scale; `kind` what the values are like."""

    norm: bool
    dtype: str
    m: int
    k: int
    bits: int = 8
    rule: str = "qmax"
    static: float | None = None
    kind: str = "normal"

    @property
    def x(self) -> Tensor:
        """(m, k).  Before a norm: multiples of 1/32 below 4, whose squares float32 sums exactly in any order."""
        g = torch.Generator().manual_seed(self.k + self.m)
        x = torch.randn(self.m, self.k, generator=g)
        if self.norm:
            x = (32 * x).round().clamp(-127, 127) / 32
        if self.kind == "ties":  # absmax qmax / 4 and so a scale of 1 / 4: half of all ratios lie between two codes
            x = torch.randint(-254, 255, x.shape, generator=g) / 8
            x[:, 0] = 31.75
        x = x * {"tiny": 2.0**-24, "huge": 2.0**13}.get(self.kind, 1)
        if self.kind == "zero":
            x[:] = 0
        if self.kind == "nan":
            x[0, -1] = float("nan")
        return x.to(DTYPES[self.dtype])

    @property
    def weight(self) -> Tensor:
        """Of the norm, (k,)."""
        return (1 + 0.3 * torch.randn(self.k, generator=torch.Generator().manual_seed(self.k))).to(DTYPES[self.dtype])

    def expected(self) -> tuple[Tensor, Tensor]:
        """codes (m, k rounded up to 16), int8, and scales (m,)."""
        spec, x = input_spec(self.bits, self.rule), self.x
        if self.norm:
            norm = LlamaRMSNorm(self.k, EPS).to(x.dtype)
            norm.weight.data = self.weight
            x = norm(x).detach()
        scale = dynamic_scale(x, spec) if self.static is None else torch.full((self.m, 1), self.static)
        return padded_codes(quantize(x, scale, spec).nan_to_num(0).to(torch.int8)), scale[:, 0]

    def parts(self, number: int, order: str):
        """The bytes that run_quantize.cpp reads."""
        fields = (number, self.norm, self.dtype == "bf16", self.m, self.k, self.static is not None)
        fields += (2 ** (self.bits - 1) - 1, self.rule == "half_range", ORDERS.index(order), number, number % 2)
        yield struct.pack("11i", *fields)
        yield struct.pack("f", EPS)
        yield padded_rows(self.x).view(torch.uint8).numpy().tobytes()
        if self.norm:
            yield padded_rows(self.weight[None]).view(torch.uint8).numpy().tobytes()
        if self.static is not None:
            yield struct.pack("f", self.static)


# 4096 values are one chunk for each thread.
SIZES = [(1, 4096), (3, 1), (2, 17), (5, 250), (1, 4104), (2, 9000)]
CASES = [
    Case(norm, dtype, m, k) for norm in (False, True) for dtype in DTYPES for m, k in SIZES if k < 8192 or not norm
]
for dtype in DTYPES:
    CASES += [
        Case(False, dtype, 2, 250, bits, rule) for bits, rule in [(4, "qmax"), (8, "half_range"), (5, "half_range")]
    ]
    CASES += [Case(True, dtype, 2, 250, rule="half_range"), Case(False, dtype, 3, 90, static=0.01)]
    CASES += [Case(False, dtype, 2, 200, kind=kind) for kind in ("ties", "tiny", "zero", "nan")]
    CASES += [Case(True, dtype, 2, 200, kind=kind) for kind in ("zero", "nan")]
CASES += [Case(False, "bf16", 2, 64, kind="huge"), Case(False, "f16", 2, 64, static=2.0**-60)]


def wrong(case: Case, error: str, codes: Tensor, scale: Tensor) -> str:
    """What is wrong with a result, "" if nothing."""
    expected_codes, expected_scale = case.expected()
    if error:
        return error
    if not torch.equal(scale.nan_to_num(-1), expected_scale.nan_to_num(-1)):
        return f"scale {scale.tolist()} instead of {expected_scale.tolist()}"
    differ = codes != expected_codes
    return f"{int(differ.sum())} of {differ.numel()} codes differ" if differ.any() else ""


def failures(emulator: Emulator, runs: list[tuple[Case, str]]) -> list[str]:
    """What went wrong, with the case."""
    given, results = emulator.folder / "cases.bin", emulator.folder / "results.bin"
    given.write_bytes(b"".join(part for i, (case, order) in enumerate(runs) for part in case.parts(i, order)))
    done = subprocess.run([emulator.program, given, results], capture_output=True, text=True, timeout=300)
    lines, found = done.stdout.splitlines(), []
    assert done.returncode == 0 and len(lines) == len(runs), f"exit {done.returncode}: {done.stderr[-2000:]}"
    with results.open("rb") as file:
        for (case, order), line in zip(runs, lines, strict=True):
            padded = -(-case.k // 16) * 16
            codes = torch.frombuffer(bytearray(file.read(case.m * padded)), dtype=torch.int8).reshape(case.m, padded)
            scale = torch.frombuffer(bytearray(file.read(4 * case.m)), dtype=torch.float32)
            if why := wrong(case, line.split(" ", 2)[2] if line.startswith("FAIL") else "", codes, scale):
                found.append(f"{case} {order}: {why}")
    return found


def test_codes_and_scales_are_the_references_bit_for_bit_in_every_order_of_threads(tmp_path):
    emulator = Emulator(tmp_path / "all", checked=False, source="run_quantize.cpp")
    assert failures(emulator, [(case, order) for case in CASES for order in ORDERS]) == []


def test_the_kernels_touch_no_memory_wrongly_and_have_no_races(tmp_path):
    emulator = Emulator(tmp_path / "all", checked=True, source="run_quantize.cpp")
    assert failures(emulator, [(case, ORDERS[i % 3]) for i, case in enumerate(CASES)]) == []


WAIT = "    griddepcontrol_wait();\n"
NORMAL = "const float normal = value_of<T>(v, i) * inverse"
BUGS = {  # a replacement, and what the emulator must say: "scale" or "codes" for a wrong result
    "missing barrier": ("    __syncthreads();\n", "", "shared byte"),
    "half a butterfly": ("distance = 16; distance", "distance = 8; distance", "scale"),
    "a warp forgotten": ("w < QUANTIZE_WARPS;", "w < QUANTIZE_WARPS - 1;", "scale"),
    "tail off by one": ("k < row_stride<T>(K) ?", "k <= row_stride<T>(K) ?", "'x'"),
    "smallest code lost": ("q < -qmax - 1 ? -qmax - 1", "q < -qmax ? -qmax", "codes"),
    "no floor": ("max_nan(div_rn(largest, divisor), floor)", "max_nan(div_rn(largest, divisor), 0 * floor)", "scale"),
    "times a reciprocal": ("i % 8), scale)", "i % 8) * div_rn(1.f, scale), 1.f)", "codes"),
    "wrong rule": ("half_range ? float(qmax) + 0.5f", "half_range ? float(qmax)", "scale"),
    "norm rounded once": ("const T normal = from_float(T(), value_of<T>(v, i) * inverse)", NORMAL, "codes"),
    "eps forgotten": ("float(K)) + eps", "float(K)) + 0 * eps", "scale"),
    "shared memory used twice": ("half_range, of_warp[1]);", "half_range, of_warp[0]);", "race"),
    "x before griddepcontrol.wait": (WAIT + "    float largest", "    float largest", "before griddepcontrol.wait"),
}


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_caught(name, tmp_path_factory):
    old, new, seen_as = BUGS[name]
    folder = tmp_path_factory.getbasetemp() / "quantize-bugs"
    mutant = folder / name.replace(" ", "-")
    folder.mkdir(exist_ok=True)
    shutil.copytree(KERNELS, mutant)
    text = (mutant / "quantize.cuh").read_text()
    assert text.count(old) == 1, f"the text to replace occurs {text.count(old)} times"
    (mutant / "quantize.cuh").write_text(text.replace(old, new))
    emulator = Emulator(mutant, checked=True, kernels=mutant, source="run_quantize.cpp")
    seen = failures(emulator, [(case, ORDERS[i % 3]) for i, case in enumerate(CASES)])
    assert any(seen_as in wrong.split(": ", 1)[1] for wrong in seen), seen[:3]
