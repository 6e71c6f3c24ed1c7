import json
import re
from dataclasses import replace

import pytest

from qat.scheme import FORMAT_VERSION, QuantScheme, QuantSpec, SchemeMap, cache_name, cache_spec, matches, uniform

W4 = QuantSpec(bits=4, granularity="group", group_size=32)
W8 = QuantSpec(bits=8, granularity="channel")
A8 = QuantSpec(bits=8, granularity="token", dynamic=True, absmax_rule="qmax")
STATIC = QuantSpec(bits=8, granularity="tensor")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 1}, "bits must be an integer from 2 to 8, got 1"),
        ({"bits": 9}, "bits must be an integer from 2 to 8, got 9"),
        ({"bits": 4.0}, "bits must be an integer from 2 to 8, got 4.0"),
        ({"bits": True}, "bits must be an integer from 2 to 8, got True"),
        ({"bits": "4"}, "bits must be an integer from 2 to 8, got '4'"),
        ({"granularity": "row"}, "granularity must be one of tensor, channel, group, token, head, got 'row'"),
        ({"scale_dtype": "float64"}, "scale_dtype must be one of bfloat16, float16, float32, got 'float64'"),
        ({"absmax_rule": "max"}, "absmax_rule must be one of half_range, qmax, got 'max'"),
        ({"element": "complex"}, "element must be one of int, float, got 'complex'"),
        ({"element": "float"}, "element='float' with bits=4: floats have 8 bits (e4m3)"),
        ({"granularity": "group"}, "group_size goes with granularity='group', and only with it"),
        ({"group_size": 32}, "group_size goes with granularity='group', and only with it"),
        ({"granularity": "group", "group_size": 0}, "group_size must be a positive integer, got 0"),
        ({"granularity": "group", "group_size": -32}, "group_size must be a positive integer, got -32"),
        ({"granularity": "group", "group_size": 32.0}, "group_size must be a positive integer, got 32.0"),
        ({"symmetric": False}, "symmetric=False with granularity='channel' and grid='full': only static activations"),
        ({"symmetric": False, "granularity": "token", "dynamic": True}, "only static activations have zero points"),
        ({"granularity": "token"}, "per-token scales are dynamic, and only they are"),
        ({"dynamic": True}, "per-token scales are dynamic, and only they are"),
    ],
    ids=lambda value: " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_a_contradictory_spec_is_refused_with_what_is_wrong(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        QuantSpec(**{"bits": 4, "granularity": "channel", **fields})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weight": A8}, "weights have static scales"),
        ({"weight": QuantSpec(bits=8, granularity="tensor", symmetric=False)}, "weights have no zero points"),
        ({"weight": W4, "input": W8}, "input granularity must be token or tensor, got 'channel'"),
        ({"weight": W4, "input": W4}, "input granularity must be token or tensor, got 'group'"),
        ({"weight": QuantSpec(bits=8, granularity="channel", element="float")}, "FP8 is for keys and values"),
        ({"weight": W8, "input": cache_spec("fp8-token")}, "FP8 is for keys and values"),
    ],
    ids=["dynamic weight", "asymmetric weight", "input per channel", "input per group", "FP8 weight", "FP8 input"],
)
def test_a_contradictory_scheme_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        QuantScheme(**fields)


