import pytest
import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig

from qat.cli import main
from qat.inference.bench import speed, tensor_bytes


def neox() -> torch.nn.Module:
    config = GPTNeoXConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, vocab_size=64
    )
    return AutoModelForCausalLM.from_config(config).eval()


def test_the_cache_that_is_reported_holds_prompt_and_new_tokens(tiny_llama):
    found = speed(tiny_llama(torch.bfloat16).requires_grad_(False), batch=3, prompt=7, new_tokens=4, rounds=1)
    assert found.batch == 3 and found.prefill > 0 and found.decode > 0
    assert found.cache_bytes == 2 * 2 * 3 * 2 * (7 + 4) * 32 * 2  # keys and values, layers, rows, heads, slots, width


def test_an_architecture_without_fused_blocks_is_measured_through_transformers():
    found = speed(neox(), batch=2, prompt=5, new_tokens=3, rounds=1)
    # the last token is written, but not read
    assert found.cache_bytes == 2 * 3 * 2 * 2 * (5 + 2) * 16 * 4


def test_time_is_that_of_the_tokens(tiny_llama, monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))  # a second between any two looks
    found = speed(tiny_llama().requires_grad_(False), batch=3, prompt=7, new_tokens=4)
    assert (found.prefill, found.decode) == (21.0, 3.0)


@pytest.mark.parametrize("tie", [False, True])
def test_shared_tensors_are_counted_once(tie, tiny_llama):
    model = tiny_llama(tie=tie)
    assert tensor_bytes(model) - tensor_bytes(tiny_llama(tie=True)) == (0 if tie else 256 * 128 * 4)


@pytest.mark.parametrize("sizes", [(0, 1, 2), (1, 0, 2), (1, 1, 1)], ids=str)
def test_sizes_that_leave_nothing_to_measure_are_refused(sizes, tiny_llama):
    with pytest.raises(ValueError, match="must be at least 1 and new tokens 2"):
        speed(tiny_llama(), *sizes)


def test_the_command_prints_a_line_a_batch(tiny_llama, tmp_path, monkeypatch, capsys):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr("qat.cli._load", lambda directory, backend: (tiny_llama(), None))
    assert main(["bench", str(tmp_path), "--batch", "1", "2", "--prompt-tokens", "5", "--new-tokens", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["model", "run", "batch", "1", "2"]
