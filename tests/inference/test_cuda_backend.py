"""Loading onto CUDA kernels, as far as no GPU is needed."""

import logging

import pytest
import torch
from torch import nn

from qat.inference import PackedLinear
from qat.inference.cuda_backend import CudaLinear, require_cuda, use_cuda_kernels
from qat.inference.fusion import by_turns
from qat.kernels import cuda, device


@pytest.fixture
def no_launches(monkeypatch):
    monkeypatch.setattr(device, "run", lambda launch, device, *arguments: None)


def layers(scheme) -> nn.Module:
    names = ["w4a16-g32", "w8a16-channel", "w4a8-g64", "w8a8-channel-static", "w8a8-g64", "w3a16-channel"]
    model = nn.Sequential(*(PackedLinear(128, 48, scheme(name), True, torch.bfloat16) for name in names))
    for buffer in model.buffers():
        buffer.zero_()
    return model


def test_layers_that_a_kernel_computes_are_replaced_and_the_rest_is_named(scheme, no_launches, caplog):
    model = layers(scheme)
    with caplog.at_level(logging.INFO):
        use_cuda_kernels(model, torch.bfloat16)
    assert [type(layer) for layer in model] == [CudaLinear] * 4 + [PackedLinear] * 2
    (message,) = [r.message for r in caplog.records]
    assert message == (
        "backend cuda: 4 layers on CUDA kernels, "
        "1 layers on the slower reference (groups of 64 in 8-bit weights with 8-bit activations), "
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


@pytest.mark.parametrize("number", [2, 3])
def test_quantized_activations_go_through_quantization_and_the_int8_kernel(scheme, number, monkeypatch):
    model, launches = layers(scheme), []
    monkeypatch.setattr(device, "run", lambda launch, device, *arguments: launches.append((launch.name, arguments)))
    monkeypatch.setattr(device, "multiprocessors", lambda device: 132)
    layer = CudaLinear(model[number], torch.bfloat16)
    for name in ("quantize_tokens", "tiled_linear_int8"):  # registered for CUDA tensors; here the tensors are the CPU's
        monkeypatch.setattr(torch.ops.qat, name, getattr(cuda, name))
    residual = torch.zeros(2, 3, 48, dtype=torch.bfloat16)
    assert layer(torch.zeros(2, 3, 128, dtype=torch.bfloat16), residual).shape == (2, 3, 48)
    assert [name.split("<")[0] for name, _ in launches] == ["qat::repack", "qat::quantize_tokens", "qat::linear_small"]
    assert launches[1][1][1] is layer.input_scale and (layer.input_scale is None) == (number == 2)
    assert launches[2][1][5].data_ptr() == residual.data_ptr()


def test_gate_and_up_lie_by_turns(scheme):
    gate, up = (PackedLinear(128, 24, scheme("w4a8-g64"), True, torch.bfloat16) for _ in range(2))
    for value, layer in ((1, gate), (2, up)):
        for buffer in layer.buffers():
            buffer.fill_(value)
    turns = by_turns(gate, up)
    for name in ("packed", "scale", "bias"):
        assert getattr(turns, name).reshape(48, -1)[:, 0].tolist() == [1, 2] * 24
        assert (getattr(gate, name) == 1).all()
    assert turns.out_features == 48 and turns.packed.shape == (48, 16)
    with pytest.raises(ValueError, match="several schemes or static scales"):
        by_turns(gate, PackedLinear(128, 24, scheme("w4a16-g64"), True))
    with pytest.raises(ValueError, match="several sizes"):
        by_turns(gate, PackedLinear(128, 32, scheme("w4a8-g64"), True))


def test_a_device_without_kernels_is_refused():
    with pytest.raises(ValueError, match="backend cuda runs on NVIDIA GPUs, not on cpu"):
        require_cuda(torch.device("cpu"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_a_gpu_is_refused():
    with pytest.raises(ValueError, match="needs an NVIDIA GPU"):
        require_cuda(torch.device("cuda"))
