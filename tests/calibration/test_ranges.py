import pytest
import torch
from torch import nn

import qat.calibration.ranges as ranges
import qat.observers as observers
from qat.calibration import CALIBRATIONS, RangeCalibration
from qat.fake_quantizer import Stage, token_mask
from qat.functional import absmax_scale, fake_quantize
from qat.insertion import insert, layers, quantizers
from qat.scheme import QuantScheme, QuantSpec, SchemeMap

WEIGHTS = {
    "tensor": QuantSpec(bits=4, granularity="tensor"),
    "channel": QuantSpec(bits=4, granularity="channel"),
    "group": QuantSpec(bits=4, granularity="group", group_size=8),
}
STATIC = QuantSpec(bits=8, granularity="tensor")
DYNAMIC = QuantSpec(bits=8, granularity="token", dynamic=True, absmax_rule="qmax")


def network(weight="group", input=None) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 8))
    insert(model, SchemeMap(name="test", rules={"*": QuantScheme(weight=WEIGHTS[weight], input=input)}))
    return model


def batches(padding: float = 0.0):
    generator = torch.Generator().manual_seed(1)
    found = []
    for real in (4, 2, 0):
        x = torch.randn(3, 4, 16, generator=generator)
        mask = (torch.arange(4) < real).expand(3, 4)
        found.append((torch.where(mask[..., None], x, padding), mask))
    return found


def calibrate(calibration, model, data=None):
    def run():
        for x, mask in batches() if data is None else data:
            with token_mask(mask):
                model(x)

    calibration(model, run)
    return [q.scale.detach().clone() for q in quantizers(model) if q.scale is not None]


def view(layer) -> torch.Tensor:
    """Its weight as rows that share a scale."""
    scale = layer.weight_quantizer.scale
    return layer.weight.detach().reshape(scale.numel(), -1)


@pytest.mark.parametrize("weight", list(WEIGHTS))
def test_absmax_covers_each_group(weight):
    model = network(weight)
    calibrate(CALIBRATIONS["absmax"], model)
    for layer in layers(model).values():
        expected = absmax_scale(view(layer).abs().amax(1), layer.scheme.weight)
        assert torch.equal(layer.weight_quantizer.scale.flatten(), expected)


@pytest.mark.parametrize("weight", list(WEIGHTS))
def test_squared_error_shrinks_in_every_group(weight):
    errors = {}
    for name in ("absmax", "mse"):
        model = network(weight)
        calibrate(CALIBRATIONS[name], model)
        errors[name] = torch.cat(
            [
                (fake_quantize(view(m), m.weight_quantizer.scale.detach().reshape(-1, 1), m.scheme.weight) - view(m))
                .square()
                .sum(1)
                for m in layers(model).values()
            ]
        )
    assert (errors["mse"] <= errors["absmax"]).all()
    assert errors["mse"].sum() < errors["absmax"].sum()


@pytest.mark.parametrize("weight", ["channel", "group"])
@pytest.mark.parametrize("name", ["mse", "weighted_mse"])
def test_searching_in_chunks_changes_nothing(weight, name, monkeypatch):
    whole = calibrate(CALIBRATIONS[name], network(weight))
    monkeypatch.setattr(observers, "_CHUNK", 40)  # one or two rows at a time
    for a, b in zip(whole, calibrate(CALIBRATIONS[name], network(weight)), strict=True):
        assert torch.equal(a, b)


