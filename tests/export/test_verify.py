import json
import re
import shutil
import struct
import tempfile
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from qat.estimators import LSQ, STE
from qat.export import VerificationError, compressed_tensors, export, fold, record, verify
from qat.export.verify import read_safetensors
from qat.fake_quantizer import Stage
from qat.functional import absmax_scale
from qat.insertion import layers
from qat.nn import FakeQuantLinear
from qat.packing import pack
from qat.scheme import QuantScheme, QuantSpec

LAYER = "model.layers.0.self_attn.q_proj"
TOKENS = torch.arange(24)[None]


@pytest.fixture
def recorded_model(scheme, tiny_llama, quantize_model):
    """Makes a model and the record of one training forward."""

    def make(name: str = "w4a16-g32", dtype: torch.dtype = torch.float32):
        model = quantize_model(tiny_llama(dtype), scheme(name))
        with record(model) as recorded, torch.no_grad():
            model(TOKENS)
        return model, recorded

    return make


# -- the fold holds, whatever the weights and the scales ------------------------------------------------------

WEIGHTS = {
    "normal": lambda w: w,
    "zero rows": lambda w: w * (torch.arange(len(w)) % 2)[:, None],
    "all zero": torch.zeros_like,
    "subnormal": lambda w: w * 1e-40,
    "huge": lambda w: w * 1e30,
    "mixed": lambda w: w * 10.0 ** torch.linspace(-38, 30, w.numel()).view_as(w),
    "ties": lambda w: (w * 4).round() / 2,
}
SCALES = {
    "absmax": lambda s: s,
    "shrunk": lambda s: s * 0.37,
    "subnormal": lambda s: torch.full_like(s, 1e-42),
    "zero": torch.zeros_like,
    "negative": lambda s: -s,
    "huge": lambda s: torch.full_like(s, 1e30),
    "half": lambda s: torch.full_like(s, 0.5),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@settings(deadline=None, max_examples=150)
@given(
    rows=st.integers(1, 6),
    groups=st.integers(1, 4),
    size=st.sampled_from([None, 1, 8, 20, 32, 64]),
    bits=st.integers(2, 8),
    inputs=st.sampled_from([None, 8]),
    weight_dtype=st.sampled_from(list(DTYPES)),
    scale_dtype=st.sampled_from(list(DTYPES)),
    weights=st.sampled_from(list(WEIGHTS)),
    scales=st.sampled_from(list(SCALES)),
    follow=st.booleans(),
    seed=st.integers(0, 100),
)
def test_the_file_holds_what_training_used(
    rows, groups, size, bits, inputs, weight_dtype, scale_dtype, weights, scales, follow, seed
):
    weight_spec = QuantSpec(
        bits=bits, granularity="group" if size else "channel", group_size=size, scale_dtype=scale_dtype
    )
    input_spec = QuantSpec(bits=8, granularity="tensor") if inputs else None
    torch.manual_seed(seed)
    linear = nn.Linear(groups * size if size else 13 * groups, rows, bias=False)
    linear.weight.data = WEIGHTS[weights](linear.weight.data).to(DTYPES[weight_dtype])
    scheme = QuantScheme(weight=weight_spec, input=input_spec)
    layer = FakeQuantLinear.adopt(linear, scheme, STE(follow="absmax") if follow else LSQ())
    absmax = layer.weight.detach().float().unflatten(-1, (layer.weight_quantizer.scale.shape[1], -1)).abs().amax(-1)
    layer.weight_quantizer.scale.data = SCALES[scales](absmax / weight_spec.qmax)
    for quantizer in layer.quantizers:
        quantizer.set_stage(Stage.TRAIN)
    model = nn.Sequential(OrderedDict(layer=layer))
    with record(model) as recorded, torch.no_grad():
        model(torch.zeros(1, linear.in_features, dtype=DTYPES[weight_dtype]))
    used = recorded["layer"]
    if not (torch.isfinite(used.scale).all() and torch.isfinite(layer.weight).all()):
        with pytest.raises(ValueError, match=r"layer: a (weight|scale|scale rounded to float16) is NaN or infinite"):
            fold(layer, used.weight_dtype, "layer")
        return
    folded = {"layer": fold(layer, used.weight_dtype, "layer")}
    with tempfile.TemporaryDirectory() as target:
        config = {"quantization_config": compressed_tensors.quantization_config(model, folded)}
        (Path(target) / "config.json").write_text(json.dumps(config))
        tensors = compressed_tensors.layer_tensors(folded["layer"])
        save_file({f"layer.{key}": tensor for key, tensor in tensors.items()}, Path(target) / "model.safetensors")
        (check,) = verify(target, recorded)
    assert check.passed
    assert check.shape == (rows, linear.in_features)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("where", ["weight", "scale"])
def test_values_that_are_not_finite_are_refused_by_layer(value, where, recorded_model, tmp_path):
    model, recorded = recorded_model()
    layer = layers(model)[LAYER]
    (layer.weight if where == "weight" else layer.weight_quantizer.scale).data[3, 1] = value
    with pytest.raises(ValueError, match=f"{LAYER}: a {where} is NaN or infinite"):
        export(model, recorded, tmp_path / "m")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.bool, torch.int16, torch.float64], ids=str)
