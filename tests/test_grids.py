"""The grids of few levels, narrow and odd: their arithmetic, their bytes, and their way from a model to an artifact."""

import json
import logging
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qat.calibration import GPTQ, RangeCalibration
from qat.estimators import SEQ
from qat.export import VerificationError, compressed_tensors, export, record
from qat.fake_quantizer import Stage, token_mask
from qat.functional import absmax_scale, dequantize, fake_quantize, quantize, store_scale
from qat.inference import PackedLinear, load_packed
from qat.insertion import insert, layers, set_stage
from qat.observers import mse_scale
from qat.packing import pack, unpack
from qat.scheme import QuantScheme, QuantSpec, SchemeMap

TOKENS = torch.arange(24)[None]
GRIDS = [("odd", bits) for bits in range(2, 8)] + [("narrow", bits) for bits in range(2, 9)]


def spec_of(grid: str, bits: int, **more) -> QuantSpec:
    return QuantSpec(bits=bits, granularity="channel", grid=grid, **more)


def codes_of(spec: QuantSpec) -> list[int]:
    return list(range(spec.qmin, spec.qmax + 1, spec.spacing))


# -- arithmetic ---------------------------------------------------------------------------------------


def test_the_grids_are_what_their_names_say():
    assert codes_of(spec_of("odd", 2)) == [-3, -1, 1, 3]
    assert codes_of(spec_of("narrow", 2)) == [-1, 0, 1]
    assert codes_of(spec_of("odd", 3)) == [-7, -5, -3, -1, 1, 3, 5, 7]
    assert codes_of(spec_of("narrow", 4)) == list(range(-7, 8))
    assert codes_of(spec_of("full", 2)) == [-2, -1, 0, 1]


@pytest.mark.parametrize(("grid", "bits"), GRIDS)
def test_a_value_gets_the_nearest_code_of_its_grid(grid, bits):
    spec = spec_of(grid, bits)
    x = torch.linspace(1.5 * spec.qmin, 1.5 * spec.qmax, 2003)[:, None]
    distance = (x.double() - torch.tensor(codes_of(spec)).double()).abs()
    codes = quantize(x, torch.ones(1), spec)
    assert set(codes.flatten().tolist()) == set(codes_of(spec))
    assert torch.equal((x.double() - codes).abs()[:, 0], distance.amin(1))


def test_halfway_between_odd_codes_is_the_upper_one_and_the_smallest_number_has_its_sign():
    x = torch.tensor([-4.0, -2.0, -0.0, 0.0, 2.0, 4.0, -1e-40, 1e-40, -1e-20, torch.inf, -torch.inf])
    assert quantize(x, torch.ones(1), spec_of("odd", 2)).tolist() == [-3, -1, 1, 1, 3, 3, -1, 1, -1, 3, -3]


@pytest.mark.parametrize(("bits", "k", "shift", "scales"), [(2, 4, 0.5, 4.0), (2, 3, 0.0, 1.5), (3, 8, 0.5, 8.0)])
def test_the_levels_are_those_of_the_paper(bits, k, shift, scales):
    """arXiv 2502.02631: alpha (round(clip(w / alpha, -1, 1) k / 2 - shift) + shift) 2 / k, clipped just inside of 1."""
    spec = spec_of("odd" if shift else "narrow", bits, scale_dtype="float32")
    w = np.random.default_rng(0).uniform(-2, 2, 5000).astype(np.float32)
    alpha = np.float32(0.75)
    v = np.clip(w.astype(np.float64) / alpha, -0.99, 0.99)
    levels = alpha * (np.round(v * k / 2 - shift) + shift) * 2 / k
    found = fake_quantize(torch.tensor(w), torch.tensor([alpha / scales]), spec)
    # Ours is code * (alpha / scales): two float32 roundings.
    np.testing.assert_allclose(found.numpy(), levels, rtol=2**-22, atol=0)
    assert len(np.unique(levels)) == k
    assert absmax_scale(torch.tensor([alpha]), spec).item() == np.float32(alpha / np.float32(scales))


