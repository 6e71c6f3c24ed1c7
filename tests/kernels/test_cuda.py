"""What surrounds the CUDA kernels, without a GPU: arguments, failures, choices.  The kernels: test_cuda_kernels.py."""

import ctypes
import logging
import re
from functools import partial

import pytest
import torch
from torch import Tensor

from qat.kernels import cubins, cuda, reference
from qat.kernels import device as gpu
from qat.kernels.cubins import SOURCES, CompileError
from qat.kernels.tiles import padded_rows, tile_scale
from qat.packing import pack

CHOICES = {
    "int8": ("In", "s8"),
    "int32": ("u32", "uint4", "Sum"),
    "bfloat16": ("In", "T", "S"),
    "float16": ("In", "T", "S"),
    "float32": ("float", "S", "Sum"),
}


@pytest.fixture(autouse=True)
def fresh():
    yield
    for function in (cuda.say_slower, gpu._unavailable, gpu._multiprocessor_count):
        function.cache_clear()
    cuda._refused.clear()


@pytest.fixture
def device(monkeypatch):
    """An H100 that records launches instead of running them."""
    launches = []
    monkeypatch.setattr(gpu, "run", lambda launch, device, *arguments: launches.append((launch, arguments)))
    monkeypatch.setattr(gpu, "unavailable", lambda device: None)
    monkeypatch.setattr(gpu, "multiprocessors", lambda device: 132)
    return launches


def signature(kernel: str) -> list[tuple[str, str]]:
    """(type, name) of a kernel's parameters, pointers with a star."""
    text = "".join((SOURCES / f"{header}.cuh").read_text() for header in cubins.HEADERS)
    (parameters,) = re.findall(rf"__launch_bounds__\([^\n]*\)\n{kernel}\(([^)]*)\)", text)
    found = [re.fullmatch(r"\s*(?:const )?(\w+)(\*?)(?: __restrict__)? (\w+)\s*", p) for p in parameters.split(",")]
    return [(match[1] + match[2], match[3]) for match in found]


packed_linear = partial(cuda.packed_linear_cuda, backend="cuda")


