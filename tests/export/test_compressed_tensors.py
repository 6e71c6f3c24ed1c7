import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import qat
from qat.export import compressed_tensors, export, record, write_float
from qat.fake_quantizer import Stage
from qat.functional import dequantize
from qat.insertion import layers, set_stage
from qat.scheme import QuantScheme, QuantSpec

SCHEMES = [
    "w4a16-g128",
    "w4a16-g32",
    "w4a16-channel",
    "w8a16-channel",
    "w8a16-g64",
    "w8a16-tensor",
    "w4a8-g128",
    "w8a8-channel",
    "w8a8-channel-static",
    "w2a16-g32",
    "w3a16-g128",
    "w5a16-g64",
    "w6a8-g128",
    "w7a16-channel",
]
TOKENS = torch.arange(24)[None]


@torch.no_grad()
def exported(model, target, **options):
    """The artifact of `model`, what training used, and the logits of that forward."""
    with record(model) as recorded:
        logits = model(TOKENS).logits
    return export(model, recorded, target, **options), recorded, logits


def stored_tensors(target) -> dict[str, torch.Tensor]:
    return load_file(target / "model.safetensors")


def quantization_config(target) -> dict:
    return json.loads((target / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SCHEMES)
def test_transformers_loads_bit_equal_weights(name, dtype, scheme, tiny_llama, quantize_model, tmp_path):
    model = quantize_model(tiny_llama(dtype), scheme(name))
    _, recorded, logits = exported(model, tmp_path / "m")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    with torch.no_grad():
        found = loaded(TOKENS).logits  # the first forward dequantizes
    assert loaded.dtype == dtype
    assert len(recorded) == 14
    for layer, used in recorded.items():
        weight = loaded.get_submodule(layer).weight
        assert weight.dtype == dtype
        assert torch.equal(weight, dequantize(used.codes, used.scale).to(dtype)), layer
    if scheme(name).input is None:
        assert torch.equal(found, logits)


def test_transformers_serves_int8_activations_by_the_half_range_rule(scheme, tiny_llama, quantize_model, tmp_path):
    inputs = QuantSpec(bits=8, granularity="token", dynamic=True, absmax_rule="half_range")
    model = quantize_model(tiny_llama(), QuantScheme(weight=scheme("w8a8-channel").weight, input=inputs))
    _, _, logits = exported(model, tmp_path / "m")
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "m")(TOKENS).logits, logits)


def test_transformers_serves_static_int8_activations_as_trained(scheme, tiny_llama, quantize_model, tmp_path):
    model = quantize_model(tiny_llama(), scheme("w8a8-channel-static"))
    _, _, logits = exported(model, tmp_path / "m")
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "m")(TOKENS).logits, logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_transformers_casts_scales_to_the_dtype_it_loads_in(dtype, scheme, tiny_llama, quantize_model, tmp_path):
    """Why `refusal` wants scales that the model's dtype holds exactly."""
    exported(quantize_model(tiny_llama(), scheme("w4a16-g32")), tmp_path / "m")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=dtype)
    assert (
        load_file(tmp_path / "m" / "model.safetensors")["model.layers.0.mlp.up_proj.weight_scale"].dtype
        == torch.bfloat16
    )
    assert loaded.get_submodule("model.layers.0.mlp.up_proj").weight_scale.dtype == dtype


def test_the_config_is_what_consumers_read(scheme, tiny_llama, quantize_model, tmp_path):
    exported(quantize_model(tiny_llama(), scheme("w4a16-g128")), tmp_path / "m")
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "group_size": 128,
        "strategy": "group",
        "dynamic": False,
    }
    assert quantization_config(tmp_path / "m") == {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "format": "pack-quantized",
                "weights": weights,
                "input_activations": None,
                "output_activations": None,
            }
        },
    }


