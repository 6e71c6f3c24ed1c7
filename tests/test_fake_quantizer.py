import copy

import pytest
import torch

from qat.estimators import LSQ, STE
from qat.fake_quantizer import FakeQuantizer, Stage, token_mask, unmasked
from qat.functional import fake_quantize, store_scale
from qat.observers import EMA, MSE, MinMax
from qat.scheme import QuantSpec

STATIC = QuantSpec(bits=8, granularity="tensor")
TOKEN = QuantSpec(bits=8, granularity="token", dynamic=True, absmax_rule="qmax")
WEIGHT = QuantSpec(bits=4, granularity="group", group_size=4)


def static(estimator=None, stage=Stage.TRAIN, scale=0.0123):
    quantizer = FakeQuantizer(STATIC, (1,), estimator or LSQ())
    quantizer.set_scale(torch.tensor([scale]))
    quantizer.set_stage(stage)
    return quantizer


@pytest.mark.parametrize("stage", [Stage.FLOAT, Stage.OBSERVE])
@pytest.mark.parametrize("spec", [STATIC, TOKEN], ids=["static", "dynamic"])
def test_before_training_an_activation_passes_untouched(spec, stage):
    quantizer = FakeQuantizer(spec, (1,), LSQ())
    quantizer.set_stage(stage)
    x = torch.randn(2, 3, 8)
    assert quantizer(x) is x


@pytest.mark.parametrize("stage", [Stage.TRAIN, Stage.FROZEN])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_static_activation_is_quantized_with_the_stored_scale(stage, dtype):
    quantizer, x = static(stage=stage), torch.randn(2, 3, 8).to(dtype)
    expected = fake_quantize(x, store_scale(quantizer.scale.detach(), STATIC), STATIC)
    assert torch.equal(quantizer(x), expected)
    assert quantizer(x).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_dynamic_activation_is_quantized_token_by_token(dtype):
    quantizer = FakeQuantizer(TOKEN, (1,), LSQ())
    assert quantizer.scale is None
    quantizer.set_stage(Stage.TRAIN)
    x = torch.randn(2, 3, 8).to(dtype)
    for token, y in zip(x.flatten(0, 1), quantizer(x).flatten(0, 1), strict=True):
        scale = token.abs().amax().float() / 127
        assert torch.equal(y, ((token.float() / scale).round() * scale).to(dtype))


@pytest.mark.parametrize(
    ("estimator", "stage", "learns"),
    [(LSQ(), s, s != Stage.FROZEN) for s in Stage] + [(STE(), s, False) for s in Stage],
    ids=lambda value: value.name if isinstance(value, Stage) else type(value).__name__,
)
def test_a_scale_learns_until_it_is_frozen_if_the_estimator_learns(estimator, stage, learns):
    assert static(estimator, stage).scale.requires_grad is learns


def test_a_frozen_scale_gets_no_gradient_but_its_input_does():
    quantizer, x = static(stage=Stage.FROZEN), torch.linspace(-2, 2, 32).requires_grad_()
    quantizer(x).sum().backward()
    assert quantizer.scale.grad is None
    codes = x.detach() / quantizer.scale.detach()
    assert torch.equal(x.grad, ((codes >= -128) & (codes <= 127)).float()) and 0 < x.grad.sum() < x.numel()


def test_the_scale_of_a_batch_sums_the_gradients_of_its_tokens():
    quantizer, x = static(), torch.randn(3, 5, 8)
    quantizer(x).sum().backward()
    whole = quantizer.scale.grad.clone()
    quantizer.scale.grad = None
    for token in x.flatten(0, 1):
        quantizer(token[None]).sum().backward()
    # 15 float32 additions in another order.
    torch.testing.assert_close(whole, quantizer.scale.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("observer", [MinMax, EMA, MSE])
def test_a_masked_token_never_moves_a_range(observer):
    x = torch.randn(2, 4, 8)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]])
    scales = []
    for padding in (0.0, 1e6, torch.nan):
        quantizer = static(stage=Stage.OBSERVE)
        quantizer.observer = observer(STATIC)
        with token_mask(mask):
            quantizer(torch.where(mask[..., None].bool(), x, padding))
        scales.append(quantizer.observer.scale())
    assert torch.equal(scales[0], scales[1])
    assert torch.equal(scales[0], scales[2])


def test_tokens_that_come_flattened_are_masked_too():
    x, mask = torch.randn(2, 4, 8), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]]).bool()
    with token_mask(mask):
        assert torch.equal(unmasked(x.flatten(0, 1)), x[mask])
        assert torch.equal(unmasked(x), x[mask])


