"""The assignment against every assignment there is, groups, budgets, and what is refused."""

import itertools
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qat.calibration import AWQ
from qat.diagnosis import WidthSearch, assign, frontier
from qat.insertion import insert, layers

WIDTHS = (2, 3, 4, 8)


def every(costs, sizes, budget):
    """The smallest cost by trying all assignments."""
    groups = list(costs)
    fitting = (
        sum(costs[g][b] for g, b in zip(groups, chosen, strict=True))
        for chosen in itertools.product(WIDTHS, repeat=len(groups))
        if sum(sizes[g][b] for g, b in zip(groups, chosen, strict=True)) <= budget
    )
    return min(fitting)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 1000), share=st.floats(0, 1), scale=st.sampled_from([1e-9, 1e-3, 1.0]))
def test_the_assignment_costs_as_little_as_the_best_of_all(seed, share, scale):
    random = np.random.default_rng(seed)
    names = [f"group{i}" for i in range(5)]
    # Costs over six decades, and not always falling with the width: measured ones need not.
    costs = {g: {b: float(scale * 10 ** random.uniform(-6, 0)) for b in WIDTHS} for g in names}
    counts = {g: int(random.integers(1, 1000)) for g in names}
    sizes = {g: {b: 128 * counts[g] * b for b in WIDTHS} for g in names}
    low, high = (sum(f(s.values()) for s in sizes.values()) for f in (min, max))
    budget = int(low + share * (high - low))
    chosen = assign(costs, sizes, budget)
    assert list(chosen) == names
    assert sum(sizes[g][b] for g, b in chosen.items()) <= budget
    assert sum(costs[g][b] for g, b in chosen.items()) == pytest.approx(every(costs, sizes, budget), rel=1e-9)


def test_the_frontier_falls_and_ends_at_the_best_of_each_group():
    costs = {"a": {2: 3.0, 4: 1.0}, "b": {2: 8.0, 4: 0.5}}
    sizes = {"a": {2: 20, 4: 40}, "b": {2: 10, 4: 20}}
    assert frontier(costs, sizes, points=31) == [(30, 11.0), (40, 3.5), (60, 1.5)]


def test_a_budget_below_the_smallest_assignment_is_refused_in_bytes():
    with pytest.raises(ValueError, match="below the smallest assignment, 30 bytes"):
        assign({"a": {2: 1.0}}, {"a": {2: 30}}, 29)


def search(**options):
    return WidthSearch(**{"budget_bits": 4.5, "group_size": 32, "ignore": ["*lm_head"], **options})


def test_layers_that_servers_fuse_are_one_group(tiny_llama):
    groups = search().groups(tiny_llama())
    assert [g.name for g in groups][:4] == [
        "model.layers.0.self_attn.q_proj+k_proj+v_proj",
        "model.layers.0.self_attn.o_proj",
        "model.layers.0.mlp.gate_proj+up_proj",
        "model.layers.0.mlp.down_proj",
    ]
    assert sum(len(g.layers) for g in groups) == 14 and len(groups) == 8


def test_layers_that_the_user_puts_together_are_one_group_with_what_is_fused_with_them(tiny_llama):
    groups = search(together=[["*.0.self_attn.o_proj", "*.0.self_attn.q_proj"], ["*.down_proj"]]).groups(tiny_llama())
    assert groups[0].layers == tuple(f"model.layers.0.self_attn.{n}_proj" for n in "qkvo")
    assert any(g.layers == ("model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj") for g in groups)
    assert sum(len(g.layers) for g in groups) == 14


def test_a_map_gives_each_layer_its_width_and_leaves_the_rest_in_float(tiny_llama):
    model, chosen = tiny_llama(), search()
    widths = {name: bits for g, bits in zip(chosen.groups(model), (2, 3, 4, 5, 6, 7, 8, 2), strict=True)
              for name in g.layers}  # fmt: skip
    insert(model, chosen.mixed(widths))
    assert {name: layer.scheme.weight.bits for name, layer in layers(model).items()} == widths
    assert "lm_head" not in widths and type(model.lm_head) is torch.nn.Linear


def test_the_smallest_budget_that_a_refusal_names_is_accepted(tiny_llama):
    groups = search().groups(tiny_llama())
    with pytest.raises(ValueError, match="less than 2-bit codes and their scales take") as refusal:
        search(budget_bits=2.2).budget(groups)
    least = float(re.search(r"quant.budget_bits=([\d.]+), or", str(refusal.value))[1])
    assert least == 2.5  # a bfloat16 for 32 inputs is half a bit
    assert search(budget_bits=least).budget(groups) == sum(g.bytes[2] for g in groups)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"ignore": ["*lm_haed"]}, r"'\*lm_haed' matches no layer"),
        ({"together": [["*o_proj", "*experts*"]]}, r"quant.together: '\*experts\*' matches no linear layer"),
        ({"group_size": 48}, "group_size 48 does not divide 128 inputs"),
        ({"widths": [4, 9]}, "bits must be an integer from 2 to 8, got 9"),
        ({"widths": [4, 4]}, "quant.widths must be different widths"),
        ({"metric": "luck"}, "quant.metric must be kl, loss or fisher"),
        ({"calibration": AWQ()}, "AWQ moves factors between layers"),
        ({"windows": 0}, "quant.windows must be at least 1"),
    ],
    ids=["ignored typo", "together typo", "group size", "width", "same widths", "metric", "calibration", "windows"],
)
def test_settings_that_cannot_be_meant_are_refused(options, said, tiny_llama):
    with pytest.raises(ValueError, match=said):
        search(**options).groups(tiny_llama())
