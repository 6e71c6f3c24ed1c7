"""Builds the SIMT emulator of `simt/` with g++ and runs the CUDA kernels in it on cases made here.

Weights, activations and scales of a case are small integers and powers of two, so that every partial sum is exact in
float32 in any order (`Case.make` asserts it) and the kernels must equal the reference bit for bit.
"""

import shutil
import struct
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qat.functional import dequantize
from qat.kernels import reference
from qat.kernels.plan import Layer
from qat.kernels.tiles import padded_rows, tile_scale
from qat.packing import pack

SIMT = Path(__file__).parent / "simt"
KERNELS = Path(reference.__file__).parent / "csrc" / "cuda"
# -fno-strict-aliasing: kernels look at memory through pointers of other types, which nvcc allows.
FLAGS = (
    "-std=c++17 -O1 -g1 -DQAT_EMULATE -U_FORTIFY_SOURCE -fno-exceptions -fno-strict-aliasing -ffp-contract=off "
    "-Wall -Werror -Wno-unknown-pragmas"
).split()
CHECKED = (
    "-fsanitize=thread,bounds,shift,alignment -fsanitize-undefined-trap-on-error "
    "--param tsan-instrument-func-entry-exit=0"
).split()
ORDERS = ["forward", "reverse", "random"]
SMALL, MEDIUM, DEQUANTIZE = range(3)
DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16}


def why_no_emulator() -> str | None:
    """The reason to skip, or None."""
    return None if shutil.which("g++") else "no g++ to build the emulator with"


@dataclass(frozen=True)
class Case:
    """One kernel on one layer.  `variant` is R of linear_small or NT of linear_medium."""

    kernel: int
    variant: int
    dtype: str
    bits: int
    group_size: int
    m: int
    n: int
    k: int
    splits: int = 1
    bias: bool = True
    float_scale: bool = False
    touch_start: bool = False
    general: bool = False

    def __str__(self) -> str:
        name = ["small-R", "medium-NT", "dequantize-"][self.kernel] + str(self.variant)
        return f"{name}-{self.dtype}-w{self.bits}-g{self.group_size}-{self.m}x{self.n}x{self.k}-splits{self.splits}"

    @property
    def layer(self) -> Layer:
        """What the kernel is told."""
        dtype = DTYPES[self.dtype]
        return Layer(self.n, self.k, self.bits, self.group_size, dtype, torch.float32 if self.float_scale else dtype)

    @cached_property
    def operands(self) -> "Operands":
        """Random, the same every time."""
        return Operands.general(self) if self.general else Operands.exact(self)


@dataclass(frozen=True)
class Operands:
    """codes (n, k); scale (n, groups) float32; x (m, k) and bias (n,), 16-bit."""

    codes: Tensor
    scale: Tensor
    x: Tensor
    bias: Tensor | None

    @classmethod
    def exact(cls, case: Case) -> "Operands":
        """Whose products and sums are exact: multiples of 2^-5 below 2^24 of them."""
        g = torch.Generator().manual_seed(case.m * 1000003 + case.n * 1009 + case.k + case.bits)
        half, dtype = 2 ** (case.bits - 1), DTYPES[case.dtype]
        codes = torch.randint(-half, half, (case.n, case.k), generator=g, dtype=torch.int32)
        scale = 2.0 ** -torch.randint(3, 6, (case.n, case.layer.groups), generator=g).float()
        x = torch.randint(-6, 7, (case.m, case.k), generator=g).to(dtype)
        bias = torch.randint(-20, 21, (case.n,), generator=g).to(dtype) if case.bias else None
        worst = (x.float().abs() @ dequantize(codes, scale).abs().T).max() + 20
        assert worst * 2**5 < 2**24, "a partial sum could be rounded"
        return cls(codes, scale, x, bias)

    @classmethod
    def general(cls, case: Case) -> "Operands":
        """As in a model: normal activations, scales of any mantissa that the type holds."""
        g = torch.Generator().manual_seed(case.n)
        half, dtype = 2 ** (case.bits - 1), DTYPES[case.dtype]
        codes = torch.randint(-half, half, (case.n, case.k), generator=g, dtype=torch.int32)
        scale = (0.05 * torch.rand(case.n, case.layer.groups, generator=g) + 0.01) / half
        x = torch.randn(case.m, case.k, generator=g).to(dtype)
        bias = torch.randn(case.n, generator=g).to(dtype) if case.bias else None
        return cls(codes, scale.to(case.layer.scale_dtype).float(), x, bias)

    def stored_scale(self, case: Case) -> Tensor:
        """In a type that makes the run-time scales the case's."""
        return self.scale if case.float_scale else self.scale.to(DTYPES[case.dtype])

    def expected(self, case: Case) -> Tensor:
        """What the reference computes in float32, rounded once to the type; the dense weight for `dequantize`."""
        dtype = DTYPES[case.dtype]
        if case.kernel == DEQUANTIZE:
            return padded_rows(dequantize(self.codes, self.scale).to(dtype))
        packed = pack(self.codes, case.bits)
        bias = None if self.bias is None else self.bias.float()
        out = reference.packed_linear(
            self.x.float(), packed, self.scale, None, bias, case.bits, case.group_size, 0, None, "qmax"
        )
        return out.to(dtype)