def test_a_tensors_only_scale_sees_all_chunks(monkeypatch):
    whole = calibrate(CALIBRATIONS["mse"], network("tensor"))
    monkeypatch.setattr(observers, "_CHUNK", 40)
    for a, b in zip(whole, calibrate(CALIBRATIONS["mse"], network("tensor")), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("power", [0.5, 1.0])
@pytest.mark.parametrize("weight", list(WEIGHTS))
def test_importance_minimises_the_error_weighted_by_the_layers_inputs(weight, power):
    scales = torch.logspace(-2, 1, 16)
    data = [(x * scales, mask) for x, mask in batches()]
    real = torch.cat([x[mask] for x, mask in data])
    moment = real.double().square().sum(0).pow(power)
    errors = {}
    calibrations = {"mse": CALIBRATIONS["mse"], "weighted_mse": RangeCalibration("weighted", importance=power)}
    for name, calibration in calibrations.items():
        model = network(weight)
        calibrate(calibration, model, data)
        layer = model[0]
        quantized = fake_quantize(layer.weight.detach(), layer.weight_quantizer.scale.detach(), layer.scheme.weight)
        error = (quantized - layer.weight.detach()).double().square() * moment
        errors[name] = error.reshape(layer.weight_quantizer.scale.numel(), -1).sum(1)
    # Sums of float32: a tie may fall either way by their rounding.
    assert (errors["weighted_mse"] <= errors["mse"] * (1 + 1e-5)).all()
    assert errors["weighted_mse"].sum() < 0.99 * errors["mse"].sum()


@pytest.mark.parametrize("weight", list(WEIGHTS))
def test_a_signed_scale_is_never_worse(weight, monkeypatch):
    # Only the grid, of which the unsigned one is a part: each refines around a best point of its own.
    monkeypatch.setattr(observers, "_REFINED", 1)
    errors, scales = {}, {}
    for signed in (False, True):
        model = network(weight)
        calibrate(RangeCalibration("test", signed=signed), model)
        layer = model[0]
        scale = scales[signed] = layer.weight_quantizer.scale.detach()
        quantized = fake_quantize(layer.weight.detach(), scale, layer.scheme.weight)
        errors[signed] = (quantized - layer.weight.detach()).double().square().reshape(scale.numel(), -1).sum(1)
    assert (scales[False] > 0).all()
    # Sums of float32: a tie may fall either way by their rounding.
    assert (errors[True] <= (1 + 1e-5) * errors[False]).all()
    if weight != "tensor":
        assert (scales[True] < 0).any() and errors[True].sum() < 0.99 * errors[False].sum()


def test_a_group_with_one_large_positive_weight_gets_a_negative_scale():
    model = network("group")
    with torch.no_grad():
        model[0].weight.mul_(16).round_().div_(8)  # multiples of 1/8 up to 1/2, and 1 first in each group:
        model[0].weight[:, ::8] = 1.0  # exact with a scale of -1/8, and with no positive one
    calibrate(RangeCalibration("test", signed=True), model)
    scale = model[0].weight_quantizer.scale
    assert (scale < 0).all()
    assert (fake_quantize(model[0].weight, scale, WEIGHTS["group"])[:, ::8] / scale == -8).all()


@pytest.mark.parametrize("observer", list(ranges.OBSERVERS))
@pytest.mark.parametrize("padding", [1e4, torch.nan], ids=["huge", "NaN"])
@pytest.mark.parametrize("importance", [0.0, 0.5], ids=["plain", "importance"])
def test_padding_never_moves_a_scale(observer, padding, importance):
    calibration = RangeCalibration("test", importance=importance, input=observer)
    clean = calibrate(calibration, network(input=STATIC), batches(0.0))
    dirty = calibrate(calibration, network(input=STATIC), batches(padding))
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a, b)


def test_input_moments_are_those_of_the_real_tokens():
    model, moments = network(), {}
    data = batches(1e4)
    with ranges._input_moments(model, moments):
        for x, mask in data:
            with token_mask(mask):
                model(x)
    real = torch.cat([x[mask] for x, mask in data])
    # 18 float32 additions.
    torch.testing.assert_close(moments["0"], real.square().sum(0), rtol=18 * 2**-23, atol=0)
    assert moments["2"].shape == (24,)
    assert not model[0]._forward_pre_hooks


def test_a_layer_called_by_keyword_is_observed_too():
    model, moments = network(), {}
    with ranges._input_moments(model, moments):
        model[0](input=torch.ones(2, 16))
    assert moments["0"].tolist() == [2.0] * 16


