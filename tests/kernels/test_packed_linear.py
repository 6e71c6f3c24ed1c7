import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qat.estimators import LSQ
from qat.export import fold
from qat.fake_quantizer import Stage
from qat.functional import absmax_scale, dequantize
from qat.kernels import packed_linear
from qat.nn import FakeQuantLinear
from qat.packing import pack

SCHEMES = [
    "w2a16-g32",
    "w3a16-channel",
    "w4a16-g32",
    "w4a16-channel",
    "w4a16-tensor",
    "w8a16-channel",
    "w4a8-g64",
    "w8a8-channel",
    "w8a8-channel-static",
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def trained_layer(scheme, dtype: torch.dtype, bias: bool = True) -> FakeQuantLinear:
    torch.manual_seed(0)
    layer = FakeQuantLinear.adopt(nn.Linear(128, 48, bias=bias, dtype=dtype), scheme, LSQ())
    shape = layer.weight_quantizer.scale.shape
    layer.weight_quantizer.set_scale(
        0.9 * absmax_scale(torch.full(shape, 0.09) + 0.02 * torch.rand(shape), scheme.weight)
    )
    if scheme.input is not None and not scheme.input.dynamic:
        layer.input_quantizer.set_scale(torch.tensor([0.02]))
    for quantizer in layer.quantizers:
        quantizer.set_stage(Stage.TRAIN)
    return layer


def operands(layer: FakeQuantLinear, dtype: torch.dtype) -> dict:
    folded, scheme = fold(layer, dtype), layer.scheme
    return {
        "packed": pack(folded.codes, scheme.weight.bits),
        "scale": folded.scale,
        "zero_point": None,
        "bias": None if layer.bias is None else layer.bias.detach().to(dtype),
        "bits": scheme.weight.bits,
        "group_size": scheme.weight.group_size or layer.in_features,
        "input_bits": scheme.input.bits if scheme.input else 0,
        "input_scale": folded.input_scale,
        "input_rule": scheme.input.absmax_rule if scheme.input else "qmax",
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SCHEMES)
def test_equals_the_training_forward_bit_for_bit(scheme, name, dtype):
    layer = trained_layer(scheme(name), dtype)
    x = torch.randn(2, 5, 128).to(dtype)
    out = packed_linear(x, **operands(layer, dtype))
    assert out.dtype == dtype
    assert torch.equal(out, layer(x))


@pytest.mark.parametrize("shape", [(128,), (1, 128), (0, 128), (2, 3, 4, 128)], ids=str)
def test_any_number_of_leading_dimensions(scheme, shape):
    layer = trained_layer(scheme("w4a8-g64"), torch.float32)
    assert packed_linear(torch.randn(shape), **operands(layer, torch.float32)).shape == (*shape[:-1], 48)


def test_activations_of_a_weight_only_layer_are_not_quantized(scheme):
    layer = trained_layer(scheme("w4a16-g32"), torch.float32, bias=False)
    folded = fold(layer, torch.float32)
    x = torch.randn(4, 128)
    x[:, 0] = 1e4  # INT8 would round everything beside it to zero
    expected = F.linear(x, dequantize(folded.codes, folded.scale))
    assert torch.equal(packed_linear(x, **operands(layer, torch.float32)), expected)


def test_rules_of_dynamic_scales_differ(scheme):
    layer = trained_layer(scheme("w8a8-channel"), torch.float32)
    given, x = operands(layer, torch.float32), torch.randn(4, 128)
    assert not torch.equal(packed_linear(x, **given), packed_linear(x, **given | {"input_rule": "half_range"}))


def test_a_zero_point_is_subtracted_from_the_codes():
    codes = torch.tensor([[-8, 7, 3, 0]], dtype=torch.int8)
    scale, zero_point = torch.tensor([[0.5, 2.0]]), torch.tensor([[-8, 3]], dtype=torch.int8)
    weight = packed_linear(torch.eye(4), pack(codes, 4), scale, zero_point, None, 4, 2)
    assert weight.flatten().tolist() == [0.0, 7.5, 0.0, -6.0]


@pytest.mark.parametrize("name", ["w3a16-channel", "w4a16-g32", "w8a8-channel", "w8a8-channel-static"])
def test_opcheck_passes(scheme, name):
    given = operands(trained_layer(scheme(name), torch.float32), torch.float32)
    torch.library.opcheck(torch.ops.qat.packed_linear.default, (torch.randn(2, 3, 128),), given)


def test_compiles_without_graph_breaks(scheme):
    given = operands(trained_layer(scheme("w4a8-g64"), torch.float32), torch.float32)
    compiled = torch.compile(lambda x: packed_linear(2 * x, **given) + 1, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 128)
    assert torch.equal(compiled(x), packed_linear(2 * x, **given) + 1)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"packed": torch.zeros(48, 16, dtype=torch.int64)}, "packed must be torch.int32"),
        ({"packed": torch.zeros(48, 15, dtype=torch.int32)}, r"packed must have shape \(48, 16\)"),
        ({"scale": torch.zeros(48, 2)}, r"scale must have shape \(48, 4\)"),
        ({"scale": torch.zeros(48, 4, dtype=torch.int8)}, "scale must be torch.bfloat16"),
        ({"group_size": 48}, "group_size 48 does not divide 128 inputs"),
        ({"bits": 1}, "bits must be 2 to 8"),
        ({"bias": torch.zeros(47)}, r"bias must have shape \(48,\)"),
        ({"zero_point": torch.zeros(48, 4)}, "zero_point must be torch.int8"),
        ({"input_scale": torch.ones(1)}, "input_bits is 0"),
        ({"input_rule": "absmax"}, "input_rule must be"),
        ({"x": torch.zeros(2, 128, dtype=torch.int8)}, "x must be torch.bfloat16"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_arguments_are_refused_by_name(scheme, wrong, message):
    given = {"x": torch.zeros(2, 128), **operands(trained_layer(scheme("w4a16-g32"), torch.float32), torch.float32)}
    with pytest.raises(ValueError, match=message):
        packed_linear(**given | wrong)
