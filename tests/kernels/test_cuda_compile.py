"""NVRTC compiles every kernel for every architecture, without a GPU; ptxas says what they need."""

import re
import shutil

import pytest

from qat.kernels import cubins
from qat.kernels.cubins import CompileError
from qat.kernels.plan import every_kernel

try:
    cubins.nvrtc_version()
except CompileError as missing:
    pytest.skip(str(missing), allow_module_level=True)

# The file in which a kernel is, and which states its registers.
FILES = {"sum_splits": "linear_medium", "quantize_tokens": "quantize", "rmsnorm_quantize": "quantize"}


def stated_registers(kernel: str) -> int:
    text = (cubins.SOURCES / f"{FILES.get(kernel, kernel)}.cuh").read_text()
    (stated,) = re.findall(r"^// Registers: at most (\d+)\.", text, re.MULTILINE)
    return int(stated)


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_90a"])
def test_every_kernel_compiles_without_spills_within_its_stated_registers(arch):
    names = every_kernel()
    compiled, log = cubins.compile_kernels(names, arch)
    used = cubins.resources(log)
    for name in names:
        needs, stated = used[compiled[name].symbol], stated_registers(re.match(r"qat::(\w+)", name)[1])
        assert (needs.spills, needs.stack) == (0, 0), f"{name}: {needs}"
        assert needs.registers <= stated, f"{name}: {needs}, the file states {stated}"
    assert len(used) == len(names)


def test_what_ptxas_reports_is_read():
    log = """ptxas info    : Compiling entry function '_Z1a' for 'sm_80'
ptxas info    : Function properties for _Z1a
ptxas         .     8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 30 registers, used 1 barriers, 372 bytes cmem[0]
ptxas info    : Compiling entry function '_Z1b' for 'sm_80'
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 255 registers
"""
    assert cubins.resources(log) == {"_Z1a": cubins.Resources(30, 8, 16), "_Z1b": cubins.Resources(255, 0, 0)}


def test_a_source_that_does_not_compile_fails_with_the_compilers_log(tmp_path):
    shutil.copytree(cubins.SOURCES, tmp_path / "sources")
    with (tmp_path / "sources" / "repack.cuh").open("a") as file:
        file.write("int broken(\n")
    with pytest.raises(CompileError, match=r"(?s)cannot compile qat::repack<4> for sm_80.*repack.cuh.*error"):
        cubins.compile_kernels(["qat::repack<4>"], "sm_80", tmp_path / "sources")


def test_a_compiled_kernel_is_an_elf_file_for_its_symbol():
    compiled, _ = cubins.compile_kernels(["qat::repack<8>"], "sm_80")
    assert compiled["qat::repack<8>"].code[:4] == b"\x7fELF"
    assert compiled["qat::repack<8>"].symbol.encode() in compiled["qat::repack<8>"].code
