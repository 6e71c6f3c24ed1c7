"""GPTQ against least squares solved by numpy, against all possible roundings, and against what breaks it."""

import itertools

import numpy as np
import pytest
import torch
from llama_data import G32, batches, inserted, logits, runner

from qat.calibration import GPTQ, RangeCalibration
from qat.calibration.gptq import Grams, gptq_codes, inverse_factor
from qat.calibration.method import write_back
from qat.export import fold
from qat.fake_quantizer import Stage
from qat.functional import absmax_scale, dequantize, fake_quantize, quantize
from qat.insertion import layers, quantizers, set_stage
from qat.scheme import QuantScheme, QuantSpec


def spec(bits: int = 4, size: int | None = None) -> QuantSpec:
    return QuantSpec(bits=bits, granularity="group" if size else "channel", group_size=size)


def problem(out: int, inputs: int, kind: QuantSpec, seed: int = 0, tokens: int = 64):
    """A weight, correlated inputs (tokens, inputs), and absmax scales."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, inputs, generator=generator)
    x = torch.randn(tokens, inputs, generator=generator) @ torch.randn(inputs, inputs, generator=generator)
    scale = absmax_scale(weight.unflatten(-1, (kind.groups(inputs), -1)).abs().amax(-1), kind)
    return weight, x, scale


def cost(weight, x, codes, scale) -> float:
    """||X (W - Q)^T||^2, float64."""
    return float((x.double() @ (weight - dequantize(codes, scale)).double().T).square().sum())


def test_products_of_inputs_are_summed_in_float32_under_autocast_too(tiny_llama):
    model = inserted(tiny_llama())
    grams = Grams(layers(model))
    seen: dict[str, list[torch.Tensor]] = {}
    for name, layer in layers(model).items():
        layer.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, []).append(args[0]))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16), grams.watch():
        for batch in batches():
            model(input_ids=batch["input_ids"], use_cache=False)
    for name, inputs in seen.items():
        rows = torch.cat([x.flatten(0, 1) for x in inputs]).float()
        torch.testing.assert_close(grams.of(name), rows.T @ rows, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("act_order", [False, True], ids=["in order", "by activation"])
@pytest.mark.parametrize("size", [None, 4], ids=["channel", "group"])
def test_every_column_is_the_rounded_least_squares_solution_given_the_columns_before(size, act_order):
    kind = spec(8, size)
    weight, x, scale = problem(3, 12, kind)
    codes = gptq_codes(weight, x.T @ x, scale, kind, act_order, damping=0.0, columns=5)
    order = np.argsort(-np.diag((x.T @ x).numpy()), kind="stable") if act_order else np.arange(12)
    inputs, target = x.double().numpy(), x.double().numpy() @ weight.double().numpy().T
    scales = scale.repeat_interleave(12 // scale.shape[1], 1).numpy()
    quantized = np.zeros((3, 12))
    for step, column in enumerate(order):
        free, fixed = order[step:], order[:step]
        solution = np.linalg.lstsq(inputs[:, free], target - inputs[:, fixed] @ quantized[:, fixed].T, rcond=None)[0]
        rounded = np.clip(np.rint(solution[0] / scales[:, column]), kind.qmin, kind.qmax)
        assert codes[:, column].tolist() == rounded.tolist()
        quantized[:, column] = rounded * scales[:, column]


def test_it_comes_closer_to_the_best_of_all_roundings_than_rounding_to_nearest():
    kind, excess = spec(2), {"gptq": [], "nearest": []}
    for seed in range(20):
        weight, x, scale = problem(1, 5, kind, seed)
        every = torch.tensor(list(itertools.product(range(-2, 2), repeat=5)), dtype=torch.float32)
        outputs = (weight - dequantize(every, scale)).double() @ x.double().T
        best = float(outputs.square().sum(1).min())
        nearest = quantize(weight, scale, kind)
        ours = gptq_codes(weight, x.T @ x, scale, kind, damping=0.0)
        for name, codes in (("gptq", ours), ("nearest", nearest)):
            excess[name].append(cost(weight, x, codes, scale) / best)
            assert excess[name][-1] >= 1 - 1e-12
    assert np.median(excess["gptq"]) < 1.5 < np.median(excess["nearest"])
    assert sum(e < 1 + 1e-9 for e in excess["gptq"]) > sum(e < 1 + 1e-9 for e in excess["nearest"])


@pytest.mark.parametrize("size", [None, 16], ids=["channel", "group"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_layers_output_error_falls(bits, size):
    kind = spec(bits, size)
    weight, x, scale = problem(24, 64, kind, tokens=256)
    ours = cost(weight, x, gptq_codes(weight, x.T @ x, scale, kind), scale)
    assert ours < 0.5 * cost(weight, x, quantize(weight, scale, kind), scale)


def test_lazy_updates_change_no_code():
    weight, x, scale = problem(8, 48, spec(4, 16))
    one, many = (gptq_codes(weight, x.T @ x, scale, spec(4, 16), columns=columns) for columns in (1, 48))
    assert torch.equal(one, many)


def test_a_tensors_only_scale_serves_all_columns():
    kind = QuantSpec(bits=4, granularity="tensor")
    weight, x, _ = problem(8, 16, spec())
    scale = absmax_scale(weight.abs().amax().view(1, 1), kind)
    expected = gptq_codes(weight, x.T @ x, scale.expand(8, 1), spec())
    assert torch.equal(gptq_codes(weight, x.T @ x, scale, kind), expected)


def test_a_negative_scale_puts_the_weights_on_its_grid():
    weight, x, scale = problem(4, 16, spec())
    codes = gptq_codes(weight, x.T @ x, -scale, spec())
    assert cost(weight, x, codes, -scale) < cost(weight, x, quantize(weight, -scale, spec()), -scale)


def test_a_dead_column_is_rounded_to_nearest_and_moves_no_other():
    kind = spec()
    weight, x, scale = problem(6, 16, kind)
    x[:, 5] = 0.0
    codes = gptq_codes(weight, x.T @ x, scale, kind)
    assert torch.equal(codes[:, 5], quantize(weight, scale, kind)[:, 5])
    others = [i for i in range(16) if i != 5]
    assert torch.equal(codes[:, others], gptq_codes(weight[:, others], x[:, others].T @ x[:, others], scale, kind))


def test_inputs_that_are_all_zero_leave_rounding_to_nearest():
    weight, _, scale = problem(4, 16, spec())
    assert torch.equal(gptq_codes(weight, torch.zeros(16, 16), scale, spec()), quantize(weight, scale, spec()))


def test_a_singular_hessian_raises_the_damping_and_says_so(caplog):
    weight, x, scale = problem(4, 16, spec(), tokens=3)
    codes = gptq_codes(weight, x.T @ x, scale, spec(), damping=0.0, name="mlp.up_proj")
    assert "mlp.up_proj: its Hessian is singular; damping raised from 0 to" in caplog.text
    assert cost(weight, x, codes, scale) <= cost(weight, x, quantize(weight, scale, spec()), scale)


def test_a_hessian_that_no_damping_mends_is_named_with_the_remedy():
    indefinite = -torch.eye(4) + 2 * torch.eye(4).roll(1, 0)
    indefinite.diagonal().fill_(1e-9)
    with pytest.raises(ValueError, match="cannot be factorized even with damping 1"):
        inverse_factor(1e3 * indefinite - 1e6 * (1 - torch.eye(4)))


def test_the_factor_is_that_of_the_inverse():
    gram = torch.randn(20, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gram = gram.T @ gram
    upper = inverse_factor(gram, damping=0.1)
    damped = gram + 0.1 * gram.diagonal().mean() * torch.eye(8, dtype=torch.float64)
    assert torch.equal(upper, upper.triu())
    np.testing.assert_allclose(upper.T @ upper, np.linalg.inv(damped.numpy()), rtol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_written_weights_quantize_to_the_same_codes_and_to_themselves(bits, dtype):
    layer = torch.nn.Sequential(torch.nn.Linear(64, 32).to(dtype))
    kind = spec(bits, 32)
    inserted(layer, QuantScheme(weight=kind))
    scale = torch.rand(32, 2).add_(0.01).bfloat16().float()
    layer[0].weight_quantizer.set_scale(scale)
    codes = torch.randint(kind.qmin, kind.qmax + 1, (32, 64)).float()
    codes[0, :2] = torch.tensor([kind.qmin, kind.qmax])
    write_back(layer[0], codes)
    assert torch.equal(fold(layer[0], dtype).codes.float(), codes)
    assert torch.equal(fake_quantize(layer[0].weight.detach(), scale, kind), layer[0].weight)


def test_weights_in_a_dtype_that_cannot_hold_the_grid_are_refused():
    layer = torch.nn.Sequential(torch.nn.Linear(4, 1).half())
    inserted(layer, QuantScheme(weight=spec(8)))
    layer[0].weight_quantizer.set_scale(torch.full((1, 1), 2.0**-30))
    with pytest.raises(ValueError, match="float16 weights cannot hold"):
        write_back(layer[0], torch.tensor([[127.0, 1.0, -128.0, 3.0]]))


# -- on a model ----------------------------------------------------------------------------------


def calibrated(model, method=None, data=None, **settings):
    method = method or GPTQ(**settings)
    method(model, runner(model, data))
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sequential", ["layer", "block", "none"])
def test_all_weights_of_a_model_end_on_their_grid(tiny_llama, sequential, dtype):
    model = inserted(tiny_llama(dtype))
    before = {name: layer.weight.detach().clone() for name, layer in layers(model).items()}
    calibrated(model, sequential=sequential)
    assert {q.current_stage for q in quantizers(model)} == {Stage.FLOAT}
    for name, layer in layers(model).items():
        weight, scale = layer.weight.detach(), layer.weight_quantizer.scale.detach()
        assert torch.equal(fake_quantize(weight, scale, layer.scheme.weight), weight)
        assert not torch.equal(weight, before[name])
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert "forward" not in vars(model.model.layers[0])
    in_float = logits(model)
    set_stage(model, Stage.FROZEN)
    assert torch.equal(logits(model), in_float)


def test_the_models_output_error_falls(tiny_llama):
    reference, errors = logits(tiny_llama()), {}
    for name, method in {"mse": RangeCalibration("mse"), **{s: GPTQ(sequential=s) for s in ("layer", "none")}}.items():
        model = calibrated(inserted(tiny_llama()), method)
        set_stage(model, Stage.FROZEN)
        errors[name] = float((logits(model) - reference).square().mean())
    assert errors["layer"] < errors["mse"] and errors["none"] < errors["mse"]


def test_each_layer_sees_what_the_quantized_ones_before_it_make(tiny_llama):
    found = {s: layers(calibrated(inserted(tiny_llama()), sequential=s)) for s in ("layer", "block", "none")}
    same = {
        (a, b): {n for n in found[a] if torch.equal(found[a][n].weight, found[b][n].weight)}
        for a, b in itertools.combinations(found, 2)
    }
    first = {f"model.layers.0.self_attn.{p}_proj" for p in "qkv"}
    assert same["layer", "block"] == same["layer", "none"] == first
    assert same["block", "none"] == {n for n in found["none"] if n.startswith("model.layers.0.")}


def test_an_output_layer_is_treated_with_the_quantized_models_last_states(tiny_llama):
    model = tiny_llama()
    with torch.no_grad():
        model.model.norm.weight.mul_(torch.linspace(0.1, 3, 128))
    inserted(model, **{"*": G32})
    seen = []
    model.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    calibrated(model, sequential="block")
    during = seen[-2:]  # the last run of two batches
    set_stage(model, Stage.FROZEN)
    logits(model)
    assert torch.equal(during[0], seen[-1])


def test_what_lies_under_the_mask_changes_nothing(tiny_llama):
    clean, dirty = (calibrated(inserted(tiny_llama()), data=batches(junk)) for junk in (0, 201))
    for name, layer in layers(clean).items():
        assert torch.equal(layer.weight, layers(dirty)[name].weight), name


def test_a_static_input_gets_its_scale_too(tiny_llama):
    scheme = QuantScheme(weight=spec(4, 32), input=QuantSpec(bits=8, granularity="tensor"))
    model = calibrated(inserted(tiny_llama(), scheme))
    scales = torch.cat([layer.input_quantizer.scale.detach() for layer in layers(model).values()])
    assert (scales != 1).all() and len(scales.unique()) > 4


def test_data_without_a_usable_token_is_refused_before_any_block(tiny_llama):
    model = inserted(tiny_llama())
    for data in ([], batches(real=(0, 0))):
        with pytest.raises(ValueError, match="calibration gptq: the calibration data has no usable token"):
            calibrated(model, data=data)


@pytest.mark.parametrize("where", ["weight", "activation"])
def test_damaged_numbers_name_block_and_layer(tiny_llama, where):
    model = inserted(tiny_llama())
    with torch.no_grad():
        damaged = model.model.layers[1]
        (damaged.mlp.up_proj if where == "weight" else damaged.post_attention_layernorm).weight[3] = torch.nan
    layer = "mlp.up_proj" if where == "weight" else "mlp.gate_proj"
    message = rf"model\.layers\.1: calibration gptq, layer {layer}: NaN or infinite values were observed"
    with pytest.raises(ValueError, match=message):
        calibrated(model)


def test_a_layer_that_no_token_reaches_is_named():
    class Skips(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

        def forward(self, x):
            return self.used(x)

    model = inserted(Skips(), QuantScheme(weight=spec()))
    with pytest.raises(ValueError, match="layer unused: no value was observed"):
        GPTQ()(model, lambda: model(torch.randn(4, 8)))


def test_a_quantizer_outside_a_known_layer_is_refused_with_the_remedy(tiny_llama):
    model = inserted(tiny_llama())
    model.model.embed_tokens.weight_quantizer = layers(model)["model.layers.0.mlp.up_proj"].weight_quantizer
    with pytest.raises(
        ValueError, match=r"gptq treats the layers of qat.nn, and model.embed_tokens is a Embedding: leave it"
    ):
        GPTQ().check(model)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sequential": "blocks"}, "sequential must be one of layer, block, none"),
        ({"precision": "float16"}, "precision must be one of float32, float64"),
        ({"damping": 2.0}, r"damping must be in \[0, 1\], got 2.0"),
    ],
    ids=["sequential", "precision", "damping"],
)
def test_settings_that_mean_nothing_are_refused(fields, message):
    with pytest.raises(ValueError, match=f"calibration gptq: {message}"):
        GPTQ(**fields)