def test_a_buffer_of_the_users_of_any_dtype_does_not_disturb(dtype, recorded_model, tmp_path):
    model, recorded = recorded_model()
    model.register_buffer("own", torch.tensor([1, 0]).to(dtype))
    assert all(layer.weight_error is not None for layer in export(model, recorded, tmp_path / "m").layers)


# -- planted faults ------------------------------------------------------------------------------------------


def refused(model, recorded, target, *expected: str) -> None:
    """The export fails verification, says `expected`, and keeps what it refused under a name of its own."""
    with pytest.raises(VerificationError) as failure:
        export(model, recorded, target)
    for text in expected:
        assert text in str(failure.value)
    (kept,) = target.parent.iterdir()
    assert kept.name.startswith(f"{target.name}.refused-") and str(kept) in str(failure.value)
    assert {"config.json", "model.safetensors", "qat.json"} <= {path.name for path in kept.iterdir()}
    shutil.rmtree(kept)


def swapped_nibbles(codes, bits, spacing):
    words = pack(codes, bits)
    return (words & 0x0F0F0F0F) << 4 | (words >> 4) & 0x0F0F0F0F


def without_offset(codes, bits, spacing):
    return pack(codes, bits) ^ torch.tensor(0x88888888 - 2**32, dtype=torch.int32)


def as_two_halves(codes, bits, spacing):
    """GGUF's order: element j beside element j + 16."""
    return pack(codes.unflatten(1, (-1, 2, 16)).transpose(2, 3).flatten(1), bits)


@pytest.mark.parametrize("fault", [swapped_nibbles, without_offset, as_two_halves], ids=lambda f: f.__name__)
def test_codes_packed_another_way_are_caught(fault, recorded_model, tmp_path, monkeypatch):
    monkeypatch.setattr(compressed_tensors, "pack", fault)
    refused(*recorded_model(), tmp_path / "m", "14 of 14 layers", f"{LAYER}: ")


def test_float32_masters_folded_after_a_bfloat16_forward_are_caught(recorded_model, tmp_path):
    masters, _ = recorded_model()
    lowered, _ = recorded_model()
    lowered.to(torch.bfloat16)
    with record(lowered) as recorded, torch.no_grad():
        lowered(TOKENS)
    assert {used.weight_dtype for used in recorded.values()} == {torch.bfloat16}
    claimed = {name: replace(used, weight_dtype=torch.float32) for name, used in recorded.items()}
    refused(masters, claimed, tmp_path / "m", LAYER, "codes and 0 scales differ")
    export(masters, recorded, tmp_path / "m")