@pytest.mark.parametrize(("grid", "bits"), GRIDS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dequantized_values_are_exact_and_stay_on_the_grid(grid, bits, dtype):
    spec = spec_of(grid, bits, scale_dtype=dtype)
    scale = store_scale(torch.rand(64, 1, generator=torch.Generator().manual_seed(0)) + 1e-3, spec)
    codes = torch.tensor(codes_of(spec)).float().expand(64, -1)
    values = dequantize(codes, scale)
    assert torch.equal(values.double(), codes.double() * scale.double())
    assert torch.equal(quantize(values, scale, spec), codes)


def test_the_squared_error_search_finds_the_scale_of_a_gaussian():
    """Max 1960, table I: the best four levels of a unit Gaussian, evenly spread, are 0.9957 apart."""
    weight = torch.randn(4, 1 << 14, generator=torch.Generator().manual_seed(0))
    spec = spec_of("odd", 2, scale_dtype="float32")
    scale = mse_scale(weight, (4, 1), spec, signed=True)
    assert (scale > 0).all()  # the grid is symmetric: a sign would change nothing
    # Two half steps. The search's last steps are about 0.5 % apart, and the optimum is flat.
    torch.testing.assert_close(2 * scale, torch.full((4, 1), 0.9957), rtol=0.03, atol=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: spec_of("even", 2), "grid must be one of full, narrow, odd, got 'even'"),
        (lambda: spec_of("odd", 8), "grid='odd' at 8 bits: its codes, up to 255, do not fit INT8"),
        (lambda: spec_of("narrow", 8, nested=(4,)), "nested=[4] with grid='narrow': only codes of the full grid nest"),
        (
            lambda: QuantScheme(weight=spec_of("odd", 2), input=QuantSpec(bits=8, granularity="tensor", grid="narrow")),
            "input grid must be full, got 'narrow'",
        ),
    ],
    ids=["unknown", "8 bits", "nested", "input"],
)
def test_grids_that_nothing_could_hold_are_refused(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


@pytest.mark.parametrize("name", ["w2a16-g64-odd", "w2a16-channel-narrow", "w3a8-g32-odd", "w4a16-g128"])
def test_a_scheme_is_parsed_from_its_name_grid_included(name):
    scheme = QuantScheme.parse(name)
    assert str(scheme) == name
    assert QuantScheme.from_dict(json.loads(json.dumps(scheme.to_dict()))) == scheme


def test_schemes_written_before_there_were_grids_are_full():
    written = QuantScheme.parse("w4a16-g128").to_dict()
    del written["weight"]["grid"]
    assert QuantScheme.from_dict({**written, "format_version": 1}) == QuantScheme.parse("w4a16-g128")


# -- bytes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(2, 8))
def test_odd_codes_take_no_more_room_than_plain_ones(bits):
    plain = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (5, 77), dtype=torch.int8)
    odd = 2 * plain + 1
    packed = pack(odd, bits, spacing=2)
    assert torch.equal(packed, pack(plain, bits))
    assert torch.equal(unpack(packed, bits, 77, spacing=2), odd)
    assert torch.equal(unpack(pack(odd, bits + 1), bits + 1, 77), odd)  # a bit more, and plain storage holds them too


@pytest.mark.parametrize(
    ("codes", "message"), [([[1, 0]], "codes of spacing 2 must be odd"), ([[1, 5]], "do not fit 2 bits")]
)
def test_codes_that_are_not_on_the_odd_grid_are_not_packed(codes, message):
    with pytest.raises(ValueError, match=message):
        pack(torch.tensor(codes, dtype=torch.int8), 2, spacing=2)


# -- from a model to an artifact ----------------------------------------------------------------------


def run_on(model):
    @torch.no_grad()
    def run() -> None:
        with token_mask(None):
            model(torch.arange(96).view(4, 24), use_cache=False)

    return run


CALIBRATIONS = {
    "gptq": GPTQ(),
    "weighted_mse": RangeCalibration("weighted_mse", importance=0.5, signed=True),
    "absmax": RangeCalibration("absmax", weight="absmax"),
}


