"""Compile CUDA kernels with NVRTC for a device, and keep the cubins on disk.

NVRTC comes as a Python package (the extra `cuda`): no nvcc, no host compiler, no CUDA headers.  A kernel is compiled
when it is first needed, one file for each:

    $QAT_CACHE_DIR, else $XDG_CACHE_HOME/qat, else ~/.cache/qat
        cubins/<hash of sources, kernel, architecture and NVRTC version>

Files are written under another name and then renamed, so that processes that compile the same kernel at the same
time disturb nobody; one that is damaged is compiled again.
"""

import hashlib
import io
import logging
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "csrc" / "cuda"
HEADERS = ("repack", "linear_small", "linear_medium", "dequantize", "quantize")
OLDEST = (8, 0)  # mma.m16n8k16 on bfloat16 and cp.async


class CompileError(RuntimeError):
    """NVRTC is missing or refused the source; the message has its log."""


@dataclass(frozen=True)
class Cubin:
    """Machine code, and the mangled name of the kernel in it."""

    code: bytes
    symbol: str


@dataclass(frozen=True)
class Resources:
    """What ptxas reports of a kernel: registers of a thread, bytes of stack and of spilled registers."""

    registers: int
    stack: int
    spills: int


def architecture(capability: tuple[int, int]) -> str:
    """What NVRTC calls a compute capability; sm_90a has Hopper's own instructions."""
    return "sm_90a" if capability == (9, 0) else f"sm_{capability[0]}{capability[1]}"


def cache_folder() -> Path:
    """Where cubins are kept; it need not exist."""
    if own := os.environ.get("QAT_CACHE_DIR"):
        return Path(own) / "cubins"
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "qat" / "cubins"


def key(name: str, arch: str, version: str, sources: Path = SOURCES) -> str:
    """A cubin's file name: it changes with anything that could change the machine code."""
    digest = hashlib.sha256(f"{name}\n{arch}\n{version}\n".encode())
    for path in sorted(sources.glob("*.cuh")):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def load(name: str, arch: str) -> Cubin:
    """The kernel's cubin, from the disk or freshly compiled.

    Args:
        name: its C++ name expression, such as `qat::repack<4>`.
        arch: as `architecture` names it.

    Raises:
        CompileError: it is not on the disk and cannot be compiled.
    """
    path = cache_folder() / key(name, arch, nvrtc_version())
    if (stored := _read(path)) is not None:
        return stored
    cubins, _ = compile_kernels([name], arch)
    _write(path, cubins[name])
    return cubins[name]


def compile_kernels(names: Sequence[str], arch: str, sources: Path = SOURCES) -> tuple[dict[str, Cubin], str]:
    """Compile kernels in one program.

    Args:
        names: C++ name expressions.
        arch: such as `sm_90a`; no such device need be present.
        sources: the folder of the headers.

    Returns:
        A cubin for each name (all with the same code), and the compiler's log, with what ptxas reports.

    Raises:
        CompileError: with the log.
    """
    nvrtc_version()
    from cuda.core import Program, ProgramOptions

    source = "".join(f'#include "{header}.cuh"\n' for header in HEADERS)
    options = ProgramOptions(name="qat", std="c++17", arch=arch, include_path=str(sources), ptxas_options=["-v"])
    output = io.StringIO()
    try:
        compiled = Program(source, "c++", options).compile("cubin", name_expressions=tuple(names), logs=output)
    except Exception as error:  # cuda.core raises NVRTCError and, for some options, others
        raise CompileError(
            f"NVRTC {nvrtc_version()} cannot compile {names[0]} for {arch}: {error}\n{output.getvalue()}"
        ) from error
    symbols = {str(name): symbol.decode() for name, symbol in compiled.symbol_mapping.items()}
    return {name: Cubin(bytes(compiled.code), symbols[name]) for name in names}, output.getvalue()


def resources(ptxas_log: str) -> dict[str, Resources]:
    """What the log of `compile_kernels` says of each kernel, by its mangled name."""
    report = re.compile(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers",
        re.DOTALL,
    )
    return {
        symbol: Resources(int(registers), int(stack), int(stores) + int(loads))
        for symbol, stack, stores, loads, registers in report.findall(ptxas_log)
    }


@cache
def nvrtc_version() -> str:
    """Of the NVRTC in use, such as `13.5`.

    Raises:
        CompileError: there is none.
    """
    try:
        import cuda.core  # noqa: F401
        from cuda.bindings import nvrtc

        status, major, minor = nvrtc.nvrtcVersion()
    except Exception as error:  # an ImportError, or cuda.pathfinder's own where a library is missing
        raise CompileError(f"NVRTC is not available ({error}): pip install 'qat[cuda]'") from error
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise CompileError(f"NVRTC does not say its version: {status.name}")
    return f"{major}.{minor}"


def _read(path: Path) -> Cubin | None:
    """A file is a line with the SHA-256 of the code, a line with the symbol, and the code."""
    try:
        digest, symbol, code = path.read_bytes().split(b"\n", 2)
    except (OSError, ValueError):
        return None
    return Cubin(code, symbol.decode()) if hashlib.sha256(code).hexdigest().encode() == digest else None


def _write(path: Path, cubin: Cubin) -> None:
    data = b"\n".join([hashlib.sha256(cubin.code).hexdigest().encode(), cubin.symbol.encode(), cubin.code])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, unfinished = tempfile.mkstemp(dir=path.parent, prefix=".unfinished-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            os.replace(unfinished, path)
        except BaseException:
            Path(unfinished).unlink(missing_ok=True)
            raise
    except OSError as error:
        _say_once(f"compiled CUDA kernels cannot be kept, and every process compiles them again: {error}")


@cache
def _say_once(message: str) -> None:
    log.warning(message)