@dataclass(frozen=True)
class Outcome:
    """What the emulator objected to ("" if nothing), and the kernel's result."""

    error: str
    result: Tensor

    def wrong(self, case: Case) -> str:
        """What is wrong with it, "" if nothing."""
        expected = case.operands.expected(case)
        if self.error:
            return self.error
        differs = (self.result.view(torch.int16) != expected.view(torch.int16)) & ((self.result != 0) | (expected != 0))
        if not differs.any():
            return ""
        row, column = map(int, differs.nonzero()[0])
        return (
            f"{int(differs.sum())} of {differs.numel()} differ, first [{row}][{column}]: "
            f"{float(self.result[row, column])} instead of {float(expected[row, column])}"
        )


class Emulator:
    """A build of `run_cases`: of the real kernels, or of those in `kernels`."""

    def __init__(self, folder: Path, *, checked: bool, kernels: Path = KERNELS, define: Sequence[str] = ()):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.program = folder, folder / ("checked" if checked else "plain")
        engine = [_engine(folder, source) for source in ("scheduler.cpp", "memory.cpp")]
        flags = [*FLAGS, *(CHECKED if checked else []), *(f"-D{what}" for what in define), f"-I{kernels}", f"-I{SIMT}"]
        # Linked without -fsanitize: memory.cpp answers the sanitizer's calls.
        _compile([*flags, "-c", str(SIMT / "run_cases.cpp"), "-o", f"{self.program}.o"])
        _compile([f"{self.program}.o", *map(str, engine), "-o", str(self.program)])

    def run(self, cases: Iterable[Case], orders: Sequence[str], timeout: float = 300) -> Iterator[tuple[Any, ...]]:
        """Runs each case in each order; yields (case, order, Outcome)."""
        runs = [(case, order) for case in cases for order in orders]
        given, results = self.folder / "cases.bin", self.folder / "results.bin"
        with given.open("wb") as file:
            for number, (case, order) in enumerate(runs):
                for part in _parts(number, case, order):
                    file.write(part)
        done = subprocess.run([self.program, given, results], capture_output=True, text=True, timeout=timeout)
        lines = done.stdout.splitlines()
        assert done.returncode == 0 and len(lines) == len(runs), f"exit {done.returncode}: {done.stderr[-2000:]}"
        with results.open("rb") as file:
            for (case, order), line in zip(runs, lines, strict=True):
                shape = (case.n, case.layer.stride) if case.kernel == DEQUANTIZE else (case.m, case.n)
                data = bytearray(file.read(2 * shape[0] * shape[1]))
                result = torch.frombuffer(data, dtype=DTYPES[case.dtype]).reshape(shape)
                yield case, order, Outcome(line.split(" ", 2)[2] if line.startswith("FAIL") else "", result)


def _engine(folder: Path, source: str) -> Path:
    """The emulator's own object files, shared by the builds of a session."""
    target = folder.parent / f"{source}.o"
    if not target.exists():
        _compile([*FLAGS, "-c", str(SIMT / source), "-o", str(target)])
    return target


def _compile(arguments: list[str]) -> None:
    done = subprocess.run(["g++", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


def _parts(number: int, case: Case, order: str) -> Iterator[bytes]:
    """The fields of struct Case in run_cases.cpp, then the arrays."""
    layer, given = case.layer, case.operands
    fields = (number, case.kernel, case.dtype == "bf16", case.float_scale, case.bits, layer.passes, case.variant)
    fields += (
        case.m,
        case.n,
        case.k,
        layer.groups,
        case.splits,
        case.bias,
        ORDERS.index(order),
        number,
        case.touch_start,
    )
    yield struct.pack("16i", *fields)
    yield _bytes(pack(given.codes, case.bits))
    yield _bytes(tile_scale(given.stored_scale(case), DTYPES[case.dtype]))
    yield _bytes(padded_rows(given.x))
    if given.bias is not None:
        yield _bytes(given.bias)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()
