import errno
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError

from qat.export import directory, export, record


@pytest.fixture
def trained(scheme, tiny_llama, quantize_model):
    """A quantized model and the record of its last forward."""
    model = quantize_model(tiny_llama(), scheme("w4a16-g32"))
    with record(model) as recorded, torch.no_grad():
        model(torch.arange(4)[None])
    return model, recorded


def test_an_existing_directory_is_refused_and_left_alone(trained, tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "precious").write_text("x")
    with pytest.raises(ValueError, match=r"m exists already"):
        export(*trained, tmp_path / "m")
    assert [p.name for p in tmp_path.rglob("*")] == ["m", "precious"]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left"), SafetensorError("IoError(code: 28)")], ids=["os", "safetensors"]
)
def test_a_disk_that_fills_up_is_named_and_leaves_nothing(error, trained, tmp_path, monkeypatch):
    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(directory, "save_file", full)
    with pytest.raises(OSError, match=rf"could not write {tmp_path}/m: about [\d,]+ bytes needed, [\d,]+ free"):
        export(*trained, tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_a_disk_too_small_is_refused_before_writing(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(directory.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match="1,000 free") as failure:
        export(*trained, tmp_path / "m")
    assert failure.value.errno == errno.ENOSPC


def test_a_killed_export_leaves_no_directory_of_that_name(tmp_path):
    program = f"""
import os, signal
from qat.export.directory import atomic_directory
with atomic_directory({str(tmp_path / "m")!r}, 0) as partial:
    (partial / "model.safetensors").write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-B", "-c", program]).returncode == -9
    assert not (tmp_path / "m").exists()
    with directory.atomic_directory(tmp_path / "m", 0) as partial:  # what was left does not prevent another try
        (partial / "whole").touch()
    assert [p.name for p in (tmp_path / "m").iterdir()] == ["whole"]


def test_whoever_may_read_one_file_may_read_the_weights(trained, tmp_path):
    export(*trained, tmp_path / "m")
    (tmp_path / "ordinary").touch()
    assert {p.stat().st_mode for p in (tmp_path / "m").iterdir()} == {(tmp_path / "ordinary").stat().st_mode}
