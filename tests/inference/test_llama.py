"""The fused decoder and its steps against transformers' own forward, on random Llamas."""

import logging

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, MistralConfig, Qwen2Config

from qat.functional import dynamic_scale, quantize
from qat.inference import PackedLinear, cuda_backend
from qat.inference.cpu_backend import use_cpu_kernels
from qat.inference.cpu_step import CpuStep
from qat.inference.cpu_step import why_not as why_no_cpu_step
from qat.inference.cuda_backend import CudaLinear, use_cuda_kernels
from qat.inference.decode import FixedStep, generate, sample, step
from qat.inference.fusion import Separate
from qat.inference.llama import LlamaDecoder, fused_decoder, unsupported
from qat.kernels import cuda, reference
from qat.kernels.reference import input_spec

CONFIG = {
    "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 96, "max_position_embeddings": 64,
}  # fmt: skip


def random_llama(scheme=None, dtype=torch.float32, kind=LlamaConfig, head=None, **changes) -> nn.Module:
    """A Llama with random packed layers; logits of about 1."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(kind(**{**CONFIG, **changes}), dtype=dtype).eval()
    for module in model.modules():
        if "RMSNorm" in type(module).__name__:
            module.weight.data.add_(0.2 * torch.randn(module.weight.shape))
    for name, linear in list(model.named_modules()):
        wanted = head if name == "lm_head" else scheme
        if not isinstance(linear, nn.Linear) or wanted is None:
            continue
        layer = PackedLinear(linear.in_features, linear.out_features, wanted, linear.bias is not None, dtype)
        layer.packed.random_(-(2**31), 2**31)
        layer.scale.uniform_(0.5, 1.0).mul_(0.3 / 2 ** (layer.bits - 1))
        if layer.input_scale is not None:
            layer.input_scale.fill_(0.04)
        if layer.bias is not None:
            layer.bias.normal_()
        model.set_submodule(name, layer)
    return model.requires_grad_(False)


def tokens_of(batch: int, count: int) -> Tensor:
    return torch.randint(0, 96, (batch, count), generator=torch.Generator().manual_seed(1))


def near(found: Tensor, expected: Tensor, name: str = "") -> None:
    """Equal but for float32 sums in another order.

    Each of two blocks sums at most 192 products seven times in a row, errors of up to 192 * 2^-24 = 1e-5 relative to
    the sums of magnitudes, and norms pass relative errors on unchanged.  Where activations are quantized, such an error
    may round to the next of 127 codes: of an activation of 4 times a weight of 0.3.  A wrong operand moves logits by 1.
    """
    tolerance = 3e-2 if "a8" in name else 2e-4
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


SCHEMES = ["w4a16-g32", "w8a16-channel", "w4a8-g64", "w8a8-channel", "w8a8-channel-static"]


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", SCHEMES)
@torch.no_grad()
def test_logits_are_those_of_the_plain_path(name, tie, scheme):
    model, tokens = random_llama(scheme(name), tie_word_embeddings=tie), tokens_of(2, 12)
    expected = model(tokens).logits
    decoder = LlamaDecoder(model)
    cache = decoder.new_cache(2, 12)
    parts = [decoder(part, cache) for part in tokens.split([5, 1, 4, 1, 1], 1)]
    near(torch.cat(parts, 1), expected, name)
    near(model(tokens).logits, expected, name)  # the model's own layers are views now, and compute the same
    assert cache.length == 12


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (LlamaConfig, {"num_key_value_heads": 1}),
        (LlamaConfig, {"num_key_value_heads": 4}),
        (LlamaConfig, {"head_dim": 48, "attention_bias": True, "mlp_bias": True}),
        (LlamaConfig, {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0,
         "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}}),
        (MistralConfig, {"sliding_window": None}),
        (Qwen2Config, {}),
    ],
    ids=["one key head", "no groups", "biases", "llama3 rotary", "mistral", "qwen2"],
)  # fmt: skip
@torch.no_grad()
def test_other_shapes_and_cousins_are_the_plain_path_too(kind, changes, scheme):
    model, tokens = random_llama(scheme("w4a16-g32"), kind=kind, **changes), tokens_of(2, 9)
    expected = model(tokens).logits
    decoder = LlamaDecoder(model)
    cache = decoder.new_cache(2, 16)
    near(torch.cat([decoder(tokens[:, :8], cache), decoder(tokens[:, 8:], cache)], 1), expected)


# -- steps -----------------------------------------------------------------------------------------------------


def by_modules(decoder, cache):
    return lambda tokens: decoder(tokens, cache)


STEPS = {"modules": by_modules, "fixed": FixedStep, "cpu": CpuStep}


@pytest.fixture
def decoder_for(scheme, request):
    """A model and its decoder for a kind of step."""

    def make(kind: str, name="w4a16-g32", dtype=torch.float32, **changes) -> tuple[nn.Module, LlamaDecoder]:
        model = random_llama(scheme(name), dtype, **changes)
        if kind == "cpu":
            request.getfixturevalue("library")
            use_cpu_kernels(model, dtype)
        return model, LlamaDecoder(model)

    return make


@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize("name", ["w4a16-g32", "w8a8-channel"])
@torch.inference_mode()
def test_a_step_gives_the_logits_of_the_whole_text(name, kind, scheme, decoder_for):
    model, decoder = decoder_for(kind, name, head=scheme("w8a16-channel") if kind == "cpu" else None)
    tokens = tokens_of(3, 10)
    expected = model(tokens).logits
    cache = decoder.new_cache(3, 10)
    decoder(tokens[:, :6], cache)
    advance = STEPS[kind](decoder, cache)
    near(torch.cat([advance(tokens[:, i : i + 1]).clone() for i in range(6, 10)], 1), expected[:, 6:], name)


@pytest.mark.parametrize("kind", STEPS)
@torch.inference_mode()
def test_a_full_cache_is_an_error_that_names_its_size(kind, decoder_for):
    _, decoder = decoder_for(kind)
    cache = decoder.new_cache(1, 5)
    with pytest.raises(ValueError, match="the cache holds 5 tokens, 6 are needed"):
        decoder(tokens_of(1, 6), cache)
    decoder(tokens_of(1, 4), cache)
    advance = STEPS[kind](decoder, cache)
    advance(tokens_of(1, 1))
    with pytest.raises(ValueError, match="the cache holds 5 tokens, 6 are needed"):
        advance(tokens_of(1, 1))
    assert cache.length == 5


@pytest.mark.parametrize("kind", STEPS)
@torch.inference_mode()
def test_tokens_of_another_batch_are_refused(kind, decoder_for):
    _, decoder = decoder_for(kind)
    cache = decoder.new_cache(2, 5)
    with pytest.raises(ValueError, match="the cache has 2 rows, the tokens 1"):
        STEPS[kind](decoder, cache)(tokens_of(1, 1))


@pytest.mark.parametrize("kind", STEPS)
@torch.inference_mode()
def test_rows_padded_on_the_left_are_what_they_are_alone(kind, decoder_for):
    _, decoder = decoder_for(kind)
    texts = [tokens_of(1, 7), tokens_of(1, 4) + 1, tokens_of(1, 1) + 2]
    padded = torch.cat([torch.nn.functional.pad(t, (7 - t.shape[1], 0)) for t in texts])
    cache = decoder.new_cache(3, 10)
    cache.reset(torch.tensor([0, 3, 6]))
    found = [decoder(padded, cache, last=True)]
    advance = STEPS[kind](decoder, cache)
    found += [advance(torch.full((3, 1), i)).clone() for i in range(3)]
    for row, text in enumerate(texts):
        alone = decoder.new_cache(1, 10)
        expected = [decoder(text, alone, last=True)] + [decoder(torch.tensor([[i]]), alone) for i in range(3)]
        near(torch.cat(found, 1)[row], torch.cat(expected, 1)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.inference_mode()
def test_a_recorded_step_in_16_bits_rounds_where_the_modules_do(dtype, decoder_for):
    _, decoder = decoder_for("cpu", dtype=dtype)
    tokens, logits = tokens_of(2, 9), {}
    for kind in ("modules", "cpu"):
        cache = decoder.new_cache(2, 9)
        decoder(tokens[:, :8], cache)
        logits[kind] = STEPS[kind](decoder, cache)(tokens[:, 8:]).float()
    # A sum in another order flips a rounding of 16-bit values here and there: a few of their units in the logits.
    torch.testing.assert_close(logits["cpu"], logits["modules"], rtol=0, atol=16 * torch.finfo(dtype).eps)


@torch.inference_mode()
def test_the_fastest_step_is_picked_by_what_the_layers_run_on(decoder_for):
    _, plain = decoder_for("modules")
    assert "no layer on backend cpu" in why_no_cpu_step(plain)
    assert not isinstance(step(plain, plain.new_cache(1, 4)), CpuStep)
    _, recorded = decoder_for("cpu")
    assert isinstance(step(recorded, recorded.new_cache(1, 4)), CpuStep)
    assert "a batch of 32" in why_no_cpu_step(recorded, 32)


# -- weights ---------------------------------------------------------------------------------------------------


def test_a_fused_model_has_every_weight_once(scheme):
    model = random_llama(scheme("w8a16-channel"), attention_bias=True)

    def bytes_held(*modules):
        tensors = [t for m in modules for t in (*m.parameters(), *m.buffers())]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    before = bytes_held(model)
    decoder = LlamaDecoder(model)
    assert not any(isinstance(m, Separate) for m in decoder.modules())
    assert bytes_held(model, decoder) == before


@pytest.mark.parametrize("difference", ["scheme", "static scale", "bias", "kind"])
@torch.no_grad()
def test_layers_that_differ_are_called_one_after_the_other(difference, scheme):
    model, tokens = random_llama(scheme("w8a8-channel-static")), tokens_of(1, 6)
    attention = model.model.layers[1].self_attn
    key = PackedLinear(128, 64, scheme("w8a8-channel" if difference == "scheme" else "w8a8-channel-static"), True)
    key.packed.zero_()
    key.scale.fill_(0.01)
    key.bias.fill_(0.1)
    if difference != "bias":
        key.bias = None
    if key.input_scale is not None:
        key.input_scale.fill_(0.05 if difference == "static scale" else 0.04)
    attention.k_proj = nn.Linear(128, 64, bias=False).requires_grad_(False) if difference == "kind" else key
    expected, decoder = model(tokens).logits, LlamaDecoder(model)
    assert isinstance(decoder.blocks[1].qkv, Separate) and not isinstance(decoder.blocks[0].qkv, Separate)
    near(decoder(tokens, decoder.new_cache(1, 6)), expected, "a8")


# -- generation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["modules", "cpu"])
def test_greedy_tokens_are_those_of_transformers(kind, scheme, decoder_for):
    model = random_llama(scheme("w4a16-g32"))
    prompt = tokens_of(1, 6)
    expected = model.generate(prompt, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0)[0, 6:]
    _, decoder = decoder_for(kind)
    found = torch.cat(list(generate(decoder, prompt, 24)))
    assert torch.equal(found, expected)


def test_padded_prompts_continue_as_they_do_alone(decoder_for):
    _, decoder = decoder_for("modules")
    texts = [tokens_of(1, 7), tokens_of(1, 3)]
    prompt, mask = torch.zeros(2, 7, dtype=torch.int64), torch.zeros(2, 7, dtype=torch.int64)
    for row, text in enumerate(texts):
        prompt[row, -text.shape[1] :], mask[row, -text.shape[1] :] = text[0], 1
    found = torch.stack(list(generate(decoder, prompt, 9, attention_mask=mask)))
    for row, text in enumerate(texts):
        assert torch.equal(found[:, row], torch.cat(list(generate(decoder, text, 9))))
    with pytest.raises(ValueError, match="padded on the left"):
        next(generate(decoder, prompt, 9, attention_mask=mask.flip(1)))


def test_a_row_that_ended_is_padded_until_all_have(decoder_for):
    _, decoder = decoder_for("modules")
    prompt = tokens_of(2, 5)
    free = torch.stack(list(generate(decoder, prompt, 12)))
    stop = [int(free[2, 0]), int(free[6, 1])]
    ends = [next(i for i in range(12) if int(free[i, row]) in stop) for row in range(2)]
    found = torch.stack(list(generate(decoder, prompt, 12, stop=stop, pad=77)))
    assert len(found) == max(ends) + 1
    for row, end in enumerate(ends):
        assert torch.equal(found[: end + 1, row], free[: end + 1, row])
        assert (found[end + 1 :, row] == 77).all()


def test_sampling_keeps_to_top_k_and_top_p():
    logits = torch.tensor([[4.0, 3.0, 2.0, 1.0]]).repeat(500, 1)
    torch.manual_seed(0)
    assert set(sample(logits, 1.0, top_k=2).tolist()) == {0, 1}
    assert set(sample(logits, 1.0, top_p=0.65).tolist()) == {0, 1}  # 0.64 is not enough
    assert set(sample(logits, 1.0, top_p=0.60).tolist()) == {0}
    assert sample(logits, 0.0).unique().tolist() == [0]


# -- other architectures -----------------------------------------------------------------------------------------


def test_another_architecture_stays_with_transformers_and_one_line_says_so(caplog):
    config = GPTNeoXConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    model = AutoModelForCausalLM.from_config(config)
    with caplog.at_level(logging.INFO, "qat.inference"):
        assert fused_decoder(model) is None
    (message,) = caplog.messages
    assert message.startswith("no fused decoder for GPTNeoXForCausalLM")
    with pytest.raises(ValueError, match="no fused decoder for GPTNeoX"):
        LlamaDecoder(model)


def test_what_the_blocks_do_not_compute_is_refused_by_name():
    assert "activation gelu" in unsupported(random_llama(hidden_act="gelu"))
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    assert "dynamic rotary" in unsupported(random_llama(rope_parameters=rope))
    sliding = random_llama(kind=MistralConfig, sliding_window=8)
    assert unsupported(sliding) is not None or LlamaDecoder(sliding).window == 8


def test_a_model_in_training_keeps_its_parameters(tiny_llama):
    model = tiny_llama()
    before = list(model.parameters())
    assert fused_decoder(model) is None and "require gradients" in unsupported(model)
    assert all(a is b for a, b in zip(model.parameters(), before, strict=True))
    assert fused_decoder(model.requires_grad_(False)) is not None


def test_fake_quantized_layers_stay_with_transformers(tiny_llama, quantize_model, scheme):
    model = quantize_model(tiny_llama(), scheme("w4a16-g32"))
    assert fused_decoder(model) is None and "fake-quantized layers" in unsupported(model.requires_grad_(False))


# -- the wiring on CUDA, with the kernels' references in their place ---------------------------------------------


def as_rows(scale: Tensor, out_features: int) -> Tensor:
    """(out / 16, groups, 16) -> (out, groups)."""
    return scale.permute(0, 2, 1).flatten(0, 1)[:out_features]


@pytest.fixture
def kernels_of_torch(monkeypatch):
    """The CUDA operators computed by the reference on canonical bytes; the names of those that were called."""
    calls: list[str] = []

    def finish(linear, residual, swiglu):
        if swiglu:
            return nn.functional.silu(linear[..., ::2]) * linear[..., 1::2]
        return linear if residual is None else residual + linear

    def tiled_linear(x, tiles, scale, bias, bits, group_size, out_features, residual, swiglu):
        calls.append("linear" + "+residual" * (residual is not None) + "+swiglu" * swiglu)
        given = tiles, as_rows(scale, out_features), None, bias, bits, group_size
        return finish(reference.packed_linear(x, *given, 0, None, "qmax"), residual, swiglu)

    def quantize_tokens(x, input_scale, bits, rule):
        calls.append("quantize")
        spec = input_spec(bits, rule)
        scale = dynamic_scale(x, spec) if input_scale is None else input_scale.expand(*x.shape[:-1], 1)
        return quantize(x, scale, spec).to(torch.int8), scale[..., 0].float()

    def rmsnorm_quantize(x, weight, eps, bits, rule):
        normed = weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))
        codes = quantize_tokens(normed, None, bits, rule)
        calls[-1] = "norm+quantize"
        return codes

    def tiled_linear_int8(codes, token_scale, tiles, scale, bias, bits, group, out_features, dtype, residual, swiglu):
        x = codes.to(dtype) * token_scale[..., None]
        return tiled_linear(x, tiles, scale, bias, bits, group, out_features, residual, swiglu)

    for function in (tiled_linear, quantize_tokens, rmsnorm_quantize, tiled_linear_int8):
        monkeypatch.setattr(torch.ops.qat, function.__name__, function)
    monkeypatch.setattr(cuda, "repack", lambda packed, bits, inputs: packed.clone())
    monkeypatch.setattr(cuda_backend, "why_not", lambda *layer: None)  # which takes no float32
    return calls


@pytest.mark.parametrize(
    ("name", "launches"),
    [
        ("w4a16-g32", ["linear", "linear+residual", "linear+swiglu", "linear+residual"]),
        ("w4a8-g64", ["norm+quantize", "linear", "quantize", "linear+residual",
                      "norm+quantize", "linear+swiglu", "quantize", "linear+residual"]),
        ("w8a8-channel-static", ["quantize", "linear", "quantize", "linear+residual",
                                 "quantize", "linear+swiglu", "quantize", "linear+residual"]),
    ],
)  # fmt: skip
@torch.no_grad()
def test_on_cuda_a_block_is_a_few_launches_with_the_same_logits(name, launches, scheme, kernels_of_torch):
    model, tokens = random_llama(scheme(name), attention_bias=True), tokens_of(2, 7)
    expected = model(tokens).logits
    use_cuda_kernels(model, torch.float32)
    assert sum(isinstance(m, CudaLinear) for m in model.modules()) == 2 * 6
    near(model(tokens).logits, expected, name)  # transformers' own forward, on the replaced layers
    decoder = LlamaDecoder(model)
    kernels_of_torch.clear()
    near(decoder(tokens, decoder.new_cache(2, 7)), expected, name)
    assert kernels_of_torch == 2 * launches
