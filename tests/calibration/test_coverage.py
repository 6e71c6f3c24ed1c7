"""What calibration data reaches is counted by hand here, and what it does not reach is refused."""

import pytest
import torch
from llama_data import batches, inserted, runner
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from qat.calibration import Coverage
from qat.calibration.coverage import Reached
from qat.fake_quantizer import Stage, token_mask
from qat.insertion import insert, quantizers
from qat.scheme import QuantSpec, uniform
from qat.structure import unfuse_experts

CHANNEL = QuantSpec(bits=4, granularity="channel")


def covered(model, x, mask=None) -> Coverage:
    coverage = Coverage()

    def run() -> None:
        with token_mask(mask):
            model(x)

    coverage(model, run)
    return coverage


def test_tokens_and_dead_channels_are_those_that_are_not_padding():
    model = nn.Sequential(nn.Linear(4, 3))
    insert(model, uniform(CHANNEL))
    x = torch.zeros(2, 3, 4)
    x[..., 0], x[0, 1, 1], x[1, 2, 3] = 1, 1, 1  # channel 3 lives in padding only, channel 2 nowhere
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    assert covered(model, x, mask).reached == {"0": Reached(tokens=5, inputs=4, dead=2)}
    assert covered(model, x).reached == {"0": Reached(tokens=6, inputs=4, dead=1)}


def test_a_convolution_counts_patches_and_their_pixels():
    model = nn.Sequential(nn.Conv2d(2, 3, 2, bias=False))
    insert(model, uniform(CHANNEL, kinds=("conv",)))
    image = torch.zeros(1, 2, 3, 3)
    image[0, 0] = 1  # the second channel's four pixels of a patch are dead
    assert covered(model, image).reached == {"0": Reached(tokens=4, inputs=8, dead=4)}


def test_the_model_stays_float_and_all_layers_of_a_llama_see_all_tokens(tiny_llama):
    model, coverage = inserted(tiny_llama()), Coverage()
    coverage(model, runner(model))
    assert {r.tokens for r in coverage.reached.values()} == {4 * 24 + 4 * 17}
    assert len(coverage.reached) == 7 * model.config.num_hidden_layers
    assert {q.current_stage for q in quantizers(model)} == {Stage.FLOAT}


def test_an_expert_that_no_token_chose_is_named_with_the_remedy():
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=256, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=1,
    )  # fmt: skip
    model = MixtralForCausalLM(config).eval()
    unfuse_experts(model)
    inserted(model)
    few = [{name: value[:1, :2] for name, value in batches()[0].items()}]  # two tokens cannot choose four experts
    with pytest.raises(ValueError, match=r"never reaches \d of 16 layers \(model.layers.0.mlp.experts.*quant.ignore"):
        Coverage()(model, runner(model, few))


def test_data_of_padding_only_is_refused():
    model = nn.Sequential(nn.Linear(4, 3))
    insert(model, uniform(CHANNEL))
    with pytest.raises(ValueError, match="no usable token"):
        covered(model, torch.ones(1, 2, 4), torch.zeros(1, 2))


def test_outliers_are_channels_many_times_larger_than_the_median_that_is_not_dead():
    model = nn.Sequential(nn.Linear(6, 3))
    insert(model, uniform(CHANNEL))
    x = torch.tensor([[[0.0, 1, 2, 3, 29, -31]], [[0, -1, 2, -3, -29, 31]]])  # the median of five is 3
    assert covered(model, x).reached["0"] == Reached(tokens=2, inputs=6, dead=1, outliers=1)
    assert covered(model, torch.zeros(1, 2, 6)).reached["0"] == Reached(tokens=2, inputs=6, dead=6, outliers=0)


def test_thin_data_and_dead_channels_are_said(caplog):
    model = nn.Sequential(nn.Linear(8, 3))
    insert(model, uniform(CHANNEL))
    x = torch.ones(1, 2, 8)
    x[..., 5] = 0
    with caplog.at_level("INFO"):
        covered(model, x)
    said = caplog.text
    assert "reaches all 1 layers with 2 tokens" in said
    assert "such as 0 (2 tokens, 8 inputs)" in said and "1 input channels in 1 layers are 0" in said
