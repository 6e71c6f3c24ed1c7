"""Compiling, caching and loading the CPU kernels, and what happens where they cannot be compiled."""

import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qat.export import export, record
from qat.inference import load_packed
from qat.kernels import build, cpu

ROOT = Path(__file__).parents[2]


@pytest.fixture
def fast_compiler(library, tmp_path, monkeypatch):
    """A compiler that hands out the library already built, and counts how often it was asked; the count's file."""
    built, calls, script = next(build.cache_folder().glob("*.so")), tmp_path / "calls", tmp_path / "c++"
    script.write_text(
        "#!/bin/sh\n"
        'if [ "$1" = --version ]; then echo fast 1.0; exit; fi\n'
        'for last in "$@"; do :; done\n'
        f'echo compiled >>"{calls}"; sleep 0.2; cp "{built}" "$last"\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setenv("QAT_CACHE_DIR", str(tmp_path / "cache"))
    calls.touch()
    return calls


def in_another_process() -> subprocess.Popen:
    code = "from qat.kernels import cpu; assert cpu.kernels().isa >= 0"
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, cwd=ROOT)


def test_a_second_process_does_not_compile(fast_compiler):
    build.load()
    process = in_another_process()
    assert process.wait() == 0, process.stderr.read()
    assert fast_compiler.read_text().count("compiled") == 1


def test_processes_that_compile_at_once_leave_one_whole_file(fast_compiler, tmp_path):
    processes = [in_another_process() for _ in range(2)]
    assert [p.wait() for p in processes] == [0, 0]
    (path,) = (tmp_path / "cache").iterdir()
    assert build._digest(path) == path.stem.partition("-")[2]


@pytest.mark.parametrize("damage", [lambda b: b[:1000], lambda b: b[:-1] + bytes([b[-1] ^ 1]), lambda b: b""])
def test_a_damaged_file_is_compiled_again(damage, fast_compiler, tmp_path, caplog):
    build.load()
    (path,) = (tmp_path / "cache").iterdir()
    whole = path.read_bytes()
    path.unlink()  # this process has mapped the old file
    path.write_bytes(damage(whole))
    build.load()
    assert path.read_bytes() == whole
    assert fast_compiler.read_text().count("compiled") == 2
    assert "is damaged: compiling it again" in caplog.text


def test_another_compiler_or_flag_is_another_file(fast_compiler, tmp_path):
    build.load()
    build.load(("-DOTHER",))
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_a_cache_that_cannot_be_written_costs_a_line_and_a_compilation(fast_compiler, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("QAT_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert build.load().qat_cpu_isa() >= 0
    assert [r.getMessage() for r in caplog.records if "cannot be written" in r.getMessage()]


@pytest.fixture
def no_kernels_yet():
    cpu._built.cache_clear()
    yield
    cpu._built.cache_clear()


FAILING = [("CXX", "/no/such/compiler"), ("CXX", "false"), ("PATH", "/nowhere")]


@pytest.mark.parametrize(("variable", "value"), FAILING, ids=["wrong CXX", "failing", "none"])
@torch.no_grad()
def test_without_a_compiler_auto_takes_torch_and_says_so(
    variable, value, tmp_path, monkeypatch, caplog, no_kernels_yet, exported
):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv(variable, value)
    monkeypatch.setenv("QAT_CACHE_DIR", str(tmp_path / "cache"))
    with caplog.at_level(logging.WARNING, "qat"):
        model, _ = load_packed(exported, backend="auto")
    (record,) = caplog.records
    assert record.getMessage().startswith("no CPU kernels (")
    assert record.getMessage().endswith("using torch's slower operators")
    assert model(torch.arange(5)[None]).logits.isfinite().all()
    with pytest.raises(ValueError, match=r"(?s)backend cpu: .*use backend=torch or backend=reference"):
        load_packed(exported, backend="cpu")


def test_the_compilers_words_are_in_the_error(tmp_path, monkeypatch, no_kernels_yet):
    script = tmp_path / "c++"
    script.write_text('#!/bin/sh\n[ "$1" = --version ] || { echo "library.cpp:1: error: oh no" >&2; exit 1; }\n')
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setenv("QAT_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.raises(build.BuildError, match=r"(?s)failed with 1:.*error: oh no"):
        cpu.kernels()


# -- loading -------------------------------------------------------------------------------------------------


@pytest.fixture
def exported(scheme, tiny_llama, quantize_model, tmp_path, request):
    model = quantize_model(tiny_llama(torch.float32), scheme(getattr(request, "param", "w4a16-g32")))
    with record(model) as recorded, torch.no_grad():
        model(torch.arange(24)[None])
    export(model, recorded, tmp_path / "m")
    return tmp_path / "m"


@pytest.mark.parametrize("exported", ["w4a16-g32", "w4a8-g128", "w8a8-channel-static", "w8a16-g64"], indirect=True)
@pytest.mark.parametrize("backend", ["cpu", "auto"])
@torch.no_grad()
def test_a_model_runs_on_the_kernels_and_one_line_says_so(backend, exported, library, caplog):
    with caplog.at_level(logging.INFO, "qat.inference"):
        model, _ = load_packed(exported, backend=backend)
    (record,) = caplog.records
    assert record.getMessage().startswith("backend cpu: 14 layers on cpu kernels (")
    expected, tokens = load_packed(exported)[0], torch.arange(24)[None]
    assert {layer.backend for layer in expected.modules() if hasattr(layer, "backend")} == {"reference"}
    x = torch.randn(3, 128)
    name = "model.layers.1.mlp.up_proj"
    # 128 products, |x w| < 1, summed in another order: 128 * 2^-24 of the sum of magnitudes.
    torch.testing.assert_close(model.get_submodule(name)(x), expected.get_submodule(name)(x), rtol=1e-5, atol=2e-5)
    assert model(tokens).logits.isfinite().all()


@pytest.mark.parametrize("exported", ["w4a16-g16"], indirect=True)
def test_layers_without_a_kernel_stay_on_the_reference_and_are_counted(exported, library, caplog):
    with caplog.at_level(logging.INFO, "qat.inference"):
        model, _ = load_packed(exported, backend="cpu")
    assert caplog.messages == ["backend cpu: 14 layers on the slower reference (no kernel for groups of 16)"]
    assert model.get_submodule("model.layers.1.mlp.up_proj").backend == "reference"


def test_threads_are_those_of_torch(library):
    """Both threads work in the runtime that torch has loaded: no second one appears in the process."""
    code = (
        "import torch; from qat.kernels import cpu, packed_linear; from qat.packing import pack\n"
        "torch.set_num_threads(2)\n"
        "p = pack(torch.ones(512, 512, dtype=torch.int64), 4)\n"
        "y = packed_linear(torch.ones(1, 512), p, torch.ones(512, 1), None, None, 4, 512, backend='cpu')\n"
        "assert (y == 512).all()\n"
        "import os; maps = {l.split()[-1] for l in open('/proc/self/maps') if 'omp' in os.path.basename(l)}\n"
        "print(len(maps), len(os.listdir('/proc/self/task')))"
    )
    if not Path("/proc/self/maps").exists() or shutil.which("c++") is None:
        pytest.skip("needs Linux's /proc and a compiler")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    runtimes, threads = map(int, done.stdout.split())
    assert runtimes == 1
    assert threads >= 2
