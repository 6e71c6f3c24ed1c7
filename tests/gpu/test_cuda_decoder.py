"""The fused decoder on a GPU.  None of it runs without one; `sanitized` names a small test, for compute-sanitizer."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from qat.inference import PackedLinear
from qat.inference.cuda_backend import CudaLinear, use_cuda_kernels
from qat.inference.decode import FixedStep, cuda_graph, generate
from qat.inference.llama import LlamaDecoder

if not torch.cuda.is_available():
    pytest.skip("no GPU: tests/inference/test_llama.py has the wiring on a CPU", allow_module_level=True)

SCHEMES = ["w4a16-g128", "w8a16-channel", "w4a8-g128", "w8a8-channel"]


def random_llama(scheme, hidden: int = 256, layers: int = 2) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=512, max_position_embeddings=256,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and name != "lm_head":
            layer = PackedLinear(linear.in_features, linear.out_features, scheme)
            layer.packed.random_(-(2**31), 2**31)
            layer.scale.uniform_(0.5, 1.0).mul_(0.2 / 2 ** (layer.bits - 1))
            model.set_submodule(name, layer)
    return model.cuda()


def tokens_of(batch: int, count: int) -> torch.Tensor:
    return torch.randint(0, 512, (batch, count), generator=torch.Generator().manual_seed(1)).cuda()


@pytest.mark.parametrize("name", SCHEMES)
@torch.inference_mode()
def test_logits_are_those_of_the_reference(name, scheme):
    model, tokens = random_llama(scheme(name)), tokens_of(2, 17)
    expected = model(tokens).logits.float()
    use_cuda_kernels(model, torch.bfloat16)
    assert sum(isinstance(m, CudaLinear) for m in model.modules()) == 2 * 6
    decoder = LlamaDecoder(model)
    found = decoder(tokens, decoder.new_cache(2, 17)).float()
    # bfloat16 rounds weights in the reference and sums in both; some forty roundings of 2^-9, as random errors
    assert (found - expected).norm() <= 0.05 * expected.norm()


@pytest.mark.parametrize("name", SCHEMES)
@torch.inference_mode()
def test_a_graph_replays_what_its_launches_compute(name, scheme):
    model = random_llama(scheme(name))
    use_cuda_kernels(model, torch.bfloat16)
    decoder, tokens, logits = LlamaDecoder(model), tokens_of(3, 20), {}
    for kind, capture in {"launches": lambda run: run, "graph": cuda_graph}.items():
        cache = decoder.new_cache(3, 20)
        cache.reset(torch.tensor([0, 2, 5]).cuda())
        decoder(tokens[:, :12], cache)
        advance = FixedStep(decoder, cache, capture)
        logits[kind] = torch.cat([advance(tokens[:, i : i + 1]).clone() for i in range(12, 20)], 1)
    assert torch.equal(logits["graph"], logits["launches"])


@pytest.mark.parametrize("name", SCHEMES)
@torch.inference_mode()
def test_a_sanitized_block_reads_and_writes_within_its_tensors(name, scheme):
    model = random_llama(scheme(name), hidden=128, layers=1)
    use_cuda_kernels(model, torch.bfloat16)
    decoder = LlamaDecoder(model)
    for batch, prompt in ((1, 3), (3, 30)):  # few and medium numbers of rows, and one token of each
        cache = decoder.new_cache(batch, prompt + 1)
        decoder(tokens_of(batch, prompt), cache)
        assert FixedStep(decoder, cache)(tokens_of(batch, 1)).isfinite().all()


def test_generation_captures_one_graph_and_repeats_itself(scheme):
    model = random_llama(scheme("w4a16-g128"))
    use_cuda_kernels(model, torch.bfloat16)
    decoder = LlamaDecoder(model)
    first, second = (torch.stack(list(generate(decoder, tokens_of(2, 9), 12))) for _ in range(2))
    assert torch.equal(first, second)
