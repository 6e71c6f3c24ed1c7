"""Keys and values quantized on their way to the cache, in every family of models."""

import copy

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from qat.attention import key_values
from qat.calibration import CALIBRATIONS, RangeCalibration
from qat.estimators import DSQ
from qat.fake_quantizer import Stage, token_mask
from qat.functional import code_dtype, quantize
from qat.inference.llama import LlamaDecoder
from qat.insertion import insert, remove, set_stage
from qat.scheme import QuantSpec, cache_spec, uniform

USUAL = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 96, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
EXPERTS = {"num_experts_per_tok": 2, "num_experts": 4, "moe_intermediate_size": 32}
FAMILIES = {
    **dict.fromkeys(["Llama", "Mistral", "Qwen2"], USUAL),
    **dict.fromkeys(["Qwen3", "Gemma", "Gemma2"], USUAL | {"head_dim": 16}),
    "Mixtral": USUAL | {"num_local_experts": 4},
    "Qwen3Moe": USUAL | EXPERTS | {"head_dim": 16},
}
NAMES = ["int8", "int8-head", "int8-token", "fp8", "fp8-head", "fp8-token"]
TOKENS = torch.randint(1, 96, (4, 32), generator=torch.Generator().manual_seed(1))


def family(name: str, **changes) -> torch.nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**FAMILIES[name], **changes}, initializer_range=0.1)
    return AutoModelForCausalLM.from_config(config).eval()


@torch.no_grad()
def calibrated(name: str, kv_cache: str, calibration: str = "absmax", **changes) -> torch.nn.Module:
    model = family(name, **changes)
    insert(model, uniform(None, kv_cache=kv_cache))
    CALIBRATIONS[calibration](model, lambda: model(TOKENS, use_cache=False))
    return model


def e4m3_values() -> list[float]:
    """Sign, 4 exponent bits of bias 7, 3 mantissa bits, subnormals; no infinity, one NaN a sign."""
    values = []
    for code in range(256):
        sign, exponent, mantissa = -1 if code >> 7 else 1, code >> 3 & 15, code & 7
        if (exponent, mantissa) != (15, 7):
            values.append(sign * (mantissa / 8 * 2**-6 if exponent == 0 else (1 + mantissa / 8) * 2 ** (exponent - 7)))
    return values


def test_fp8_codes_are_the_e4m3_numbers_and_their_own_codes():
    values = torch.tensor(e4m3_values())
    spec = QuantSpec(bits=8, granularity="tensor", element="float")
    assert len(values) == 254 and values.max() == spec.qmax == 448
    codes = quantize(values[:, None], torch.ones(254, 1), spec)[:, 0]
    assert torch.equal(codes, values)
    assert torch.equal(codes.to(code_dtype(spec)).float(), values)