def test_activations_that_are_no_tokens_are_all_real():
    with token_mask(torch.tensor([[1, 0, 0]])):
        assert unmasked(torch.zeros(5, 7, 8)).shape == (35, 8)
    assert unmasked(torch.zeros(1, 3, 8)).shape == (3, 8)


def test_a_batch_of_padding_alone_is_not_an_observation():
    quantizer = static(stage=Stage.OBSERVE)
    quantizer.observer = MSE(STATIC)
    with token_mask(torch.zeros(2, 4)):
        quantizer(torch.full((2, 4, 8), 1e6))
    with pytest.raises(ValueError, match="no usable token"):
        quantizer.observer.scale()
    quantizer(torch.ones(2, 4, 8))
    assert quantizer.observer.scale().isfinite().all()


def test_the_mask_ends_with_its_block_even_after_an_error():
    with pytest.raises(RuntimeError), token_mask(torch.zeros(1, 2)):
        raise RuntimeError
    assert len(unmasked(torch.zeros(1, 2, 3))) == 2


def test_only_the_observe_stage_observes():
    for stage in (Stage.FLOAT, Stage.TRAIN, Stage.FROZEN):
        quantizer = static(stage=stage)
        quantizer.observer = MinMax(STATIC)
        quantizer(torch.randn(2, 8))
        assert quantizer.observer.reach is None


@pytest.mark.parametrize("stage", list(Stage), ids=lambda s: s.name)
def test_a_checkpoint_carries_stage_and_scale(stage):
    saved = {k: v.clone() for k, v in static(stage=stage, scale=0.0371).state_dict().items()}
    assert saved["stage"].dtype == torch.uint8
    loaded = static(stage=Stage.FLOAT, scale=1.0)
    loaded.load_state_dict(saved)
    assert loaded.current_stage is stage
    assert loaded.scale.item() == torch.tensor(0.0371).item()
    assert loaded.scale.requires_grad is (stage != Stage.FROZEN)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_scale_stays_float32_to_the_last_bit(dtype):
    quantizer = static(scale=0.012345678)
    x = torch.randn(2, 8)
    quantizer(x).sum().backward()
    scale, value = quantizer.scale, quantizer.scale.detach().clone()
    grad = scale.grad.clone()
    quantizer.to(dtype)
    assert quantizer.scale is scale, "an optimizer that holds the parameter must go on moving it"
    assert scale.dtype == torch.float32
    assert torch.equal(scale, value)
    assert scale.grad.dtype == torch.float32, "a gradient of another dtype stops the optimizer"
    assert torch.equal(scale.grad, grad)
    assert quantizer.stage.dtype == torch.uint8
    torch.optim.SGD([scale], 0.1).step()


def test_a_quantizer_that_leaves_the_meta_device_has_a_stage():
    quantizer = FakeQuantizer(WEIGHT, (2, 3), LSQ(), torch.device("meta"))
    assert quantizer.scale.device.type == "meta"
    quantizer.set_stage(Stage.TRAIN)
    quantizer.to(torch.bfloat16).to_empty(device="cpu")
    assert quantizer.stage.item() == Stage.TRAIN
    assert quantizer.scale.dtype == torch.float32


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_scale_that_is_not_finite_is_refused(bad):
    with pytest.raises(ValueError, match="a scale is NaN or beyond the range of bfloat16"):
        static(scale=bad)


def test_a_frozen_weight_scale_does_not_follow_the_weight():
    quantizer = FakeQuantizer(WEIGHT, (2, 2), STE(follow="absmax"))
    quantizer.set_scale(torch.full((2, 2), 0.25))
    weight = torch.randn(2, 8)
    quantizer.set_stage(Stage.TRAIN)
    assert not torch.equal(quantizer.weight_scale(weight), quantizer.scale)
    quantizer.set_stage(Stage.FROZEN)
    assert torch.equal(quantizer.weight_scale(weight), quantizer.scale)


def test_a_copy_is_independent():
    quantizer = static(stage=Stage.TRAIN)
    other = copy.deepcopy(quantizer)
    other.set_stage(Stage.FROZEN)
    other.set_scale(torch.tensor([1.0]))
    assert quantizer.current_stage is Stage.TRAIN
    assert quantizer.scale.item() == torch.tensor(0.0123).item()


def test_the_stage_is_shown():
    assert "int8, tensor, frozen" in repr(static(stage=Stage.FROZEN))
