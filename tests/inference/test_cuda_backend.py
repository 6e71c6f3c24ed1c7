"""Loading onto CUDA kernels, as far as no GPU is needed."""

import logging

import pytest
import torch
from torch import nn

from qat.inference import PackedLinear
from qat.inference.cuda_backend import CudaLinear, require_cuda, use_cuda_kernels
from qat.kernels import cuda


@pytest.fixture
def no_launches(monkeypatch):
    monkeypatch.setattr(cuda, "run", lambda launch, device, *arguments: None)


def layers(scheme) -> nn.Module:
    names = ["w4a16-g32", "w8a16-channel", "w4a8-g64", "w3a16-channel"]
    model = nn.Sequential(*(PackedLinear(128, 48, scheme(name), True, torch.bfloat16) for name in names))
    for buffer in model.buffers():
        buffer.zero_()
    return model


def test_layers_that_a_kernel_computes_are_replaced_and_the_rest_is_named(scheme, no_launches, caplog):
    model = layers(scheme)
    with caplog.at_level(logging.INFO):
        use_cuda_kernels(model, torch.bfloat16)
    assert [type(layer) for layer in model] == [CudaLinear, CudaLinear, PackedLinear, PackedLinear]
    (message,) = [r.message for r in caplog.records]
    assert message == (
        "backend cuda: 2 layers on CUDA kernels, 1 layers on the slower reference (8-bit activations), "
        "1 layers on the slower reference (3-bit weights)"
    )


def test_a_replaced_layer_keeps_no_packed_bytes(scheme, no_launches):
    model = layers(scheme)
    use_cuda_kernels(model, torch.bfloat16)
    assert set(dict(model[0].named_buffers())) == {"tiles", "scale", "bias"}
    assert model[0].tiles.numel() * 4 == 48 * 128 // 2  # not a byte more than the packed weights
    assert model[0].scale.shape == (3, 4, 16) and model[0].scale.dtype == torch.bfloat16


def test_a_replaced_layer_refuses_another_dtype(scheme, no_launches):
    model = layers(scheme)
    use_cuda_kernels(model, torch.bfloat16)
    with pytest.raises(ValueError, match="cannot change its dtype"):
        model[0].to(torch.float16)


def test_a_device_without_kernels_is_refused():
    with pytest.raises(ValueError, match="backend cuda runs on NVIDIA GPUs, not on cpu"):
        require_cuda(torch.device("cpu"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_a_gpu_is_refused():
    with pytest.raises(ValueError, match="needs an NVIDIA GPU"):
        require_cuda(torch.device("cuda"))
