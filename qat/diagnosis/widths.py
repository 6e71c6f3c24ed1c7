"""The width of each layer: the assignment that costs least within a budget of bytes, by an integer programme.

    minimise   sum over groups g, widths b of  cost[g, b] * x[g, b]
    subject to sum over b of x[g, b] = 1 for every g,   sum of bytes[g, b] * x[g, b] <= budget,   x in {0, 1}

A group is what must share one width: the layers that servers fuse, and what the user puts together.  The cost of an
assignment is *predicted* as the sum of what each group costs when it alone is quantized (HAWQ-V2, arXiv 1911.03852,
adds up its own metric in the same way).  That is right to the order to which errors do not interact: errors of
different layers add up or cancel in the residual stream, so the sum is a ranking of assignments more than a forecast,
and a poorer one where a group alone already costs a large part of the loss, as it does at 2 bits.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import nn

from qat.calibration import GPTQ, RangeCalibration
from qat.export.compressed_tensors import stored_bytes
from qat.insertion import plan
from qat.nn import LAYERS
from qat.scheme import QuantScheme, QuantSpec, SchemeMap, cache_spec, matches
from qat.structure import fused

Table = Mapping[str, Mapping[int, float]]
"""A number for each group, by name, at each width."""


@dataclass(frozen=True)
class Group:
    """Layers that share one width.

    Attributes:
        name: of the group: its layers' path, and their own names joined by `+`; the first one's where paths differ.
        layers: dotted names.
        weights: how many numbers they hold.
        bytes: of their codes and scales, by width.
    """

    name: str
    layers: tuple[str, ...]
    weights: int
    bytes: dict[int, int]


@dataclass(frozen=True, kw_only=True)
class WidthSearch:
    """How the width of each layer is chosen; `conf/quant/auto.yaml` is this.

    Attributes:
        budget_bits: bytes of codes *and scales* of all quantized layers, as bits for each of their weights: INT4 with a
            bfloat16 scale for 128 inputs has 4.125.
        widths: to choose from, bits.
        group_size: inputs that share a scale, at every width; None for one scale a channel.
        input: how input activations are quantized, at every width; None leaves them in the compute dtype.
        ignore: patterns of linear layers left in float.
        together: more groups: each is a list of patterns, and all layers that match one of them share a width.
        metric: what is minimised: the `kl` divergence from the float model, the rise of the `loss`, or the `fisher`
            estimate, which needs no forward with a quantized layer.
        calibration: what quantizes a layer while its sensitivity is measured.
        windows: of the calibration split that sensitivities are measured on.
        kv_cache: of keys and values, as `qat.scheme.cache_spec` names it; in float while widths are searched.

    Raises:
        ValueError: the fields contradict each other.
    """

    budget_bits: float
    widths: Sequence[int] = (2, 3, 4, 5, 6, 7, 8)
    group_size: int | None = 128
    input: QuantSpec | None = None
    ignore: Sequence[str] = ()
    together: Sequence[Sequence[str]] = ()
    metric: Literal["kl", "loss", "fisher"] = "kl"
    calibration: RangeCalibration | GPTQ = field(default_factory=GPTQ)
    windows: int = 32
    kv_cache: str | None = None

    def __post_init__(self) -> None:
        if not self.widths or len(set(self.widths)) < len(self.widths):
            raise ValueError(f"quant.widths must be different widths, got {list(self.widths)}")
        if self.metric not in ("kl", "loss", "fisher"):
            raise ValueError(f"quant.metric must be kl, loss or fisher, got {self.metric!r}")
        if not isinstance(self.calibration, (RangeCalibration, GPTQ)):
            raise ValueError(
                f"quant.calibration={type(self.calibration).__name__} moves factors between layers, so no layer can be "
                "quantized alone by it: use ranges or GPTQ here; calibration=... may still be any"
            )
        if self.windows < 1:
            raise ValueError(f"quant.windows must be at least 1, got {self.windows}")
        for bits in self.widths:
            self.uniform(bits)

    def scheme(self, bits: int) -> QuantScheme:
        """Of a layer with `bits` wide weights."""
        granularity: Any = "group" if self.group_size else "channel"
        return QuantScheme(
            weight=QuantSpec(bits=bits, granularity=granularity, group_size=self.group_size), input=self.input
        )

    def uniform(self, bits: int) -> SchemeMap:
        """The map with one width everywhere."""
        scheme = self.scheme(bits)
        rules = {**dict.fromkeys(self.ignore), "*": scheme}
        return SchemeMap(name=f"{scheme}{self._suffix}", rules=rules, kv_cache=self._cache)

    def mixed(self, widths: Mapping[str, int]) -> SchemeMap:
        """The map that gives each layer, by its dotted name, a width of its own, and leaves all others in float."""
        inputs, size = self.input.bits if self.input else 16, self.group_size
        name = f"auto{self.budget_bits:g}a{inputs}-{f'g{size}' if size else 'channel'}{self._suffix}"
        rules = {layer: self.scheme(bits) for layer, bits in widths.items()}
        return SchemeMap(name=name, rules=rules, kv_cache=self._cache)

    @property
    def _cache(self) -> QuantSpec | None:
        return None if self.kv_cache is None else cache_spec(self.kv_cache)

    @property
    def _suffix(self) -> str:
        return "" if self.kv_cache is None else f"+kv-{self.kv_cache}"

    def groups(self, model: nn.Module) -> list[Group]:
        """The groups of a float `model`, in the order of its modules.

        Raises:
            ValueError: a pattern matches no layer, or a layer cannot be quantized.
        """
        chosen = plan(model, self.uniform(min(self.widths)))
        owner = {name: name for name in chosen}  # the first layer of each layer's group
        for shared in self._shared(list(chosen)):
            owners = {owner[name] for name in shared}
            owner |= {name: next(n for n in chosen if n in owners) for name in chosen if owner[name] in owners}
        members: dict[str, list[str]] = {}
        for name, first in owner.items():
            members.setdefault(first, []).append(name)
        return [self._group(model, tuple(names)) for names in members.values()]

    def _shared(self, names: list[str]) -> list[list[str]]:
        """Layers that must share a width, as overlapping lists."""
        for patterns in self.together:
            for pattern in patterns:
                if not any(matches(pattern, name) for name in names):
                    raise ValueError(
                        f"quant.together: {pattern!r} matches no linear layer of {', '.join(names[:4])}, ..."
                    )
        by_user = [[n for n in names if any(matches(p, n) for p in patterns)] for patterns in self.together]
        return [*fused(names), *by_user]

    def _group(self, model: nn.Module, names: tuple[str, ...]) -> Group:
        modules: list[Any] = [model.get_submodule(name) for name in names]
        matrices = [LAYERS[type(module)].as_matrix(module.weight) for module in modules]
        shapes = [(matrix.shape[0], matrix.shape[1]) for matrix in matrices]
        parents = {name.rpartition(".")[0] for name in names}
        rest = [name.rpartition(".")[2] for name in names[1:]]
        return Group(
            name="+".join([names[0], *rest]) if len(parents) == 1 else f"{names[0]} and {len(rest)} more",
            layers=names,
            weights=sum(rows * inputs for rows, inputs in shapes),
            bytes={bits: sum(stored_bytes(self.scheme(bits), shape) for shape in shapes) for bits in self.widths},
        )

    def budget(self, groups: Sequence[Group]) -> int:
        """The budget in bytes.

        Raises:
            ValueError: below the smallest assignment; names the smallest possible `budget_bits`.
        """
        weights, smallest = sum(g.weights for g in groups), sum(min(g.bytes.values()) for g in groups)
        budget = math.floor(self.budget_bits * weights / 8)
        if budget < smallest:
            least = math.ceil(8e4 * smallest / weights) / 1e4
            raise ValueError(
                f"quant.budget_bits={self.budget_bits:g} is less than {min(self.widths)}-bit codes and their scales "
                f"take: give at least quant.budget_bits={least:g}, or a smaller width in quant.widths"
            )
        return budget


def assign(costs: Table, sizes: Table, budget: int) -> dict[str, int]:
    """The width of each group with the smallest sum of costs whose bytes are within `budget`; exact.

    Args:
        costs: in any unit, finite.
        sizes: bytes, whole numbers.
        budget: bytes.

    Raises:
        ValueError: no assignment is that small.
    """
    smallest = sum(min(by_width.values()) for by_width in sizes.values())
    if budget < smallest:
        raise ValueError(f"a budget of {budget} bytes is below the smallest assignment, {smallest:.0f} bytes")
    pairs = [(group, bits) for group in costs for bits in costs[group]]
    cost = np.array([costs[g][b] for g, b in pairs], np.float64)
    unit = math.gcd(*(int(sizes[g][b]) for g, b in pairs))
    size = np.array([int(sizes[g][b]) // unit for g, b in pairs], np.float64)
    once = np.array([[g == group for g, _ in pairs] for group in costs], np.float64)
    found = milp(
        # HiGHS stops within 1e-6 of the best, in the unit of the objective, whatever mip_rel_gap says.
        1e6 * cost / max(np.abs(cost).max(), 1e-300),
        integrality=np.ones(len(pairs)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(once, 1, 1), LinearConstraint(size[None], ub=budget // unit)],
        options={"mip_rel_gap": 0.0},
    )
    assert found.x is not None, found.message
    chosen = {group: bits for (group, bits), x in zip(pairs, found.x, strict=True) if x > 0.5}
    assert sum(sizes[g][b] for g, b in chosen.items()) <= budget, "the solver's tolerance broke the budget"
    return chosen


def frontier(costs: Table, sizes: Table, points: int = 25) -> list[tuple[int, float]]:
    """(bytes, predicted cost) of the best assignments from the smallest to the largest size, each once."""
    low, high = (sum(f(by_width.values()) for by_width in sizes.values()) for f in (min, max))
    found = {}
    for budget in np.linspace(low, high, points):
        chosen = assign(costs, sizes, int(budget))
        found[int(sum(sizes[g][b] for g, b in chosen.items()))] = sum(costs[g][b] for g, b in chosen.items())
    return sorted(found.items())
