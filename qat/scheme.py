"""What is quantized, and how: plain values, no tensors.

A *spec* says how one tensor is quantized, a *scheme* how a layer is, a *map* how a model is.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

Granularity = Literal["tensor", "channel", "group", "token", "head"]
Element = Literal["int", "float"]
ScaleDtype = Literal["bfloat16", "float16", "float32"]
AbsmaxRule = Literal["half_range", "qmax"]
Kind = Literal["linear", "embedding", "conv"]
Grid = Literal["full", "narrow", "odd"]

FORMAT_VERSION = 2  # 1 had no `grid`
_E4M3_MAX = 448  # 1.75 * 2^8: the code above it, 1.875 * 2^8, is NaN


def _check_choice(name: str, value: Any, choices: Any) -> None:
    if value not in get_args(choices):
        raise ValueError(f"{name} must be one of {', '.join(get_args(choices))}, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class QuantSpec:
    """How one tensor is quantized: signed numbers (codes), less a zero point where there is one, times a scale.

    Attributes:
        bits: width, 2 to 8; 8 for floats.
        grid: which integers are codes.  `full`: all that `bits` hold, from -2^(bits-1).  `narrow`: all but that one,
            symmetric around zero; ternary at 2 bits.  `odd`: the 2^bits odd integers around zero (-3, -1, 1, 3 at
            2 bits), symmetric and without zero, the scale being half a step (arXiv 2502.02631, section 3.2).
        granularity: what shares a scale: the `tensor`, an output `channel`, a `group` of
            `group_size` consecutive inputs of one channel, or a `token` (activations); of keys and values a `head`, or
            a `token` in a head.
        group_size: for `granularity="group"` only.
        symmetric: the zero point is 0.  False, for static activations only: an integer, such that 0 is a value.
        dynamic: the scale is computed from each tensor as it comes (activations), not trained.
        scale_dtype: what the artifact stores; scales are rounded to it before codes are computed,
            in training too.
        absmax_rule: the scale that covers an absolute maximum a: `half_range` is
            a / ((2^bits - 1) / 2), compressed-tensors' rule, and a / 2^bits on the odd grid, whose outermost bins end
            there; `qmax` is a / qmax, which clips nothing and is what servers' dynamic INT8 kernels use.  Of floats
            both are a / qmax.
        element: `int`, or `float`: OCP FP8 e4m3 without infinities (arXiv 2209.05433, table 1), whose largest value is
            448; for keys and values only.
        nested: narrower widths that the same codes serve by their high bits (`at`); kept the widest first.
        sliced_from: the width whose codes these are the high bits of, in a spec that `at` made.

    Raises:
        ValueError: the fields contradict each other.
    """

    bits: int
    granularity: Granularity
    grid: Grid = "full"
    group_size: int | None = None
    symmetric: bool = True
    dynamic: bool = False
    scale_dtype: ScaleDtype = "bfloat16"
    absmax_rule: AbsmaxRule = "half_range"
    element: Element = "int"
    nested: tuple[int, ...] = ()
    sliced_from: int | None = None

    def __post_init__(self) -> None:
        if not (isinstance(self.bits, int) and 2 <= self.bits <= 8):
            raise ValueError(f"bits must be an integer from 2 to 8, got {self.bits!r}")
        _check_choice("granularity", self.granularity, Granularity)
        _check_choice("grid", self.grid, Grid)
        _check_choice("scale_dtype", self.scale_dtype, ScaleDtype)
        _check_choice("absmax_rule", self.absmax_rule, AbsmaxRule)
        _check_choice("element", self.element, Element)
        if self.element == "float" and self.bits != 8:
            raise ValueError(f"element='float' with bits={self.bits}: floats have 8 bits (e4m3)")
        if self.element == "float" and self.grid != "full":
            raise ValueError(f"element='float' with grid={self.grid!r}: grids are of integers")
        if self.grid == "odd" and self.bits == 8:
            raise ValueError("grid='odd' at 8 bits: its codes, up to 255, do not fit INT8; use grid='full'")
        if (self.granularity == "group") != (self.group_size is not None):
            raise ValueError(
                f"granularity={self.granularity!r} with group_size={self.group_size}: "
                "group_size goes with granularity='group', and only with it"
            )
        if self.group_size is not None and not (isinstance(self.group_size, int) and self.group_size >= 1):
            raise ValueError(f"group_size must be a positive integer, got {self.group_size!r}")
        if not self.symmetric and (self.granularity != "tensor" or self.grid != "full" or self.element != "int"):
            raise ValueError(
                f"symmetric=False with granularity={self.granularity!r} and grid={self.grid!r}: only static "
                "activations have zero points (granularity='tensor', grid='full', integers); use symmetric=True"
            )
        if (self.granularity == "token") != self.dynamic:
            raise ValueError(
                f"granularity={self.granularity!r} with dynamic={self.dynamic}: per-token scales are dynamic, "
                "and only they are"
            )
        if not all(isinstance(width, int) and 2 <= width < self.bits for width in self.nested):
            raise ValueError(
                f"nested={list(self.nested)}: the high bits of {self.bits}-bit codes serve integer widths from 2 to "
                f"{self.bits - 1}"
            )
        if (self.nested or self.sliced_from is not None) and self.grid != "full":
            raise ValueError(f"nested={list(self.nested)} with grid={self.grid!r}: only codes of the full grid nest")
        object.__setattr__(self, "nested", tuple(sorted(set(self.nested), reverse=True)))

    @property
    def qmin(self) -> int:
        """The smallest code."""
        if self.element == "float" or self.grid != "full":
            return -self.qmax
        return -(2 ** (self.bits - 1))

    @property
    def qmax(self) -> int:
        """The largest code."""
        return _E4M3_MAX if self.element == "float" else self.spacing * 2 ** (self.bits - 1) - 1

    @property
    def spacing(self) -> int:
        """From one code of integers to the next."""
        return 2 if self.grid == "odd" else 1

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths that the codes serve, the widest first."""
        return (self.bits, *self.nested)

    def at(self, bits: int) -> "QuantSpec":
        """The spec of the high `bits` of this one's codes, which has `step` times its scale (arXiv 2502.06786, eq. 6).

        Raises:
            ValueError: `bits` is none of `widths`.
        """
        if bits not in self.widths:
            raise ValueError(f"there are no {bits}-bit codes in {self.bits}-bit ones with nested={list(self.nested)}")
        return self if bits == self.bits else replace(self, bits=bits, nested=(), sliced_from=self.bits)

    @property
    def parent(self) -> "QuantSpec":
        """The spec of the codes that these are the high bits of; itself where they are not."""
        return self if self.sliced_from is None else replace(self, bits=self.sliced_from, sliced_from=None)

    @property
    def step(self) -> int:
        """The distance of two codes in codes of the parent, a power of two."""
        return 1 if self.sliced_from is None else 2 ** (self.sliced_from - self.bits)

    @property
    def alone(self) -> "QuantSpec":
        """The ordinary spec of this width, which is what an artifact needs to know."""
        return replace(self, nested=(), sliced_from=None)

    @property
    def absmax_divisor(self) -> float:
        """What an absolute maximum is divided by to become a scale."""
        if self.absmax_rule == "qmax" or self.element == "float":
            return float(self.qmax)
        return 2.0**self.bits if self.grid == "odd" else (2**self.bits - 1) / 2

    def groups(self, in_features: int) -> int:
        """Scales in one row of a weight (out, in).

        Raises:
            ValueError: `group_size` does not divide `in_features`.
        """
        if self.group_size is None:
            return 1
        if in_features % self.group_size:
            fitting = [g for g in (32, 64, 128, 256) if in_features % g == 0]
            choices = f"group_size {' or '.join(map(str, fitting))}" if fitting else "granularity=channel"
            raise ValueError(f"group_size {self.group_size} does not divide {in_features} inputs; use {choices}")
        return in_features // self.group_size