def test_fp8_rounds_to_the_nearest_half_to_even_and_saturates():
    grid = torch.tensor(sorted(set(e4m3_values())), dtype=torch.float64)
    x = torch.cat([torch.randn(20_000) * 100, torch.randn(5_000) * 1e-2, torch.tensor([1e9, -1e9, 449.0, 479.0])])
    middle = ((grid[1:] + grid[:-1]) / 2).float()  # exact: five significant bits
    x = torch.cat([x, middle])
    spec = QuantSpec(bits=8, granularity="tensor", element="float")
    found = quantize(x[:, None], torch.ones(len(x), 1), spec)[:, 0].double()
    clamped = x.double().clamp(-448, 448)
    distance = (clamped[:, None] - grid).abs()
    assert torch.equal((clamped - found).abs(), distance.amin(1))
    ties = (distance == distance.amin(1, keepdim=True)).sum(1) == 2
    assert ties.sum() >= len(middle)
    bits = found[ties].float().to(torch.float8_e4m3fn).view(torch.uint8)
    assert (bits % 2 == 0).all()
    inside = x.abs() <= 448
    assert torch.equal(found[inside].float(), x[inside].to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("kv_cache", ["int8", "fp8-head", "int8-token"])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_every_family_quantizes_alike_with_and_without_a_cache_and_not_at_all_when_off(name, kv_cache):
    model = family(name)
    before = model(TOKENS).logits
    insert(model, uniform(None, kv_cache=kv_cache))
    assert len(key_values(model)) == 2
    assert torch.equal(model(TOKENS).logits, before)
    CALIBRATIONS["mse"](model, lambda: model(TOKENS, use_cache=False))
    assert torch.equal(model(TOKENS).logits, before)
    set_stage(model, Stage.FROZEN)
    quantized = model(TOKENS, use_cache=False).logits
    assert not torch.equal(quantized, before)
    assert torch.equal(model(TOKENS, use_cache=True).logits, quantized)
    copied = copy.deepcopy(model)
    remove(model)
    assert torch.equal(model(TOKENS).logits, before)
    assert torch.equal(copied(TOKENS).logits, quantized)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_what_attention_reads_are_codes_times_scales_after_the_rotary_embedding(attention):
    model = family("Llama", attn_implementation=attention)
    insert(model, uniform(None, kv_cache="int8-head"))
    RangeCalibration("absmax", input="absmax")(model, lambda: model(TOKENS, use_cache=False))
    set_stage(model, Stage.FROZEN)
    cache = model(TOKENS, use_cache=True).past_key_values
    remove(model)
    whole = model(TOKENS, use_cache=True).past_key_values
    kept, floats = cache.layers[0], whole.layers[0]  # of the first layer: its input is not quantized
    for found, x in ((kept.keys, floats.keys), (kept.values, floats.values)):
        scale = (x.abs().amax((0, 2, 3)) / 127).bfloat16().float()[:, None, None]
        assert torch.equal(found, (x / scale).round().clamp(-128, 127) * scale)


@pytest.mark.parametrize("kv_cache", NAMES)
def test_gradients_reach_weights_and_scales(kv_cache):
    model = calibrated("Llama", kv_cache).train()
    set_stage(model, Stage.TRAIN)
    model(TOKENS, labels=TOKENS, use_cache=False).loss.backward()
    attention = model.model.layers[0].self_attn
    parameters = [attention.k_proj.weight, attention.v_proj.weight, *attention.kv_cache.parameters()]
    assert len(parameters) == (2 if "token" in kv_cache else 4)
    for parameter in parameters:
        assert torch.isfinite(parameter.grad).all() and parameter.grad.abs().sum() > 0


@pytest.mark.parametrize("kv_cache", ["int8", "fp8-head"])
def test_padding_never_moves_a_scale_of_keys_and_values(kv_cache):
    mask, scales = torch.arange(32).expand(4, 32) < 20, []
    for junk in (5, 90):
        model, ids = family("Llama"), torch.where(mask, TOKENS, junk)
        insert(model, uniform(None, kv_cache=kv_cache))

        @torch.no_grad()
        def run(model=model, ids=ids) -> None:
            with token_mask(mask):
                model(ids, attention_mask=mask, use_cache=False)

        CALIBRATIONS["mse"](model, run)
        scales.append(torch.cat([s.detach().flatten() for kv in key_values(model).values() for s in kv.parameters()]))
    assert torch.equal(*scales)


@pytest.mark.parametrize("calibration", ["absmax", "gptq"])
def test_methods_that_change_weights_set_the_scales_of_keys_and_values_too(calibration):
    model = family("Llama")
    insert(model, uniform(QuantSpec(bits=8, granularity="channel"), ignore=["*lm_head"], kv_cache="int8-head"))
    with torch.no_grad():
        CALIBRATIONS[calibration](model, lambda: model(TOKENS, use_cache=False))
    for quantized in key_values(model).values():
        for quantizer in (quantized.key_quantizer, quantized.value_quantizer):
            assert (quantizer.scale < 0.2).all() and quantizer.observer is None  # 1 at the start


def test_what_cannot_be_treated_is_refused_by_name_with_the_remedy():
    config = transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=96, n_positions=64)
    with pytest.raises(ValueError, match=r"transformer.h.0.attn: GPT2Attention has no k_proj.*kv_cache=null"):
        insert(AutoModelForCausalLM.from_config(config), uniform(None, kv_cache="int8"))
    with pytest.raises(ValueError, match=r"Linear: no attention that takes past_key_values.*kv_cache=null"):
        insert(torch.nn.Linear(4, 4), uniform(None, kv_cache="int8"))
    with pytest.raises(ValueError, match=r"kv_cache: DSQ's staircase has even steps.*use estimator=lsq"):
        insert(family("Llama"), uniform(None, kv_cache="fp8"), DSQ())


def test_scales_of_tokens_are_those_that_a_cache_keeps():
    spec = cache_spec("int8-token")
    assert spec.dynamic and spec.scale_dtype == "bfloat16"
    model = calibrated("Llama", "int8-token")
    quantizer = model.model.layers[0].self_attn.kv_cache.key_quantizer
    scale = quantizer.dynamic_scale(torch.randn(2, 2, 8, 16))
    assert scale.shape == (2, 2, 8, 1)
    assert torch.equal(scale, scale.bfloat16().float())


def test_no_fused_decoder_drops_the_quantization_of_keys_and_values():
    with pytest.raises(ValueError, match="no fused decoder for LlamaForCausalLM with fake-quantized keys and values"):
        LlamaDecoder(calibrated("Llama", "int8"))


def test_scales_of_keys_and_values_are_where_their_attention_is():
    model = family("Llama")
    model.model.layers[1].to("meta")  # a device that is not the first parameter's
    insert(model, uniform(None, kv_cache="int8-head"))
    places = [kept.value_quantizer.scale.device.type for kept in key_values(model).values()]
    assert places == ["cpu", "meta"]