@pytest.mark.parametrize(
    ("name", "tensors"),
    [
        (
            "w4a16-g32",
            {
                "weight_packed": (torch.int32, (128, 16)),
                "weight_scale": (torch.bfloat16, (128, 4)),
                "weight_shape": (torch.int64, (2,)),
            },
        ),
        (
            "w8a8-channel-static",
            {
                "weight": (torch.int8, (128, 128)),
                "weight_scale": (torch.bfloat16, (128, 1)),
                "input_scale": (torch.bfloat16, (1,)),
            },
        ),
    ],
    ids=["pack-quantized", "int-quantized"],
)
def test_a_layer_has_exactly_the_tensors_of_its_format(name, tensors, scheme, tiny_llama, quantize_model, tmp_path):
    exported(quantize_model(tiny_llama(), scheme(name)), tmp_path / "m")
    layer = "model.layers.0.self_attn.q_proj."
    found = {n.removeprefix(layer): t for n, t in stored_tensors(tmp_path / "m").items() if n.startswith(layer)}
    assert {n: (t.dtype, tuple(t.shape)) for n, t in found.items()} == tensors


def test_mixed_schemes_name_their_layers_and_formats(scheme, tiny_llama, quantize_model, tmp_path):
    rules = {"*lm_head": None, "*.o_proj": None, "*.mlp.*": scheme("w4a16-g64"), "*": scheme("w8a8-channel")}
    model = quantize_model(tiny_llama(), rules=rules)
    _, recorded, _ = exported(model, tmp_path / "m")
    config = quantization_config(tmp_path / "m")
    assert config["format"] == "mixed-precision"
    assert {g["format"] for g in config["config_groups"].values()} == {"int-quantized", "pack-quantized"}
    assert sorted(t for g in config["config_groups"].values() for t in g["targets"]) == sorted(recorded)
    assert config["ignore"] == ["model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj", "lm_head"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    loaded(TOKENS)
    for layer, used in recorded.items():
        assert torch.equal(loaded.get_submodule(layer).weight, dequantize(used.codes, used.scale)), layer


def test_a_tied_output_layer_stays_tied(scheme, tiny_llama, quantize_model, tmp_path):
    exported(quantize_model(tiny_llama(tie=True), scheme("w4a16-g32")), tmp_path / "m")
    assert "lm_head.weight" not in stored_tensors(tmp_path / "m")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_float_tensors_and_the_config_follow_the_dtype_asked_for(scheme, tiny_llama, quantize_model, tmp_path):
    model = quantize_model(tiny_llama(bias=True), scheme("w4a16-g32"))
    exported(model, tmp_path / "m", dtype=torch.bfloat16)
    tensors = stored_tensors(tmp_path / "m")
    assert json.loads((tmp_path / "m" / "config.json").read_text())["dtype"] == "bfloat16"
    assert {tensors[n].dtype for n in ("model.norm.weight", "model.layers.0.self_attn.q_proj.bias")} == {torch.bfloat16}
    assert model.config.dtype == torch.float32


def test_the_side_file_holds_schemes_and_provenance(scheme, tiny_llama, quantize_model, tmp_path):
    model = quantize_model(tiny_llama(), scheme("w4a8-g32"))
    exported(model, tmp_path / "m", provenance={"recipe": "none"})
    side = json.loads((tmp_path / "m" / "qat.json").read_text())
    assert (side["format_version"], side["qat_version"]) == (1, qat.__version__)
    assert side["provenance"] == {"recipe": "none"}
    assert {n: QuantScheme.from_dict(e["scheme"]) for n, e in side["layers"].items()} == {
        n: layer.scheme for n, layer in layers(model).items()
    }


def test_bytes_and_errors_are_those_of_the_layers(scheme, tiny_llama, quantize_model, tmp_path):
    model = quantize_model(tiny_llama(), scheme("w4a16-g32"))
    artifact, recorded, _ = exported(model, tmp_path / "m")
    numel = sum(layer.weight.numel() for layer in layers(model).values())
    assert artifact.float_bytes == 2 * numel
    assert artifact.packed_bytes == numel // 2 + 2 * numel // 32
    written = load_file(tmp_path / "m" / "model.safetensors").values()
    assert artifact.model_packed_bytes == sum(tensor.nbytes for tensor in written)
    first = artifact.layers[0]
    weight = layers(model)[first.name].weight.detach()
    used = recorded[first.name]
    error = (weight - dequantize(used.codes, used.scale)).norm() / weight.norm()
    assert (first.scheme, first.shape) == ("w4a16-g32", (128, 128))
    assert first.weight_error == pytest.approx(float(error), rel=1e-6)


@pytest.mark.parametrize("name", SCHEMES)
def test_stored_bytes_are_those_in_the_file(name, scheme, tiny_llama, quantize_model, tmp_path):
    artifact, _, _ = exported(quantize_model(tiny_llama(), scheme(name)), tmp_path / "m")
    for layer in artifact.layers:
        kept = {k: v for k, v in stored_tensors(tmp_path / "m").items() if k.startswith(f"{layer.name}.")}
        written = sum(v.numel() * v.element_size() for k, v in kept.items() if not k.endswith("weight_shape"))
        assert compressed_tensors.stored_bytes(scheme(name), layer.shape) == layer.bytes == written


@pytest.mark.parametrize(
    ("scale", "dtype"),
    [("float32", torch.bfloat16), ("float16", torch.bfloat16), ("bfloat16", torch.float16)],
    ids=["float32-in-bfloat16", "float16-in-bfloat16", "bfloat16-in-float16"],
)
def test_scales_that_readers_would_round_are_refused(scale, dtype, tiny_llama, quantize_model, tmp_path):
    scheme = QuantScheme(weight=QuantSpec(bits=4, granularity="group", group_size=32, scale_dtype=scale))
    with pytest.raises(ValueError, match=f"{scale} scales in a {str(dtype).removeprefix('torch.')} model"):
        exported(quantize_model(tiny_llama(dtype), scheme), tmp_path / "m")


def test_a_layer_that_no_forward_reached_is_refused(scheme, tiny_llama, quantize_model, tmp_path):
    model = quantize_model(tiny_llama(), scheme("w4a16-g32"))
    with record(model) as recorded, torch.no_grad():
        model(TOKENS)
    del recorded["model.layers.1.mlp.up_proj"]
    with pytest.raises(ValueError, match=r"1 quantized layers were not recorded \(model.layers.1.mlp.up_proj\)"):
        export(model, recorded, tmp_path / "m")


def test_recording_leaves_no_hook_behind(scheme, tiny_llama, quantize_model):
    model = quantize_model(tiny_llama(), scheme("w4a16-g32"))
    with pytest.raises(KeyboardInterrupt), record(model):
        raise KeyboardInterrupt
    assert all(layer.weight_quantizer.recorder is None for layer in layers(model).values())


def test_a_float_model_is_written_whole(tiny_llama, tmp_path):
    model = tiny_llama(tie=True)
    write_float(model, tmp_path / "m", dtype=torch.bfloat16)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert loaded.dtype == torch.bfloat16
    assert "quantization_config" not in json.loads((tmp_path / "m" / "config.json").read_text())
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.to(torch.bfloat16)), name


