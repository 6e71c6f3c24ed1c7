import hashlib
import json
import logging
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from qat.export import export, record, write_float
from qat.inference import PackedLinear, load_packed
from qat.inference.load import empty_model

TOKENS = torch.arange(24)[None]
SCHEMES = [
    "w4a16-g128",
    "w4a16-g32",
    "w4a16-channel",
    "w8a16-channel",
    "w8a16-g64",
    "w4a8-g128",
    "w8a8-channel",
    "w8a8-channel-static",
    "w3a16-g128",
    "w5a8-g32",
]


@pytest.fixture
def artifact(scheme, tiny_llama, quantize_model, tmp_path):
    """Makes an exported directory, and the logits of the training forward it was verified with."""

    def make(name: str = "w4a16-g32", dtype: torch.dtype = torch.float32, **options):
        model = quantize_model(tiny_llama(dtype, **options), scheme(name))
        with record(model) as recorded, torch.no_grad():
            logits = model(TOKENS).logits
        export(model, recorded, tmp_path / "m")
        return tmp_path / "m", logits

    return make


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SCHEMES)
@torch.no_grad()
def test_the_reference_serves_the_logits_of_training(name, dtype, artifact):
    directory, logits = artifact(name, dtype, bias=True, tie=True)
    model, tokenizer = load_packed(directory)
    assert tokenizer is None
    assert not model.training
    assert sum(isinstance(m, PackedLinear) for m in model.modules()) == 14
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model(TOKENS).logits, logits)


@pytest.mark.parametrize(
    ("name", "operator"),
    [
        ("w4a16-g32", "_weight_int4pack_mm_for_cpu"),
        ("w8a16-channel", "_weight_int8pack_mm"),
        ("w8a8-channel", "_int_mm"),
        ("w8a8-channel-static", "_int_mm"),
        ("w4a8-g128", "reference (no torch operator fits the scheme)"),
        ("w8a16-g64", "reference (no torch operator fits the scheme)"),
    ],
)
@torch.no_grad()
def test_the_torch_backend_computes_the_same_layers_and_says_how(name, operator, artifact, caplog):
    directory, _ = artifact(name, bias=True)
    with caplog.at_level(logging.INFO, "qat.inference"):
        model, _ = load_packed(directory, backend="torch")
    assert [r.getMessage() for r in caplog.records] == [f"backend torch: 14 layers on {operator}"]
    reference, _ = load_packed(directory)
    x = torch.randn(3, 7, 128)
    for layer in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"):
        expected, found = reference.get_submodule(layer)(x), model.get_submodule(layer)(x)
        # Sums of 128 products, |x w| < 1, in another order: 128 * 2^-24 of the sum of magnitudes.
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)


@torch.no_grad()
def test_the_torch_backend_never_quantizes_activations_of_a_weight_only_layer(artifact):
    directory, _ = artifact("w8a16-channel")
    layer = load_packed(directory, backend="torch")[0].get_submodule("model.layers.0.mlp.up_proj")
    x = torch.zeros(1, 128)
    x[0, 1] = 1e-3
    small = layer(x)
    x[0, 0] = 1e3  # INT8 activations would round 1e-3 beside it to zero
    large = layer(x)
    x[0, 1] = 0
    # 1e3 * 0.1 leaves 2^-18 of absolute precision to float32; the small products are up to 1e-4.
    torch.testing.assert_close(large - layer(x), small, rtol=0, atol=2**-17)
    assert small.abs().max() > 2**-15


def test_scales_keep_their_dtype_whatever_the_model_becomes(artifact):
    directory, _ = artifact("w8a8-channel-static", bias=True)
    model, _ = load_packed(directory, dtype=torch.float16)
    layer = model.get_submodule("model.layers.0.self_attn.q_proj").to(torch.float32).half().double()
    assert (layer.scale.dtype, layer.input_scale.dtype) == (torch.bfloat16, torch.bfloat16)
    assert (layer.packed.dtype, layer.bias.dtype) == (torch.int32, torch.float64)
    assert model.model.norm.weight.dtype == torch.float16


def test_rotary_frequencies_are_computed_not_garbage(artifact, tiny_llama):
    model, _ = load_packed(artifact()[0])
    assert torch.equal(model.model.rotary_emb.inv_freq, tiny_llama().model.rotary_emb.inv_freq)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from Linux's /proc")
def test_float_weights_of_packed_layers_never_take_memory(scheme, tmp_path):
    config = LlamaConfig(hidden_size=1024, intermediate_size=8192, num_hidden_layers=4, vocab_size=32)
    config.dtype = torch.float32
    config.save_pretrained(tmp_path)
    names = [f"model.layers.{i}.mlp.{kind}_proj" for i in range(4) for kind in ("gate", "up", "down")]
    before = resident_bytes()
    model = empty_model(tmp_path, dict.fromkeys(names, scheme("w4a16-g128")), None)
    # 400 MB of float32 weights were allocated and freed; the interpreter's own objects need a few.
    assert resident_bytes() - before < 32e6
    assert model.get_submodule(names[0]).packed.shape == (8192, 128)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_a_packed_layer_names_its_scheme(artifact):
    model, _ = load_packed(artifact()[0])
    assert "PackedLinear(in_features=128, out_features=128, w4a16-g32)" in repr(model)