def operands(m: int, n: int, k: int, group_size: int, bits: int = 4, dtype: torch.dtype = torch.bfloat16) -> dict:
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (n, k), generator=g)
    return {
        "x": torch.randn(m, k, generator=g).to(dtype),
        "packed": pack(codes, bits),
        "scale": torch.rand(n, k // group_size, generator=g).to(dtype),
        "zero_point": None,
        "bias": torch.randn(n, generator=g).to(dtype),
        "bits": bits,
        "group_size": group_size,
        "input_bits": 0,
    }


@pytest.mark.parametrize(
    ("m", "kernels"),
    [
        (0, ["repack"]),
        (3, ["repack", "linear_small"]),
        (9, ["repack", "linear_medium", "sum_splits"]),
        (65, ["repack", "dequantize"]),
    ],
)
@pytest.mark.parametrize("scheme", ["w4a16", "w8a16", "w4a8", "w4a8-channel", "w8a8-channel"])
def test_every_launch_fits_its_kernels_signature(device, m, kernels, scheme):
    group_size, input_bits = 1024 if "channel" in scheme else 64, 8 if "a8" in scheme else 0
    out = packed_linear(**operands(m, 40, 1024, group_size, int(scheme[1])) | {"input_bits": input_bits})
    assert out.shape == (m, 40) and out.dtype == torch.bfloat16
    if input_bits:
        kernels = ["linear_medium" if kernel == "dequantize" else kernel for kernel in kernels]
        kernels = [kernels[0], *["quantize_tokens"] * (m > 0), *kernels[1:]]
        kernels += ["sum_splits"] * (m == 65)
    assert [re.match(r"qat::(\w+)", launch.name)[1] for launch, _ in device] == kernels
    sizes = {"M": m, "N": 40, "K": 1024, "groups": 1024 // group_size, "splits": 2, "swiglu": 0}
    sizes |= {"qmax": 127, "half_range": 0}
    for (_, arguments), kernel in zip(device, kernels, strict=True):
        parameters = signature(kernel)
        assert len(arguments) == len(parameters)
        for value, (kind, name) in zip(arguments, parameters, strict=True):
            if kind == "int":
                assert value == sizes[name], name
            elif value is not None:
                assert isinstance(value, Tensor) and value.is_contiguous()
                assert kind.removesuffix("*") in CHOICES[str(value.dtype).removeprefix("torch.")], name


def test_operands_stand_where_the_kernel_expects_them(device):
    given = operands(2, 40, 1024, 64)
    out = packed_linear(**given)
    names = [name for _, name in signature("linear_small")]
    passed = dict(zip(names, device[-1][1], strict=True))
    assert names[:7] == ["tiles", "scale", "x", "token_scale", "bias", "residual", "y"]
    assert torch.equal(passed["scale"], tile_scale(given["scale"], torch.bfloat16))
    assert passed["x"].data_ptr() == given["x"].data_ptr()
    assert passed["bias"].data_ptr() == given["bias"].data_ptr()
    assert passed["y"].data_ptr() == out.data_ptr()
    assert passed["tiles"].data_ptr() == device[0][1][1].data_ptr()


def test_many_tokens_multiply_the_dense_weight(device, monkeypatch):
    given = operands(70, 24, 100, 100)
    codes = torch.zeros(24, 104, dtype=torch.bfloat16)
    codes[:, :100] = torch.randn(24, 100).to(torch.bfloat16)
    monkeypatch.setattr(cuda, "dense", lambda tiles, scale, layer: codes)
    expected = torch.nn.functional.linear(given["x"], codes[:, :100].contiguous(), given["bias"])
    # Two orders of summing 100 products in float32, each result rounded to 8 bits: one unit in the last place.
    torch.testing.assert_close(packed_linear(**given), expected, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"input_bits": 8, "bits": 8}, "groups of 64 in 8-bit weights with 8-bit activations"),
        ({"zero_point": torch.zeros(16, 2, dtype=torch.int8)}, "asymmetric weights"),
        ({"x": torch.ones(3, 128)}, "activations in float32"),
    ],
    ids=["input_bits", "zero_point", "float32"],
)
def test_what_no_kernel_computes_is_the_references_and_said_once(device, caplog, change, reason):
    given = operands(3, 16, 128, 64, change.get("bits", 4)) | change
    with caplog.at_level(logging.WARNING):
        out = [packed_linear(**given) for _ in range(2)]
    assert torch.equal(out[0], reference.packed_linear(**given, input_scale=None, input_rule="qmax"))
    assert torch.equal(out[0], out[1])
    assert [r.message for r in caplog.records] == [f"packed layers on CUDA run on the slower reference: {reason}"]
    assert device == []