def test_a_quantized_model_is_not_written_as_float(scheme, tiny_llama, quantize_model, tmp_path):
    with pytest.raises(ValueError, match="14 layers are quantized"):
        write_float(quantize_model(tiny_llama(), scheme("w4a16-g32")), tmp_path / "m")


@pytest.mark.parametrize("name", ["w8a16-channel", "w4a16-channel"])
def test_a_real_model_survives_export_with_its_tokenizer(name, scheme, quantize_model, stories_directory, tmp_path):
    model = quantize_model(AutoModelForCausalLM.from_pretrained(stories_directory), scheme(name))
    tokenizer = AutoTokenizer.from_pretrained(stories_directory)
    artifact, recorded, _ = exported(model, tmp_path / "m", tokenizer=tokenizer)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    text = AutoTokenizer.from_pretrained(tmp_path / "m")("Once upon a time, there was a dog.", return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(loaded(**text).logits, model(**text).logits)
    assert loaded.generation_config.eos_token_id == model.generation_config.eos_token_id
    # 172 inputs of down_proj fill 21.5 words at 4 bits.
    for layer, used in recorded.items():
        assert torch.equal(loaded.get_submodule(layer).weight, dequantize(used.codes, used.scale)), layer
    assert len(artifact.layers) == 35


def test_frozen_quantizers_export_like_training_ones(scheme, tiny_llama, quantize_model, tmp_path):
    model = quantize_model(tiny_llama(), scheme("w4a16-g32"))
    set_stage(model, Stage.FROZEN)
    exported(model, tmp_path / "m")


def test_the_format_is_found_by_scheme(scheme):
    found = {name: compressed_tensors.format_of(scheme(name)) for name in ("w4a16-g32", "w8a16-channel", "w4a8-g32")}
    assert set(found.values()) == {"pack-quantized"}
    assert compressed_tensors.format_of(scheme("w8a8-channel")) == "int-quantized"
