"""The measuring core of benchmarks/cuda_linear.py, with a clock that is made up."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SECONDS = {"bf16": 40e-6, "qat": 10e-6, "peer": 20e-6}


@pytest.fixture
def cuda_linear(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import cuda_linear as module

    yield module
    for name in ("cuda_linear", "cuda_peers", "cpu_linear"):
        sys.modules.pop(name, None)


def test_floors_are_bytes_over_bandwidth_or_operations_over_peak(cuda_linear):
    card, floor = cuda_linear.Card(1e12, 1e14, 2e14), cuda_linear.floor
    schemes = cuda_linear.SCHEMES
    assert floor(None, 4096, 4096, 1, card) == (2 * 4096**2 + 2 * 8192) / 1e12
    # 4 bits and a 16-bit scale for each 128
    assert floor(schemes["w4a16"], 4096, 4096, 1, card) == pytest.approx((4.125 / 8 * 4096**2 + 2 * 8192) / 1e12)
    assert floor(schemes["w8a8"], 4096, 4096, 2048, card) == 2 * 2048 * 4096**2 / 2e14
    assert floor(schemes["w8a16"], 4096, 4096, 2048, card) == 2 * 2048 * 4096**2 / 1e14


def test_every_variant_is_compared_with_bfloat16_and_its_floor(cuda_linear, capsys):
    asked = []

    def variants(*what):
        asked.append(what)
        return dict.fromkeys(SECONDS, lambda: None)

    card = cuda_linear.Card(1e12, 1e15, 2e15)
    rows = list(cuda_linear.measure(["o"], [1, 8], ["w4a16"], card, variants, lambda calls: SECONDS))
    assert asked == [("w4a16", 4096, 4096, 1), ("w4a16", 4096, 4096, 8)]
    assert [(r.tokens, r.variant, r.vs_bf16) for r in rows[:3]] == [
        (1, "bf16", 1.0), (1, "w4a16 qat", 4.0), (1, "w4a16 peer", 2.0),
    ]  # fmt: skip
    for row in rows:
        assert row.of_floor == row.floor / row.seconds
    cuda_linear.show(rows, "title")
    assert "10.0" in capsys.readouterr().out


def test_a_package_that_fails_is_named_and_left_out(cuda_linear, monkeypatch):
    peers = cuda_linear.cuda_peers
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setitem(peers.PEERS, "w4a16", {"good": lambda x, w: lambda: x, "humming": peers.humming})
    assert set(peers.calls("w4a16", torch.ones(1, 128), torch.ones(2, 128))) == {"good"}
    assert list(peers.left_out()) == ["humming"] and "ModuleNotFoundError" in peers.left_out()["humming"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "cuda_linear.py"), "--json", str(tmp_path / "k.json")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=BENCHMARKS.parent)
    assert done.returncode == 1 and done.stderr.startswith("error: backend cuda needs an NVIDIA GPU")
    assert not (tmp_path / "k.json").exists()
