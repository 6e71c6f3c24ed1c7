"""Fixtures that several folders share."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import qat.insertion as insertion
from qat.fake_quantizer import Stage
from qat.functional import absmax_scale
from qat.kernels import build
from qat.scheme import QuantScheme, SchemeMap


@pytest.fixture(autouse=True)
def seed() -> None:
    """A test that sets no seed draws the same numbers whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real models and texts; tests that need one of them skip where it is absent."""
    return Path(os.environ.get("QAT_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(scope="session")
def stories_directory(shared_data: Path) -> Path:
    """A real pretrained Llama of 260 thousand parameters, with its tokenizer."""
    directory = shared_data / "stories260K-hf"
    if not directory.is_dir():
        pytest.skip(f"{directory} is absent: set QAT_SHARED_DATA to a folder that has stories260K-hf")
    return directory


@pytest.fixture(scope="session")
def scheme() -> Callable[[str], QuantScheme]:
    """A scheme by its short name."""
    return QuantScheme.parse


@pytest.fixture(scope="session")
def tiny_llama() -> Callable[..., torch.nn.Module]:
    """Makes a Llama with 2 layers, hidden size 128 and 256 tokens, its weights random."""

    def make(dtype: torch.dtype = torch.float32, tie: bool = False, bias: bool = False) -> torch.nn.Module:
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=256,
            max_position_embeddings=64,
            tie_word_embeddings=tie,
            attention_bias=bias,
        )
        # from_config and not .to(dtype): the latter would round the rotary frequencies, which loading does not.
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def quantize_model() -> Callable[..., torch.nn.Module]:
    """Puts a model into training through quantization, with scales that no absmax rule gives."""

    def make(model: torch.nn.Module, *schemes: QuantScheme, rules: dict | None = None) -> torch.nn.Module:
        rules = rules or {"*lm_head": None, "*": schemes[0]}
        insertion.insert(model, SchemeMap(name="test", rules=rules))
        for layer in insertion.layers(model).values():
            quantizer = layer.weight_quantizer
            absmax = layer.weight.detach().unflatten(-1, (quantizer.scale.shape[1], -1)).abs().amax(-1)
            absmax = absmax.amax(0, keepdim=True) if len(quantizer.scale) == 1 else absmax
            quantizer.set_scale(0.87 * absmax_scale(absmax, quantizer.spec))
            if layer.input_quantizer is not None and layer.input_quantizer.scale is not None:
                layer.input_quantizer.set_scale(torch.tensor([0.031]))
        insertion.set_stage(model, Stage.TRAIN)
        return model

    return make


@pytest.fixture(scope="session")
def cache_folder(tmp_path_factory):
    """Compiled kernels go into a folder of the session."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QAT_CACHE_DIR", str(tmp_path_factory.mktemp("kernels")))
        yield


@pytest.fixture(scope="session")
def library(cache_folder):
    """The CPU kernels, compiled once a session."""
    try:
        build.compiler()
    except build.BuildError as error:
        pytest.skip(str(error))
    return build.load()
