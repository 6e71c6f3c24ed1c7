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
from qat.kernels.tiles import padded_codes, padded_rows, tile_scale
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
    int8_input: bool = False
    epilogue: str = ""  # or residual, swiglu

    def __str__(self) -> str:
        name = ["small-R", "medium-NT", "dequantize-"][self.kernel] + str(self.variant)
        scheme = f"{self.dtype}-w{self.bits}{'a8' if self.int8_input else ''}-g{self.group_size}"
        return f"{name}-{scheme}-{self.m}x{self.n}x{self.k}-splits{self.splits}{self.epilogue}"

    @property
    def layer(self) -> Layer:
        """What the kernel is told."""
        dtype = DTYPES[self.dtype]
        scale = torch.float32 if self.float_scale else dtype
        return Layer(self.n, self.k, self.bits, self.group_size, dtype, scale, self.int8_input)

    @cached_property
    def operands(self) -> "Operands":
        """Random, the same every time."""
        if self.int8_input:
            return Operands.integer(self)
        return Operands.general(self) if self.general else Operands.exact(self)


@dataclass(frozen=True)
class Operands:
    """codes (n, k); scale (n, groups) float32; x (m, k) and bias (n,), 16-bit; or x int8, and token_scale (m,) float32.

    residual is (m, n), 16-bit.
    """

    codes: Tensor
    scale: Tensor
    x: Tensor
    bias: Tensor | None
    token_scale: Tensor | None = None
    residual: Tensor | None = None

    @classmethod
    def exact(cls, case: Case) -> "Operands":
        """Whose products and sums are exact: multiples of 2^-5 below 2^24 of them."""
        g = torch.Generator().manual_seed(case.m * 1000003 + case.n * 1009 + case.k + case.bits)
        half, dtype = 2 ** (case.bits - 1), DTYPES[case.dtype]
        codes = torch.randint(-half, half, (case.n, case.k), generator=g, dtype=torch.int32)
        scale = 2.0 ** -torch.randint(3, 6, (case.n, case.layer.groups), generator=g).float()
        x = torch.randint(-6, 7, (case.m, case.k), generator=g).to(dtype)
        bias = torch.randint(-20, 21, (case.n,), generator=g).to(dtype) if case.bias else None
        residual = torch.randn(case.m, case.n, generator=g).to(dtype) if case.epilogue == "residual" else None
        worst = (x.float().abs() @ dequantize(codes, scale).abs().T).max() + 20
        assert worst * 2**5 < 2**24, "a partial sum could be rounded"
        return cls(codes, scale, x, bias, residual=residual)

    @classmethod
    def integer(cls, case: Case) -> "Operands":
        """Codes of all values; scales of any mantissa, but powers of two where float sums of groups must be exact."""
        g = torch.Generator().manual_seed(case.m * 1000003 + case.n * 1009 + case.k + case.bits)
        half, dtype = 2 ** (case.bits - 1), DTYPES[case.dtype]
        codes = torch.randint(-half, half, (case.n, case.k), generator=g, dtype=torch.int32)
        x = torch.randint(-128, 128, (case.m, case.k), generator=g, dtype=torch.int8)
        scale = (0.05 * torch.rand(case.n, case.layer.groups, generator=g) + 0.01) / half
        if case.layer.groups > 1:
            scale = 2.0 ** -torch.randint(7, 10, scale.shape, generator=g).float()
            assert (x.abs().float() @ codes.abs().float().T).max() * 2**2 < 2**24, "a partial sum could be rounded"
        token_scale = 0.04 * torch.rand(case.m, generator=g) + 0.01
        bias = torch.randn(case.n, generator=g).to(dtype) if case.bias else None
        residual = torch.randn(case.m, case.n, generator=g).to(dtype) if case.epilogue == "residual" else None
        return cls(codes, scale.to(case.layer.scale_dtype).float(), x, bias, token_scale, residual)

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

    def expected(self, case: Case) -> tuple[Tensor, Tensor]:
        """The smallest and the largest right result: one and the same, but where SwiGLU's exponential has a say.

        It is what the reference computes in float32, rounded to the type; the dense weight for `dequantize`.
        """
        dtype = DTYPES[case.dtype]
        if case.kernel == DEQUANTIZE:
            return (padded_rows(dequantize(self.codes, self.scale).to(dtype)),) * 2
        linear = (self.integer_linear(case) if case.int8_input else self.float_linear(case)).to(dtype)
        if case.epilogue == "residual":
            return ((self.residual.float() + linear.float()).to(dtype),) * 2
        if case.epilogue != "swiglu":
            return linear, linear
        gate, up = linear[:, ::2].double(), linear[:, 1::2].float()
        silu = gate / (1 + (-gate).exp())
        # exp2 of a rounded product, below 2^7 and so wrong by 2^-18 at most; beyond, the exponential overflows and
        # the result is 0 instead of 10^-36, as torch's is.
        ends = torch.stack([silu * (1 - 2.0**-18), silu * (1 + 2.0**-18), silu.where(gate > -87, 0)])
        results = (ends.to(dtype).float() * up).to(dtype).float()
        return results.amin(0).to(dtype), results.amax(0).to(dtype)

    def float_linear(self, case: Case) -> Tensor:
        """(m, n), float32."""
        packed = pack(self.codes, case.bits)
        bias = None if self.bias is None else self.bias.float()
        return reference.packed_linear(
            self.x.float(), packed, self.scale, None, bias, case.bits, case.group_size, 0, None, "qmax"
        )

    def integer_linear(self, case: Case) -> Tensor:
        """(m, n), float32: integer sums of groups times their scales, summed, times the token's scale, plus bias."""
        groups = (case.layer.groups, case.group_size)
        # float64 holds these integers
        sums = torch.einsum(
            "mgk,ngk->mng", self.x.double().unflatten(1, groups), self.codes.double().unflatten(1, groups)
        )
        value = (sums.float() * self.scale).sum(-1) * self.token_scale[:, None]
        return value if self.bias is None else value + self.bias.float()


