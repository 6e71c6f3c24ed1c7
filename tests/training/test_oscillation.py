import pytest
import torch
from torch import nn

from qat.estimators import LSQ
from qat.fake_quantizer import Stage
from qat.functional import quantize
from qat.nn import FakeQuantLinear
from qat.scheme import QuantScheme, QuantSpec
from qat.training.oscillation import Freezing, Turns, damping_gradient

SPEC = QuantSpec(bits=4, granularity="group", group_size=8, scale_dtype="float32")


def layer(weight: torch.Tensor, scale: float = 0.5) -> FakeQuantLinear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    adopted = FakeQuantLinear.adopt(linear, QuantScheme(weight=SPEC), LSQ())
    with torch.no_grad():
        adopted.weight.copy_(weight)
    adopted.weight_quantizer.set_scale(torch.full((weight.shape[0], weight.shape[1] // 8), scale))
    adopted.weight_quantizer.set_stage(Stage.TRAIN)
    return adopted


def test_a_code_turns_back_when_it_changes_against_its_last_change_however_long_ago():
    steps = torch.tensor([[0, 1, 1, 1, 0, 0, 1, 2, 3, 1], [5, 5, 5, 6, 7, 7, 7, 7, 7, 6]], dtype=torch.float32)
    turns = Turns(steps[:, 0])
    turned = torch.stack([turns(step) for step in steps[:, 1:].T], 1)
    assert turned.int().tolist() == [[0, 0, 0, 1, 0, 1, 0, 0, 1], [0, 0, 0, 0, 0, 0, 0, 0, 1]]


def test_codes_of_eight_bits_fit():
    turns = Turns(torch.tensor([-128.0, 127.0]))
    assert turns(torch.tensor([127.0, -128.0])).tolist() == [False, False]
    assert turns(torch.tensor([-128.0, 127.0])).tolist() == [True, True]


def test_turns_go_on_from_a_checkpoint():
    turns = Turns(torch.zeros(3))
    turns(torch.tensor([1.0, -1.0, 0.0]))
    assert Turns.from_state(turns.state_dict())(torch.zeros(3)).tolist() == [True, True, False]


def test_the_damping_gradient_is_the_slope_of_the_published_loss():
    """|| fq(W) - clip(W) ||^2 with fq(W) held (arXiv 2203.11086, section 4.2): float64 central differences."""
    generator = torch.Generator().manual_seed(0)
    weight = 3 * torch.randn(5, 16, generator=generator)  # clipped at -4 and 3.5: both happen
    ours = damping_gradient(layer(weight))
    w, h = weight.double(), 1e-6
    held = (w / 0.5).round().clamp(-8, 7) * 0.5

    def loss(w):
        return (held - w.clamp(-4, 3.5)).square()

    torch.testing.assert_close(ours.double(), (loss(w + h) - loss(w - h)) / (2 * h), rtol=0, atol=1e-6)
    assert 0 < (ours == 0).float().mean() < 0.5


def test_a_weight_that_turns_back_often_is_frozen_at_the_code_where_it_was_most():
    module = layer(torch.zeros(1, 8))
    freezing = Freezing(module, threshold=0.3, momentum=0.1)
    positions = [0.0, 0.0, 0.5]  # codes 0, 0, 1, 0, 0, 1, ...: turns back twice in three steps
    for step in range(30):
        with torch.no_grad():
            if step < 29:
                module.weight.fill_(positions[step % 3] + 0.01)
                module.weight[0, 4:] = 0.01 * step  # drifts from code 0 to 1 without turning back
        freezing.step()
    assert freezing.frozen.tolist() == [[True] * 4 + [False] * 4]
    assert module.weight[0, :4].tolist() == [0.0] * 4
    assert module.weight[0, 4:].tolist() == pytest.approx([0.28] * 4)


def test_the_frequency_is_the_published_moving_average():
    """arXiv 2203.11086, section 4.1: f <- m o + (1 - m) f."""
    module = layer(torch.zeros(1, 8))
    freezing, expected = Freezing(module, threshold=0.99, momentum=0.25), 0.0
    for step in range(1, 6):
        with torch.no_grad():
            module.weight.fill_(0.5 * (step % 2))
        freezing.step()
        expected = 0.25 * (step > 1) + 0.75 * expected
        assert freezing.frequency[0, 0].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_weight_keeps_its_code_under_any_scale(dtype):
    weight = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    module = layer(weight).to(dtype)
    freezing = Freezing(module, threshold=0.5, momentum=0.1)
    freezing.frozen.fill_(True)
    codes = quantize(module.weight.detach(), module.weight_quantizer.scale.detach(), SPEC)
    for scale in (0.4, 0.61, 0.3337):
        module.weight_quantizer.set_scale(torch.full((3, 2), scale))
        with torch.no_grad():
            module.weight.add_(0.3)
        freezing.step()
        assert torch.equal(quantize(module.weight.detach(), module.weight_quantizer.scale.detach(), SPEC), codes)