@dataclass(frozen=True, kw_only=True)
class QuantScheme:
    """How one layer is quantized.

    Attributes:
        weight: of its weight (out, in).
        input: of its input activations, or None to leave them in the compute dtype.
    """

    weight: QuantSpec
    input: QuantSpec | None = None

    def __post_init__(self) -> None:
        if self.weight.granularity in ("token", "head"):
            raise ValueError("weights have static scales: granularity must be tensor, channel or group")
        if not self.weight.symmetric:
            raise ValueError("weights have no zero points: use symmetric=True for them")
        if any(spec is not None and spec.element == "float" for spec in (self.weight, self.input)):
            raise ValueError("FP8 is for keys and values (kv_cache): no packed layer computes with it; use integers")
        if self.input is not None and self.input.granularity not in ("token", "tensor"):
            raise ValueError(f"input granularity must be token or tensor, got {self.input.granularity!r}")
        if self.input is not None and self.input.grid != "full":
            raise ValueError(f"input grid must be full, got {self.input.grid!r}: narrow and odd are for weights")
        if self.input is not None and self.input.nested:
            raise ValueError("input.nested: only the codes of weights are kept, and can be sliced; set nested=[]")

    def __str__(self) -> str:
        weight, size = self.weight, self.weight.group_size
        where = f"g{size}" if size else weight.granularity
        grid = "" if weight.grid == "full" else f"-{weight.grid}"
        widths, inputs = ".".join(map(str, weight.widths)), ""
        if self.input is not None and not self.input.dynamic:
            inputs = "-static" if self.input.symmetric else "-asymmetric"
        return f"w{widths}a{self.input.bits if self.input else 16}-{where}{grid}{inputs}"

    def at(self, bits: int) -> "QuantScheme":
        """The ordinary scheme of the artifact that holds the weight at `bits`; where nothing is nested, itself.

        Raises:
            ValueError: as `QuantSpec.at`.
        """
        return replace(self, weight=self.weight.at(bits).alone) if self.weight.nested else self

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for checkpoints and artifacts; `from_dict` reads them back."""
        return {"format_version": FORMAT_VERSION, "weight": _values(self.weight), "input": _values(self.input)}

    @classmethod
    def parse(cls, name: str) -> "QuantScheme":
        """The scheme that `str` writes: `w4a16-g128`, `w2a16-g64-odd`, `w4a8-g32` (8-bit inputs: a scale a token),
        `w8a8-channel-static` (a calibrated scale a tensor; `-asymmetric`: and a zero point), `w8.4.2a16-g128` (nested
        widths).

        Raises:
            ValueError: the name is none.
        """
        pattern = r"w(\d(?:\.\d)*)a(8|16)-(?:g(\d+)|(channel|tensor))(?:-(narrow|odd))?(?:-(static|asymmetric))?"
        match = re.fullmatch(pattern, name)
        if match is None or (match[2] == "16" and match[6]):
            raise ValueError(
                f"no scheme is called {name!r}: they are called w4a16-g128, w8a16-channel, w8a8-channel, ..."
            )
        widths, input_bits, size, where, grid, static = match.groups()
        bits, *nested = map(int, widths.split("."))
        shape: dict[str, Any] = {"granularity": where or "group", "group_size": int(size) if size else None}
        weight = QuantSpec(bits=bits, grid=grid or "full", nested=tuple(nested), **shape)  # type: ignore[arg-type]
        inputs = QuantSpec(bits=8, granularity="token", dynamic=True, absmax_rule="qmax")
        if static:
            inputs = QuantSpec(bits=8, granularity="tensor", symmetric=static == "static")
        return cls(weight=weight, input=inputs if input_bits == "8" else None)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "QuantScheme":
        """The scheme that `to_dict` wrote.

        Raises:
            ValueError: written by a newer version of qat.
        """
        version = values.get("format_version", FORMAT_VERSION)
        if version > FORMAT_VERSION:
            raise ValueError(f"scheme format {version} is newer than this qat reads ({FORMAT_VERSION}): upgrade qat")
        read = {k: QuantSpec(**v) if v is not None else None for k, v in values.items() if k != "format_version"}
        return cls(**read)  # type: ignore[arg-type]


def _values(spec: QuantSpec | None) -> dict[str, Any] | None:
    """The fields of a spec; those of nesting only where it nests, so that older readers take all others."""
    if spec is None:
        return None
    return {name: value for name, value in asdict(spec).items() if name not in ("nested", "sliced_from") or value}


@dataclass(frozen=True, kw_only=True)
class SchemeMap:
    """How a model is quantized: the first pattern that matches a module's dotted name decides.

    Attributes:
        name: what summaries call it.
        rules: pattern to scheme, in order; None leaves a module in float.  A pattern is a glob over
            the whole dotted name (`*.mlp.*`), or a regular expression after `re:`.
        kinds: of layers that rules are about; all others stay in float.
        kv_cache: how the keys and values of every attention are, after their rotary embedding, as a cache holds them:
            8 bits, a scale a tensor, head or token; None leaves them in float.

    Raises:
        ValueError: a kind is unknown, or `kv_cache` is not for keys and values.

    Example:
        `SchemeMap(name="w4a16", rules={"*lm_head": None, "*": QuantScheme(weight=...)})`
    """

    name: str
    rules: Mapping[str, QuantScheme | None] = field(default_factory=dict)
    kinds: Sequence[Kind] = ("linear",)
    kv_cache: QuantSpec | None = None

    def __post_init__(self) -> None:
        for kind in self.kinds:
            _check_choice("kinds", kind, Kind)
        cache = self.kv_cache
        if cache is not None and (cache.bits != 8 or cache.granularity not in ("tensor", "head", "token")):
            raise ValueError(
                f"kv_cache of {cache.bits} bits and a scale a {cache.granularity}: keys and values have 8 bits and a "
                "scale a tensor, head or token"
            )
        if cache is not None and not (cache.symmetric and cache.grid == "full"):
            raise ValueError("kv_cache: keys and values have no zero points, and the full grid")

    def scheme_of(self, module_name: str) -> QuantScheme | None:
        """The scheme of the module called `module_name`, or None where it stays float."""
        for pattern, scheme in self.rules.items():
            if matches(pattern, module_name):
                return scheme
        return None

    @property
    def quantizes(self) -> bool:
        """Whether anything is quantized."""
        return any(self.rules.values()) or self.kv_cache is not None


def uniform(
    weight: QuantSpec | None,
    input: QuantSpec | None = None,
    ignore: Sequence[str] = (),
    overrides: Mapping[str, QuantScheme | str | None] | None = None,
    kinds: Sequence[Kind] = ("linear",),
    kv_cache: QuantSpec | str | None = None,
) -> SchemeMap:
    """One scheme for all layers of some kinds but some; `conf/quant/` is made of this.

    Args:
        weight, input: the scheme; `weight=None` quantizes no layer.
        ignore: patterns of layers left in float.
        overrides: pattern to another scheme, its name (see `QuantScheme.parse`) or None, looked at after `ignore`
            and before the rest.
        kinds: of layers that are quantized.
        kv_cache: of keys and values: a spec, or its name (see `cache_spec`); None leaves them in float.
    """
    cache = cache_spec(kv_cache) if isinstance(kv_cache, str) else kv_cache
    suffix = f"kv-{cache_name(cache)}" if cache is not None else ""
    ignored = dict.fromkeys(ignore)
    others = {p: QuantScheme.parse(s) if isinstance(s, str) else s for p, s in (overrides or {}).items()}
    rules: dict[str, QuantScheme | None] = {**ignored, **others, **ignored}  # ignored stay first, and None
    if weight is None:
        return SchemeMap(name=suffix or "none", rules=rules, kv_cache=cache)
    scheme = QuantScheme(weight=weight, input=input)
    mixed = ("+mixed" if overrides else "") + (f"+{suffix}" if suffix else "")
    rules = rules if "*" in rules else {**rules, "*": scheme}
    return SchemeMap(name=f"{scheme}{mixed}", rules=rules, kinds=tuple(kinds), kv_cache=cache)


def cache_spec(name: str) -> QuantSpec:
    """The spec of keys and values called `name`: `int8` or `fp8`, a scale a tensor; `int8-head`, `fp8-token`, ...

    Raises:
        ValueError: the name is none.
    """
    element, _, where = name.partition("-")
    if element not in ("int8", "fp8") or where not in ("", "head", "token"):
        raise ValueError(f"kv_cache={name!r}: it is int8 or fp8, alone, with -head or with -token; or null")
    return QuantSpec(
        bits=8,
        granularity=where or "tensor",  # type: ignore[arg-type]
        dynamic=where == "token",
        absmax_rule="qmax",
        element="float" if element == "fp8" else "int",
    )


def cache_name(spec: QuantSpec) -> str:
    """What `cache_spec` calls the spec of keys and values."""
    element = "fp8" if spec.element == "float" else "int8"
    return element if spec.granularity == "tensor" else f"{element}-{spec.granularity}"


def matches(pattern: str, name: str) -> bool:
    """Whether a rule's pattern covers the whole dotted `name`."""
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    return fnmatchcase(name, pattern)