@torch.no_grad()
def test_a_float_directory_loads_too(tiny_llama, tmp_path):
    model = tiny_llama(tie=True)
    write_float(model, tmp_path / "m")
    assert torch.equal(load_packed(tmp_path / "m")[0](TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize("name", SCHEMES)
@torch.no_grad()
def test_a_directory_without_a_side_file_is_read_by_its_config(name, artifact, caplog):
    directory, logits = artifact(name)
    (directory / "qat.json").unlink()
    model, _ = load_packed(directory)
    assert torch.equal(model(TOKENS).logits, logits)
    assert "has no qat.json" in caplog.text


def test_a_foreign_directory_that_does_not_fit_is_refused_by_layer(artifact):
    directory, _ = artifact()
    (directory / "qat.json").unlink()
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["type"] = "float"
    edit(directory / "config.json", **config)
    with pytest.raises(ValueError, match=r"down_proj is quantized in a way .* bits=4.*floats have 8 bits"):
        load_packed(directory)


def test_foreign_targets_may_be_regular_expressions(artifact):
    directory, _ = artifact()
    (directory / "qat.json").unlink()
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["targets"] = [r"re:.*self_attn", r"re:model\..*_proj$"]
    edit(directory / "config.json", **config)
    assert sum(isinstance(m, PackedLinear) for m in load_packed(directory)[0].modules()) == 14


@torch.no_grad()
def test_shards_of_a_foreign_directory_are_one_model(artifact):
    directory, logits = artifact()
    (directory / "qat.json").unlink()
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)  # a layer's codes and its scales may lie in different shards
    index = {name: f"model-{number % 2 + 1:05}-of-00002.safetensors" for number, name in enumerate(names)}
    for shard in set(index.values()):
        save_file({name: tensors[name] for name in names if index[name] == shard}, directory / shard)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    assert torch.equal(load_packed(directory)[0](TOKENS).logits, logits)
    (directory / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model-00002-of-00002.safetensors is missing"):
        load_packed(directory)


# -- damaged directories -------------------------------------------------------------------------------------


def edit(path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_truncated_file_is_refused(artifact):
    directory, _ = artifact()
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"model.safetensors: \d+ bytes of \d+: truncated; copy it again"):
        load_packed(directory)


def test_a_file_with_one_changed_bit_is_refused(artifact):
    directory, _ = artifact()
    path = directory / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"model.safetensors: its SHA-256 is not the one in qat.json"):
        load_packed(directory)


def test_every_file_of_an_export_is_known_by_its_hash(artifact):
    directory, _ = artifact()
    side = json.loads((directory / "qat.json").read_text())
    found = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in directory.iterdir() if p.name != "qat.json"}
    assert {name: written["sha256"] for name, written in side["files"].items()} == found
    assert "config.json" in found


def test_a_config_that_was_tampered_with_is_refused_by_name(artifact):
    directory, _ = artifact()
    edit(directory / "config.json", rms_norm_eps=0.1)  # the model would load, and answer differently
    with pytest.raises(ValueError, match=r"config.json: (\d+ bytes of|its SHA-256 is not)"):
        load_packed(directory)


def test_a_damaged_side_file_is_named(artifact):
    directory, _ = artifact()
    (directory / "qat.json").write_text('{"format_version":')
    with pytest.raises(ValueError, match=r"qat.json is damaged"):
        load_packed(directory)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_missing_file_is_named(name, artifact):
    directory, _ = artifact()
    (directory / name).unlink()
    with pytest.raises(ValueError, match=f"{name} is missing"):
        load_packed(directory)


def test_a_newer_format_is_refused_by_version(artifact):
    directory, _ = artifact()
    edit(directory / "qat.json", format_version=2, qat_version="9.0")
    with pytest.raises(ValueError, match=r"format 2 is newer than this qat reads \(1\): upgrade qat to 9.0"):
        load_packed(directory)


def test_a_config_of_another_shape_is_refused(artifact):
    directory, _ = artifact()
    (directory / "qat.json").unlink()  # which would notice that the config is another
    edit(directory / "config.json", intermediate_size=320)
    with pytest.raises(ValueError, match=r"the model has .*config.json differs"):
        load_packed(directory)


def test_tensors_that_the_file_lacks_are_named(artifact):
    directory, _ = artifact()
    (directory / "qat.json").unlink()
    edit(directory / "config.json", num_hidden_layers=3)
    with pytest.raises(ValueError, match=r"9 tensors are missing \(model.layers.2."):
        load_packed(directory)


def test_an_unknown_backend_is_refused(artifact):
    with pytest.raises(ValueError, match="backend must be one of reference, torch, cpu, cuda, auto, got 'tpu'"):
        load_packed(artifact()[0], backend="tpu")