def test_static_scales_cover_the_largest_real_activation():
    model = network(input=STATIC)
    calibrate(RangeCalibration("test", weight="absmax", input="absmax"), model)
    real = torch.cat([x[mask] for x, mask in batches()])
    expected = absmax_scale(real.abs().amax().view(1), STATIC)
    assert torch.equal(model[0].input_quantizer.scale, expected)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", list(CALIBRATIONS))
def test_a_damaged_weight_names_the_calibration_and_the_layer(bad, name):
    model = network()
    with torch.no_grad():
        model[2].weight[1, 3] = bad
    with pytest.raises(ValueError, match=f"calibration {name}, layer 2: NaN or infinite values were observed"):
        calibrate(CALIBRATIONS[name], model)


@pytest.mark.parametrize("calibration", ["static", "importance"])
def test_damaged_activations_name_the_layer(calibration):
    model = network(input=STATIC if calibration == "static" else None)
    chosen = RangeCalibration("test", importance=float(calibration == "importance"))
    with pytest.raises(ValueError, match="calibration test, layer 0: NaN or infinite values were observed"):
        calibrate(chosen, model, [(torch.full((1, 2, 16), torch.nan), torch.ones(1, 2))])


@pytest.mark.parametrize("calibration", ["static", "importance"])
@pytest.mark.parametrize("data", [[], [(torch.ones(2, 4, 16), torch.zeros(2, 4))]], ids=["no batch", "only padding"])
def test_data_without_a_usable_token_says_so(calibration, data):
    model = network(input=STATIC if calibration == "static" else None)
    chosen = RangeCalibration("test", importance=float(calibration == "importance"))
    with pytest.raises(ValueError, match="layer 0: no value was observed: the calibration data has no usable token"):
        calibrate(chosen, model, data)


@pytest.mark.parametrize(
    ("name", "input", "needed"),
    [
        ("absmax", None, False),
        ("mse", None, False),
        ("mse", DYNAMIC, False),
        ("mse", STATIC, True),
        ("weighted_mse", None, True),
    ],
    ids=["absmax", "mse", "dynamic input", "static input", "importance"],
)
def test_data_is_run_only_where_it_is_needed(name, input, needed):
    model, ran = network(input=input), []

    def run():
        ran.append(1)
        model(torch.randn(1, 2, 16))

    assert CALIBRATIONS[name].needs_data(model) is needed
    CALIBRATIONS[name](model, run)
    assert bool(ran) is needed


def test_afterwards_the_model_is_float_again_and_nothing_watches():
    model = network(input=STATIC)
    x = torch.randn(2, 16)
    before = model(x)
    calibrate(CALIBRATIONS["weighted_mse"], model)
    assert {q.current_stage for q in quantizers(model)} == {Stage.FLOAT}
    assert all(q.observer is None for q in quantizers(model))
    assert torch.equal(model(x), before)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_calibrating_twice_gives_the_same_scales():
    model = network(input=STATIC)
    first = calibrate(CALIBRATIONS["weighted_mse"], model)
    for a, b in zip(first, calibrate(CALIBRATIONS["weighted_mse"], model), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weight": "ema"}, "weight must be absmax or mse, got 'ema'"),
        ({"input": "max"}, "input must be one of absmax, ema, mse, percentile, entropy, got 'max'"),
        ({"weight": "absmax", "importance": 0.5}, "importance weights a squared error; use weight=mse with it"),
        ({"importance": 1.5}, "importance must be in"),
        ({"input": "percentile", "percentile": 0.9999}, "percentile must be above 50 and at most 100, got 0.9999"),
    ],
    ids=["weight", "input", "importance", "range", "percentile"],
)
def test_contradictory_calibrations_are_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=f"calibration mine: {message}"):
        RangeCalibration("mine", **fields)


def test_calibrations_are_called_what_they_are():
    assert {name: c.name for name, c in CALIBRATIONS.items()} == {name: name for name in CALIBRATIONS}