@pytest.fixture
def trained(tiny_llama):
    """A tiny Llama after calibration and three steps of SEQ, with what its last forward recorded, and its logits."""

    def make(name: str, calibration: str = "gptq", dtype=torch.float32, **options):
        model = tiny_llama(dtype, **options)
        scheme = QuantScheme.parse(name)
        insert(model, SchemeMap(name=name, rules={"*lm_head": None, "*": scheme}), SEQ())
        CALIBRATIONS[calibration](model, run_on(model))
        before = {n: layer.weight_quantizer.scale.detach().clone() for n, layer in layers(model).items()}
        set_stage(model, Stage.TRAIN)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for _ in range(3):
            model(TOKENS, labels=TOKENS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert all(not torch.equal(layers(model)[n].weight_quantizer.scale, s) for n, s in before.items())
        with record(model) as recorded, torch.no_grad():
            logits = model(TOKENS).logits
        return model, recorded, logits

    return make


@pytest.mark.parametrize(
    ("name", "calibration", "dtype"),
    [
        ("w2a16-g64-odd", "gptq", torch.float32),
        ("w2a16-g64-odd", "weighted_mse", torch.bfloat16),
        ("w2a16-channel-odd", "absmax", torch.float32),
        ("w3a8-g32-odd", "weighted_mse", torch.float32),
        ("w2a16-g64-narrow", "gptq", torch.float32),
        ("w2a16-g64-narrow", "weighted_mse", torch.bfloat16),
        ("w8a8-channel-narrow", "absmax", torch.float32),
    ],
    ids=lambda value: str(value).removeprefix("torch."),
)
@torch.no_grad()
def test_what_seq_trains_is_what_is_loaded_bit_for_bit(name, calibration, dtype, trained, tmp_path):
    with torch.enable_grad():
        model, recorded, logits = trained(name, calibration, dtype, bias=True)
    artifact = export(model, recorded, tmp_path / "m")  # which verifies
    bits = QuantScheme.parse(name).weight.bits
    assert {row.scheme for row in artifact.layers} == {name}
    packed, _ = load_packed(tmp_path / "m")
    assert torch.equal(packed(TOKENS).logits, logits)
    spec = QuantScheme.parse(name).weight
    for layer, used in recorded.items():
        found = packed.get_submodule(layer)
        assert found.packed.shape[1] == found.in_features * bits // 32
        assert torch.equal(unpack(found.packed, bits, found.in_features, spec.spacing), used.codes)
    assert set(torch.cat([r.codes.flatten() for r in recorded.values()]).tolist()) <= set(codes_of(spec))


@torch.no_grad()
def test_gptq_leaves_every_weight_on_the_odd_grid_and_beats_rounding(tiny_llama):
    errors = {}
    clean = tiny_llama()(TOKENS).logits
    for kind in ("gptq", "weighted_mse"):
        model = tiny_llama()
        insert(model, SchemeMap(name="x", rules={"*lm_head": None, "*": QuantScheme.parse("w2a16-g64-odd")}), SEQ())
        CALIBRATIONS[kind](model, run_on(model))
        for layer in layers(model).values():
            scale = store_scale(layer.weight_quantizer.scale.detach(), layer.scheme.weight)
            on_grid = fake_quantize(layer.weight.detach(), scale, layer.scheme.weight)
            assert torch.equal(on_grid, layer.weight) is (kind == "gptq")
        set_stage(model, Stage.FROZEN)
        errors[kind] = float((model(TOKENS).logits - clean).norm())
    assert errors["gptq"] < errors["weighted_mse"]


@torch.no_grad()
def test_transformers_loads_ternary_weights_bit_for_bit(trained, tmp_path):
    with torch.enable_grad():
        model, recorded, logits = trained("w2a16-g64-narrow")
    export(model, recorded, tmp_path / "m")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "m")(TOKENS).logits, logits)


def test_odd_codes_are_written_in_qats_own_form_and_it_is_said(trained, tmp_path, caplog):
    model, recorded, _ = trained("w2a16-g64-odd")
    with caplog.at_level(logging.INFO, "qat.export"):
        export(model, recorded, tmp_path / "m")
    assert "compressed-tensors knows no odd grid (model.layers.0.self_attn.q_proj): written in qat's own" in caplog.text
    settings = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
    assert settings["quant_method"] == "qat"
    assert settings["config_groups"]["group_0"]["weights"]["grid"] == "odd"
    assert not (tmp_path / "m" / "model.safetensors").exists()
    stored = load_file(tmp_path / "m" / "qat.safetensors")["model.layers.0.mlp.up_proj.weight_packed"]
    assert stored.shape == (256, 128 * 2 // 32)


def test_odd_codes_written_as_others_are_caught(trained, tmp_path, monkeypatch):
    model, recorded, _ = trained("w2a16-g64-odd")
    monkeypatch.setattr(compressed_tensors, "pack", lambda codes, bits, spacing: pack(-codes, bits, spacing))
    with pytest.raises(VerificationError, match="14 of 14 layers are not what was trained"):
        export(model, recorded, tmp_path / "m")


@torch.no_grad()
def test_a_backend_never_takes_odd_codes_for_plain_ones(trained, tmp_path, caplog):
    """At 4 bits, for which there are kernels."""
    with torch.enable_grad():
        model, recorded, logits = trained("w4a16-g32-odd", "weighted_mse")
    export(model, recorded, tmp_path / "m")
    with caplog.at_level(logging.INFO, "qat.inference"):
        packed, _ = load_packed(tmp_path / "m", backend="torch")
    assert "14 layers on reference" in caplog.text
    assert sum(isinstance(m, PackedLinear) for m in packed.modules()) == 14
    assert torch.equal(packed(TOKENS).logits, logits)