@dataclass(frozen=True)
class Outcome:
    """What the emulator objected to ("" if nothing), and the kernel's result."""

    error: str
    result: Tensor

    def wrong(self, case: Case) -> str:
        """What is wrong with it, "" if nothing."""
        low, high = case.operands.expected(case)
        if self.error:
            return self.error
        differs = ~((low <= self.result) & (self.result <= high))
        if not differs.any():
            return ""
        row, column = map(int, differs.nonzero()[0])
        return (
            f"{int(differs.sum())} of {differs.numel()} differ, first [{row}][{column}]: "
            f"{float(self.result[row, column])} instead of {float(low[row, column])}"
        )


class Emulator:
    """A build of `run_cases` or another program: of the real kernels, or of those in `kernels`."""

    def __init__(
        self,
        folder: Path,
        *,
        checked: bool,
        kernels: Path = KERNELS,
        define: Sequence[str] = (),
        source: str = "run_cases.cpp",
    ):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.program = folder, folder / ("checked" if checked else "plain")
        engine = [_engine(folder, name) for name in ("scheduler.cpp", "memory.cpp")]
        flags = [*FLAGS, *(CHECKED if checked else []), *(f"-D{what}" for what in define), f"-I{kernels}", f"-I{SIMT}"]
        # Linked without -fsanitize: memory.cpp answers the sanitizer's calls.
        _compile([*flags, "-c", str(SIMT / source), "-o", f"{self.program}.o"])
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
                outputs = case.n // 2 if case.epilogue == "swiglu" else case.n
                shape = (case.n, case.layer.stride) if case.kernel == DEQUANTIZE else (case.m, outputs)
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
    fields += (case.int8_input, case.epilogue == "residual", case.epilogue == "swiglu")
    yield struct.pack("19i", *fields)
    yield _bytes(pack(given.codes, case.bits))
    yield _bytes(tile_scale(given.stored_scale(case), DTYPES[case.dtype]))
    yield _bytes(padded_codes(given.x) if case.int8_input else padded_rows(given.x))
    for tensor in (given.token_scale, given.bias, given.residual):
        if tensor is not None:
            yield _bytes(tensor)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()
