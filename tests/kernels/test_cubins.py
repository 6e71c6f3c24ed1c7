import hashlib
import logging
import multiprocessing
import os
import shutil
from pathlib import Path

import pytest

from qat.kernels import cubins
from qat.kernels.cubins import CompileError, Cubin

NAME, ARCH = "qat::repack<4>", "sm_90a"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("QAT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(cubins, "nvrtc_version", lambda: "13.5")
    cubins._say_once.cache_clear()
    return tmp_path / "cache" / "cubins"


@pytest.fixture
def compiler(monkeypatch):
    """Stands in for NVRTC and counts."""
    calls = []

    def compile_kernels(names, arch):
        calls.append((*names, arch))
        return {name: Cubin(f"code of {name} for {arch}\n\n".encode(), "_Z1k") for name in names}, ""

    monkeypatch.setattr(cubins, "compile_kernels", compile_kernels)
    return calls


def test_a_kernel_is_compiled_once_and_then_read_from_the_disk(compiler):
    first = cubins.load(NAME, ARCH)
    assert first == cubins.load(NAME, ARCH) == Cubin(b"code of qat::repack<4> for sm_90a\n\n", "_Z1k")
    assert compiler == [(NAME, ARCH)]


def test_the_key_follows_everything_that_changes_the_machine_code(tmp_path):
    copy = tmp_path / "sources"
    shutil.copytree(cubins.SOURCES, copy)
    keys = {cubins.key(NAME, ARCH, "13.5", copy)}
    assert keys == {cubins.key(NAME, ARCH, "13.5")}
    keys |= {
        cubins.key("qat::repack<8>", ARCH, "13.5"),
        cubins.key(NAME, "sm_80", "13.5"),
        cubins.key(NAME, ARCH, "13.6"),
    }
    with (copy / "ptx.cuh").open("a") as file:
        file.write("\n")
    keys.add(cubins.key(NAME, ARCH, "13.5", copy))
    assert len(keys) == 5


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"QAT_CACHE_DIR": "/a", "XDG_CACHE_HOME": "/b"}, "/a/cubins"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/qat/cubins"),
        ({"XDG_CACHE_HOME": ""}, "/home/user/.cache/qat/cubins"),
    ],
)
def test_where_the_cache_is(monkeypatch, environment, expected):
    for name in ("QAT_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/user")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cubins.cache_folder() == Path(expected)


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: b"", lambda data: b"\n\n\n" + data])
def test_a_damaged_file_is_compiled_again(compiler, folder, damage):
    good = cubins.load(NAME, ARCH)
    (path,) = folder.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    assert cubins.load(NAME, ARCH) == good
    assert len(compiler) == 2
    assert cubins.load(NAME, ARCH) == good
    assert len(compiler) == 2


def test_a_cache_that_cannot_be_written_costs_one_line_and_no_result(compiler, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("QAT_CACHE_DIR", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        assert cubins.load(NAME, ARCH) == cubins.load(NAME, ARCH)
    assert len(compiler) == 2
    assert [r.message.split(":")[0] for r in caplog.records] == [
        "compiled CUDA kernels cannot be kept, and every process compiles them again"
    ]


def test_an_interrupted_write_leaves_nothing(compiler, folder, monkeypatch):
    def full(source, target):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert cubins.load(NAME, ARCH).symbol == "_Z1k"
    assert list(folder.iterdir()) == []


def _write_and_read(path: Path, number: int, failures) -> None:
    code = bytes([number]) * (1 << 16)
    for _ in range(200):
        cubins._write(path, Cubin(code, f"_Z{number}"))
        found = cubins._read(path)
        if found is None or set(found.code) != {int(found.symbol[2:])} or len(found.code) != len(code):
            failures.put(number)


def test_processes_that_write_the_same_file_never_read_a_mixture(folder):
    context = multiprocessing.get_context("fork")
    failures = context.SimpleQueue()
    workers = [context.Process(target=_write_and_read, args=(folder / "same", n, failures)) for n in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert failures.empty()
    assert [path.name for path in folder.iterdir()] == ["same"]


def test_hopper_is_compiled_for_with_its_own_instructions():
    assert [cubins.architecture(c) for c in ((8, 0), (8, 6), (8, 9), (9, 0), (12, 0))] == [
        "sm_80",
        "sm_86",
        "sm_89",
        "sm_90a",
        "sm_120",
    ]


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setitem(__import__("sys").modules, "cuda.bindings", None)
    cubins.nvrtc_version.cache_clear()
    with pytest.raises(CompileError, match=r"pip install 'qat\[cuda\]'"):
        cubins.nvrtc_version()
    cubins.nvrtc_version.cache_clear()


def test_the_digest_is_of_the_code(folder):
    cubins._write(folder / "x", Cubin(b"abc\ndef", "_Z1k"))
    assert (folder / "x").read_bytes() == hashlib.sha256(b"abc\ndef").hexdigest().encode() + b"\n_Z1k\nabc\ndef"