@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_are_twos_complement(bits):
    spec = QuantSpec(bits=bits, granularity="channel")
    assert (spec.qmin, spec.qmax) == (-(1 << bits) // 2, (1 << bits) // 2 - 1)
    assert spec.absmax_divisor == ((1 << bits) - 1) / 2
    assert QuantSpec(bits=bits, granularity="channel", absmax_rule="qmax").absmax_divisor == spec.qmax


@pytest.mark.parametrize(
    ("inputs", "size", "choices"),
    [
        (96, 64, "use group_size 32$"),
        (384, 256, "use group_size 32 or 64 or 128$"),
        (172, 128, "use granularity=channel$"),
        (64, 128, "use group_size 32 or 64$"),
    ],
)
def test_a_group_size_that_does_not_divide_names_those_that_do(inputs, size, choices):
    with pytest.raises(ValueError, match=f"group_size {size} does not divide {inputs} inputs; {choices}"):
        QuantSpec(bits=4, granularity="group", group_size=size).groups(inputs)


def test_groups_count_the_scales_of_a_row():
    assert (W4.groups(128), W8.groups(128)) == (4, 1)


@pytest.mark.parametrize(
    "scheme",
    [
        QuantScheme(weight=W4),
        QuantScheme(weight=W8, input=A8),
        QuantScheme(weight=W8, input=QuantSpec(bits=8, granularity="tensor")),
    ],
    ids=str,
)
def test_a_scheme_survives_json(scheme):
    written = json.loads(json.dumps(scheme.to_dict()))
    assert written["format_version"] == FORMAT_VERSION
    assert QuantScheme.from_dict(written) == scheme


def test_a_newer_format_is_refused_by_its_number():
    written = {**QuantScheme(weight=W4).to_dict(), "format_version": FORMAT_VERSION + 1}
    with pytest.raises(ValueError, match=rf"scheme format {FORMAT_VERSION + 1} is newer .*upgrade qat"):
        QuantScheme.from_dict(written)


@pytest.mark.parametrize(
    ("scheme", "name"),
    [
        (QuantScheme(weight=W4), "w4a16-g32"),
        (QuantScheme(weight=W8, input=A8), "w8a8-channel"),
        (QuantScheme(weight=W8, input=STATIC), "w8a8-channel-static"),
        (QuantScheme(weight=W8, input=replace(STATIC, symmetric=False)), "w8a8-channel-asymmetric"),
        (QuantScheme(weight=QuantSpec(bits=3, granularity="tensor")), "w3a16-tensor"),
    ],
)
def test_a_scheme_is_called_by_its_widths_and_found_by_that_name(scheme, name):
    assert str(scheme) == name
    assert QuantScheme.parse(name) == scheme


@pytest.mark.parametrize("name", ["w8a16-channel-static", "w8a8-channel-dynamic", "w8a8", "int8"])
def test_what_no_scheme_is_called_is_refused(name):
    with pytest.raises(ValueError, match=rf"no scheme is called '{name}'"):
        QuantScheme.parse(name)


@pytest.mark.parametrize(
    ("pattern", "name", "covered"),
    [
        ("*lm_head", "lm_head", True),
        ("*lm_head", "model.lm_head", True),
        ("*lm_head", "lm_head.proj", False),
        ("*.mlp.*", "layers.0.mlp.up_proj", True),
        ("mlp", "layers.0.mlp", False),
        ("*MLP*", "layers.0.mlp.up", False),
        ("layers.[01].*", "layers.1.up", True),
        ("layers.[01].*", "layers.2.up", False),
        (r"re:layers\.\d+\.up", "layers.12.up", True),
        (r"re:layers\.\d+\.up", "layers.12.up_proj", False),
        (r"re:.*\.(q|k)_proj", "model.layers.0.self_attn.k_proj", True),
        ("re:up", "layers.0.up", False),
    ],
)
def test_a_pattern_covers_the_whole_dotted_name(pattern, name, covered):
    assert matches(pattern, name) is covered


def test_the_first_matching_rule_decides():
    four, eight = QuantScheme(weight=W4), QuantScheme(weight=W8)
    schemes = SchemeMap(name="x", rules={"*down*": eight, "*.0.*": None, "*": four})
    assert schemes.scheme_of("layers.0.down_proj") == eight
    assert schemes.scheme_of("layers.0.up_proj") is None
    assert schemes.scheme_of("layers.1.up_proj") == four
    assert SchemeMap(name="x", rules={"a": four}).scheme_of("b") is None


def test_uniform_ignores_before_it_overrides_before_the_rest():
    eight = QuantScheme(weight=W8)
    schemes = uniform(W4, ignore=["*lm_head"], overrides={"*head": eight, "*down*": eight, "*norm*": None})
    assert schemes.name == "w4a16-g32+mixed"
    assert schemes.scheme_of("lm_head") is None
    assert schemes.scheme_of("other_head") == eight
    assert schemes.scheme_of("norm") is None
    assert schemes.scheme_of("up") == QuantScheme(weight=W4)
    assert uniform(W4, ignore=["*lm_head"]).name == "w4a16-g32"


def test_a_pattern_that_is_ignored_stays_ignored_whatever_an_override_says():
    schemes = uniform(W4, ignore=["*head"], overrides={"*x": QuantScheme(weight=W4), "*head": QuantScheme(weight=W8)})
    assert list(schemes.rules) == ["*head", "*x", "*"]
    assert schemes.scheme_of("head") is None


def test_ignoring_everything_quantizes_nothing():
    assert uniform(W4, ignore=["*"]).scheme_of("up") is None
    assert not uniform(W4, ignore=["*"]).quantizes


def test_an_override_of_everything_is_not_overwritten():
    assert uniform(W4, overrides={"*": QuantScheme(weight=W8)}).scheme_of("up") == QuantScheme(weight=W8)


def test_no_weight_spec_quantizes_nothing():
    schemes = uniform(None)
    assert schemes.name == "none"
    assert not schemes.quantizes
    assert uniform(W4).quantizes


@pytest.mark.parametrize("name", ["int8", "int8-head", "int8-token", "fp8", "fp8-head", "fp8-token"])
def test_specs_of_keys_and_values_have_names(name):
    spec = cache_spec(name)
    assert cache_name(spec) == name
    assert (spec.qmax, spec.absmax_divisor) == ((127, 127.0) if "int" in name else (448, 448.0))
    assert uniform(None, kv_cache=name).quantizes and uniform(W4, kv_cache=name).name == f"w4a16-g32+kv-{name}"


def test_what_is_no_spec_of_keys_and_values_is_refused():
    with pytest.raises(ValueError, match="kv_cache='int4': it is int8 or fp8"):
        cache_spec("int4")
    with pytest.raises(ValueError, match="kv_cache of 8 bits and a scale a channel: keys and values have 8 bits"):
        SchemeMap(name="test", kv_cache=W8)
    with pytest.raises(ValueError, match="keys and values have no zero points, and the full grid"):
        SchemeMap(name="test", kv_cache=QuantSpec(bits=8, granularity="tensor", symmetric=False))