def test_scales_recomputed_from_the_absolute_maximum_are_caught(recorded_model, tmp_path):
    model, recorded = recorded_model()
    layer = layers(model)[LAYER]
    absmax = layer.weight.detach().unflatten(-1, (4, -1)).abs().amax(-1)
    layer.weight_quantizer.set_scale(absmax_scale(absmax, layer.scheme.weight))
    refused(model, recorded, tmp_path / "m", "1 of 14 layers", f"{LAYER}: ", " 512 scales differ")


def test_a_static_input_scale_that_moved_is_caught(recorded_model, tmp_path):
    model, recorded = recorded_model("w8a8-channel-static")
    layers(model)[LAYER].input_quantizer.set_scale(torch.tensor([0.04]))
    refused(model, recorded, tmp_path / "m", f"{LAYER}: 0 codes and 1 scales differ")


def test_a_weight_that_moved_after_the_forward_is_caught(recorded_model, tmp_path):
    model, recorded = recorded_model()
    layers(model)[LAYER].weight.data[0, 0] *= -1
    refused(model, recorded, tmp_path / "m", f"{LAYER}: 1 codes and 0 scales differ")


def test_a_layer_without_a_record_is_caught(recorded_model, tmp_path):
    model, recorded = recorded_model()
    export(model, recorded, tmp_path / "m")
    del recorded[LAYER]
    with pytest.raises(VerificationError, match=f"{LAYER}: quantized in the file, but training recorded nothing"):
        verify(tmp_path / "m", recorded)


@pytest.mark.parametrize(
    ("tensor", "byte", "expected"),
    [("weight_packed", 100, "1 codes and 0 scales"), ("weight_scale", 8, "0 codes and 1 scales")],
    ids=["code", "scale"],
)
def test_one_flipped_bit_is_caught(tensor, byte, expected, recorded_model, tmp_path):
    model, recorded = recorded_model()
    export(model, recorded, tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    content = bytearray(path.read_bytes())
    length = struct.unpack("<Q", content[:8])[0]
    begin = json.loads(content[8 : 8 + length])[f"{LAYER}.{tensor}"]["data_offsets"][0]
    content[8 + length + begin + byte] ^= 1
    path.write_bytes(content)
    with pytest.raises(VerificationError, match=f"^1 of 14 layers .*\n  {LAYER}: {expected} differ"):
        verify(tmp_path / "m", recorded)


@pytest.mark.parametrize("kept", [4, 100, -1], ids=["length", "header", "data"])
def test_a_truncated_file_is_caught(kept, recorded_model, tmp_path):
    model, recorded = recorded_model()
    export(model, recorded, tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(VerificationError, match=r"truncated inside its header|but its header promises"):
        verify(tmp_path / "m", recorded)


def test_a_config_that_contradicts_the_tensors_is_caught(recorded_model, tmp_path):
    model, recorded = recorded_model()
    export(model, recorded, tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] = 64
    path.write_text(json.dumps(config))
    with pytest.raises(VerificationError, match=r"scales have shape \(128, 4\), its config says \(128, 2\)"):
        verify(tmp_path / "m", recorded)


def test_the_decoder_shares_no_code_with_the_encoder():
    for file, second in (("verify.py", "from qat.export.verify_cache import differing\n"), ("verify_cache.py", "")):
        source = (Path(compressed_tensors.__file__).parent / file).read_text()
        run_time = re.sub(r"if TYPE_CHECKING:\n(    from qat.*\n)+", "", source.replace(second, ""))
        assert "TYPE_CHECKING:" not in run_time
        assert "from qat" not in run_time
        assert "import torch" not in run_time


def test_bfloat16_is_decoded_exactly(tmp_path):
    values = torch.randn(1000).to(torch.bfloat16)
    save_file({"x": values}, tmp_path / "x.safetensors")
    assert np.array_equal(read_safetensors(tmp_path / "x.safetensors")["x"], values.float().numpy())