@pytest.mark.parametrize("failure", ["old", "missing", "refused"])
def test_where_no_kernel_can_run_the_reference_does_and_says_why(monkeypatch, caplog, failure):
    def unable(*arguments):
        raise CompileError("NVRTC 13.5 cannot compile: its log")

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5) if failure == "old" else (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Some GPU")
    monkeypatch.setattr(cubins, "nvrtc_version", unable if failure == "missing" else lambda: "13.5")
    monkeypatch.setattr(gpu, "run", unable)
    given = operands(3, 16, 128, 64)
    with caplog.at_level(logging.WARNING):
        out = packed_linear(**given)
    assert torch.equal(out, reference.packed_linear(**given, input_scale=None, input_rule="qmax"))
    (message,) = [r.message for r in caplog.records]
    assert ("Some GPU is sm_75, the kernels need sm_80" if failure == "old" else "its log") in message


def test_the_kernels_run_only_where_they_are_asked_for(device):
    given = operands(3, 16, 128, 64)
    expected = reference.packed_linear(**given, input_scale=None, input_rule="qmax")
    assert torch.equal(cuda.packed_linear_cuda(**given), expected) and device == []
    with pytest.raises(ValueError, match="backend must be reference or cuda for CUDA tensors, got 'cpu'"):
        cuda.packed_linear_cuda(**given, backend="cpu")


def test_a_kernel_that_does_not_compile_is_tried_once(device, monkeypatch):
    tries = []

    def refuse(*arguments):
        tries.append(arguments)
        raise CompileError("its log")

    monkeypatch.setattr(gpu, "run", refuse)
    given = operands(3, 16, 128, 64)
    assert torch.equal(packed_linear(**given), packed_linear(**given))
    assert len(tries) == 1


def test_wrong_arguments_are_refused_before_anything_runs(device):
    with pytest.raises(ValueError, match="scale must have shape"):
        packed_linear(**operands(3, 16, 128, 64) | {"scale": torch.ones(16, 3)})
    assert device == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tiles": torch.zeros(8, dtype=torch.int32)}, r"tiles must be contiguous torch.int32 of shape \(512,\)"),
        ({"scale": torch.ones(2, 2, 16, dtype=torch.float16)}, "scale must be contiguous torch.bfloat16"),
        ({"bias": torch.ones(18)}, r"bias must be contiguous .* of shape \(17,\)"),
        ({"x": torch.ones(3, 128)}, "no kernel for activations in float32"),
        ({"tiles": torch.zeros(512, dtype=torch.int32, device="meta")}, "tiles is on meta, the activations on cpu"),
        ({"tiles": torch.zeros(513, dtype=torch.int32)[1:]}, "tiles must start at a multiple of 16 bytes"),
        ({"residual": torch.zeros(3, 17, dtype=torch.bfloat16, device="meta")}, "on cpu, got .* on meta"),
        ({"group_size": 192}, "group_size 192 does not divide 128 inputs"),
        ({"bits": 5}, "no kernel for 5-bit weights"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_tiled_operands_that_do_not_fit_are_refused_by_name(change, message):
    given = {
        "x": torch.ones(3, 128, dtype=torch.bfloat16),
        "tiles": torch.zeros(512, dtype=torch.int32),
        "scale": torch.ones(2, 2, 16, dtype=torch.bfloat16),
        "bias": None,
        "bits": 4,
        "group_size": 64,
        "out_features": 17,
    }
    meta = {name: value.to("meta") if isinstance(value, Tensor) else value for name, value in given.items()}
    assert torch.ops.qat.tiled_linear(**meta).shape == (3, 17)
    with pytest.raises(ValueError, match=message):
        cuda.tiled_linear(**given | change)


def test_scales_lie_by_row_tile_and_group():
    scale = torch.arange(1.0, 35.0).reshape(17, 2)
    tiled = tile_scale(scale, torch.float16)
    assert tiled.shape == (2, 2, 16) and tiled.dtype == torch.float32
    assert torch.equal(tiled[0], scale[:16].T)
    assert tiled[1, :, 0].tolist() == [33.0, 34.0] and not tiled[1, :, 1:].any()
    assert tile_scale(scale.half(), torch.float16).dtype == torch.float16
    assert tile_scale(scale.half(), torch.bfloat16).dtype == torch.float32  # bfloat16 would round them


def test_rows_are_padded_and_aligned():
    x = torch.randn(3, 13).half()
    assert torch.equal(padded_rows(x)[:, :13], x) and not padded_rows(x)[:, 13:].any()
    assert padded_rows(x).shape == (3, 16)
    whole = torch.randn(3, 16).half()
    assert padded_rows(whole).data_ptr() == whole.data_ptr()
    shifted = torch.randn(49).half()[1:].reshape(3, 16)
    assert shifted.is_contiguous() and padded_rows(shifted).data_ptr() % 16 == 0
    assert torch.equal(padded_rows(shifted), shifted)


def test_the_operator_has_its_own_kernel_for_cuda_tensors():
    assert torch._C._dispatch_has_kernel_for_dispatch_key("qat::packed_linear", "CUDA")
    assert torch._C._dispatch_has_kernel_for_dispatch_key("qat::tiled_linear", "CUDA")


def test_arguments_reach_the_kernel_as_pointers_and_c_ints():
    core = pytest.importorskip("cuda.core")
    handler = pytest.importorskip(f"{core.LaunchConfig.__module__.rpartition('.')[0]}._kernel_arg_handler")
    x = torch.zeros(4)
    holder = handler.ParamHolder([gpu.as_argument(value) for value in (x, None, -3, 2**31 - 1, 0.1)])
    addresses = (ctypes.c_void_p * 5).from_address(holder.ptr)
    assert [ctypes.c_uint64.from_address(address).value for address in addresses[:2]] == [x.data_ptr(), 0]
    assert [ctypes.c_int.from_address(address).value for address in addresses[2:4]] == [-3, 2**31 - 1]
    assert ctypes.c_float.from_address(addresses[4]).value == ctypes.c_float(0.1).value


def test_a_norm_and_its_quantization_are_one_launch_that_fits_the_signature(device):
    x, weight = torch.randn(2, 3, 250).half(), torch.ones(250).half()
    codes, scale = cuda.rmsnorm_quantize(x, weight, 1e-5, rule="half_range")
    assert codes.shape == (2, 3, 256) and codes.dtype == torch.int8
    assert scale.shape == (2, 3) and scale.dtype == torch.float32
    ((launch, arguments),) = device
    assert launch.grid == (6, 1, 1) and launch.shared_bytes == 512
    assert [name for _, name in signature("rmsnorm_quantize")][-4:] == ["K", "eps", "qmax", "half_range"]
    assert arguments[-4:] == (250, 1e-5, 127, 1)
    assert [a.shape for a in arguments[:2]] == [(6, 256), (1, 256)]
    with pytest.raises(ValueError, match=r"weight must be torch\.float16"):
        cuda.rmsnorm_quantize(x, weight.float(), 1e-5)
    with pytest.raises(ValueError, match="a token has 1 to 49152 values"):
        cuda.quantize_tokens(torch.ones(1, 50000).half())


@pytest.mark.parametrize("m", [3, 9, 70])
def test_swiglu_halves_the_result_and_a_residual_keeps_it(device, m, monkeypatch):
    given = operands(m, 40, 1024, 64)
    tiles, scale = cuda.repack(given["packed"], 4, 1024), tile_scale(given["scale"], torch.bfloat16)
    weight = torch.randn(40, 1024).to(torch.bfloat16)
    monkeypatch.setattr(cuda, "dense", lambda tiles, scale, layer: weight)
    call = partial(cuda.tiled_linear, given["x"], tiles, scale, given["bias"], 4, 64, 40)
    residual = torch.randn(m, 40).to(torch.bfloat16)
    assert call(swiglu=True).shape == (m, 20)
    if m <= 64:
        assert dict(zip([n for _, n in signature("linear_small")], device[1][1], strict=False))["tiles"] is tiles
        assert device[-1][1][-1] == 1
        call(residual=residual)
        assert device[-1][1][-1] == 0 and any(a is residual for a in device[-1][1])
    else:
        linear = torch.nn.functional.linear(given["x"], weight, given["bias"])
        assert torch.equal(call(swiglu=True), torch.nn.functional.silu(linear[:, ::2]) * linear[:, 1::2])
        assert torch.equal(call(residual=residual), residual + linear)
    with pytest.raises(ValueError, match="swiglu takes an even number of rows and no residual"):
        call(residual=residual, swiglu=True)
    with pytest.raises(ValueError, match=r"residual must be torch\.bfloat16"):
        call(residual=residual.float())


def test_int8_operands_have_fakes_and_are_refused_by_name():
    x = torch.ones(2, 3, 130, dtype=torch.float16, device="meta")
    codes, token_scale = torch.ops.qat.quantize_tokens(x)
    assert codes.shape == (2, 3, 144) and token_scale.shape == (2, 3)
    assert torch.ops.qat.rmsnorm_quantize(x, x[0, 0], 1e-6)[0].shape == (2, 3, 144)
    tiles = torch.zeros(768, dtype=torch.int32, device="meta")
    scale = torch.ones(1, 1, 16, dtype=torch.float16, device="meta")
    call = partial(torch.ops.qat.tiled_linear_int8, scale=scale, bias=None, bits=8, group_size=130, out_features=14)
    given = {"codes": codes, "token_scale": token_scale, "tiles": tiles, "dtype": torch.float16}
    out = call(**given, swiglu=True)
    assert out.shape == (2, 3, 7) and out.dtype == torch.float16
    for change, message in (
        ({"codes": codes[..., :130]}, "codes must be contiguous torch.int8"),
        ({"token_scale": token_scale[0]}, "token_scale must be contiguous torch.float32"),
        ({"dtype": torch.float32}, "no kernel for activations in float32"),
    ):
        with pytest.raises(ValueError, match=message):
            call(**given | change)
