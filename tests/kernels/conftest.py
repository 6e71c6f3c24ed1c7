"""Fixtures of the kernels' tests."""

import ctypes
import subprocess
from pathlib import Path

import pytest

from qat.kernels import build, cpu

HERE = Path(__file__).parent
ISAS = ["portable", "avx2", "avx512"]


@pytest.fixture(scope="session", autouse=True)
def kernel_cache(cache_folder):
    """Every test here compiles into a folder of its own."""


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    """The AVX512 path in plain C++ and AVX2, or None where SIMDe's headers or AVX2 are missing."""
    path = tmp_path_factory.mktemp("emulated") / "kernels.so"
    flags = ["-O1", "-DQAT_SIMDE", "-mavx2", "-mfma", "-mf16c", f"-I{HERE}"]
    command = [*build.compiler(), *build.FLAGS.split(), *flags, str(build.SOURCES / "library.cpp"), "-o", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 or "simde/x86" in done.stderr, done.stderr
    return ctypes.CDLL(str(path)) if done.returncode == 0 else None


@pytest.fixture(params=ISAS)
def kernels(request, library):
    """The CPU kernels of each instruction set in turn."""
    has = cpu.Kernels(library).isa
    wanted = ISAS.index(request.param)
    if wanted <= has:
        return cpu.Kernels(library, wanted)
    if has < 1:
        pytest.skip("this processor has no AVX2")
    emulation = request.getfixturevalue("emulated")
    if emulation is None:
        pytest.skip("this processor has no AVX512-VNNI, and its emulation needs SIMDe's headers (libsimde-dev)")
    return cpu.Kernels(emulation)
