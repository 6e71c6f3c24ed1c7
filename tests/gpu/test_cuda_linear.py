"""The CUDA kernels on a GPU, at the sizes of an 8B Llama.  Nothing here runs without one.

python -m pytest tests/gpu
compute-sanitizer --tool memcheck python -m pytest tests/gpu -k small
"""

import pytest
import torch

from qat.kernels import cuda, device, packed_linear
from qat.kernels.plan import Layer
from qat.kernels.tiles import tile_scale
from qat.packing import pack

if not torch.cuda.is_available():
    pytest.skip("no GPU: tests/kernels/ has the same tests on an emulator", allow_module_level=True)

SHAPES = {"small": (48, 250), "qkv": (6144, 4096), "down": (4096, 14336), "gate_up": (28672, 4096)}
TOKENS = [1, 8, 9, 16, 33, 64, 65, 300]


def operands(n: int, k: int, m: int, bits: int, group_size: int, dtype: torch.dtype) -> dict:
    """Whose partial sums are exact in float32: multiples of 2^-4 below 2^20."""
    g = torch.Generator("cuda").manual_seed(m)
    half = 2 ** (bits - 1)
    codes = torch.randint(
        -half, half, (n, k), generator=g, device="cuda", dtype=torch.int8 if bits == 8 else torch.int32
    )
    exponents = torch.randint(3, 5, (n, k // group_size), generator=g, device="cuda")
    return {
        "x": torch.randint(-2, 3, (m, k), generator=g, device="cuda").to(dtype),
        "packed": pack(codes, bits),
        "scale": (2.0**-exponents).to(dtype),
        "zero_point": None,
        "bias": torch.randint(-9, 10, (n,), generator=g, device="cuda").to(dtype),
        "bits": bits,
        "group_size": group_size,
    }


def exact(given: dict) -> torch.Tensor:
    """The reference in float32, where nothing is rounded, then in the type."""
    wide = given | {"x": given["x"].float(), "bias": given["bias"].float()}
    return packed_linear(**wide).to(given["x"].dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [32, 128, 0], ids=["g32", "g128", "channel"])
@pytest.mark.parametrize("m", TOKENS)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_equal_the_reference_bit_for_bit(shape, m, group_size, bits, dtype):
    n, k = SHAPES[shape]
    if group_size and k % group_size:
        pytest.skip("groups do not divide k")
    given = operands(n, k, m, bits, group_size or k, dtype)
    assert device.unavailable(given["x"].device) is None
    assert torch.equal(packed_linear(**given, backend="cuda"), exact(given))


def test_dequantized_weights_are_the_references(dtype=torch.bfloat16):
    given = operands(48, 250, 1, 4, 250, dtype)
    tiles, scale = cuda.repack(given["packed"], 4, 250), tile_scale(given["scale"], dtype)
    weight = cuda.dense(tiles, scale, Layer(48, 250, 4, 250, dtype, dtype))
    identity = torch.eye(250, device="cuda")  # float32: computed by the reference
    assert torch.equal(weight[:, :250], packed_linear(**given | {"x": identity, "bias": None}).T.to(dtype))
    assert not weight[:, 250:].any()


@pytest.mark.parametrize("m", [1, 64])
def test_a_second_run_and_a_replayed_graph_give_the_same_bits(m):
    given = operands(4096, 14336, m, 4, 128, torch.bfloat16)
    x = torch.randn(m, 14336, device="cuda", dtype=torch.bfloat16)
    tiles, scale = cuda.repack(given["packed"], 4, 14336), tile_scale(given["scale"], torch.bfloat16)

    def multiply():
        return torch.ops.qat.tiled_linear(x, tiles, scale, given["bias"], 4, 128, 4096)

    first = multiply()
    assert torch.equal(first, multiply())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = multiply()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(first, captured)
