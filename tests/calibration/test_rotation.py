"""Rotation: orthogonal, merged, invisible in float, and worth it where activations have outliers."""

import pytest
import torch
from llama_data import inserted, logits, runner
from test_equalization import W8A8, biased_qwen2, hostile

from qat.calibration import RangeCalibration, Rotation
from qat.calibration.rotation import hadamard, rotate
from qat.fake_quantizer import Stage
from qat.insertion import set_stage
from qat.structure import untie

MSE = RangeCalibration("mse")


@pytest.mark.parametrize("features", [1, 64, 96, 640, 7])
def test_the_matrix_is_orthogonal_and_hadamard_within_its_blocks(features):
    signs = torch.where(torch.arange(features) % 3 == 0, -1.0, 1.0).double()
    matrix = hadamard(torch.eye(features, dtype=torch.float64), signs)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(features, dtype=torch.float64))
    size = features & -features
    assert torch.equal((matrix.abs() > 0).sum(1), torch.full((features,), size))
    block = matrix[:size, :size] / signs[:size, None] * size**0.5
    sylvester = torch.ones(1, 1, dtype=torch.float64)
    while len(sylvester) < size:
        sylvester = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), sylvester)
    torch.testing.assert_close(block, sylvester)


@pytest.mark.parametrize("values", [True, False], ids=["R1 and R2", "R1"])
@pytest.mark.parametrize("kind", ["llama with biases", "outliers", "qwen2, 96 features", "tied"])
def test_the_float_function_stays(kind, values, tiny_llama):
    if kind.startswith("qwen2"):
        model = biased_qwen2()
    else:
        model = tiny_llama(bias=kind.endswith("biases"), tie=kind == "tied")
    model = hostile(model) if kind == "outliers" else model
    with torch.no_grad():
        model.model.norm.weight.mul_(torch.linspace(0.5, 2, len(model.model.norm.weight)))
    reference = logits(model)
    untie(model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    rotate(model, values=values)
    unchanged = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
    assert not any(name.endswith("proj.weight") or "embed" in name or "head" in name for name in unchanged)
    torch.testing.assert_close(logits(model), reference, atol=1e-4, rtol=0)


def test_it_spreads_the_outliers_of_the_activations(tiny_llama):
    reference, errors = logits(tiny_llama()), {}
    for name, calibration in {"mse": MSE, "rotation": Rotation(then=MSE)}.items():
        model = inserted(hostile(tiny_llama()), W8A8)
        calibration(model, runner(model))
        set_stage(model, Stage.FROZEN)
        errors[name] = float((logits(model) - reference).square().mean())
    assert errors["rotation"] < 0.5 * errors["mse"]


def test_the_same_seed_gives_the_same_rotation(tiny_llama):
    models = [tiny_llama() for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        rotate(model, seed)
    weights = [model.model.layers[0].mlp.up_proj.weight for model in models]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_tied_embeddings_are_refused_with_the_remedy(tiny_llama):
    model = inserted(tiny_llama(tie=True))
    with pytest.raises(ValueError, match=r"untie it: callbacks\.quantization\.untie=true, or qat\.untie\(model\)"):
        Rotation()(model, runner(model))
