"""Sensitivities against what an outsider measures, and that measuring leaves no trace."""

import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import qat.diagnosis.sensitivity as sensitivity
from qat.calibration import GPTQ, RangeCalibration
from qat.diagnosis import WidthSearch, assign, measure
from qat.diagnosis.fisher import fisher_traces
from qat.export import export, record
from qat.fake_quantizer import Stage, token_mask
from qat.functional import fake_quantize
from qat.inference import load_packed
from qat.insertion import insert, layers, set_stage
from qat.scheme import QuantSpec, SchemeMap


def search(**options):
    return WidthSearch(
        **{"budget_bits": 4.5, "widths": (3, 8), "group_size": 32, "ignore": ["*lm_head"], "windows": 6, **options}
    )


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 256, (8, 17), generator=generator)
    labels = ids[:, 1:].clone()
    labels[1, 5:] = -100
    mask = torch.ones(8, 16, dtype=torch.bool)
    mask[1, 5:] = False
    whole = {"input_ids": ids[:, :-1], "labels": labels, "attention_mask": mask}
    return [{k: v[:4] for k, v in whole.items()}, {k: v[4:] for k, v in whole.items()}]


def forward_of(model):
    return lambda batch: (
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    )


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("calibration", [RangeCalibration("mse"), GPTQ()], ids=["mse", "gptq"])
def test_costs_are_those_of_the_model_with_only_that_group_quantized(calibration, batches, tiny_llama):
    model, chosen = tiny_llama(), search(calibration=calibration)
    rows = measure(model, chosen, batches, forward_of(model), key="k")["rows"]
    # The group of the last block's down projection, by hand: calibrate all, put back all others' float weights.
    quantized, base, name = tiny_llama(), tiny_llama(), "model.layers.1.mlp.down_proj"
    insert(quantized, chosen.uniform(3))

    @torch.no_grad()
    def run():
        for batch in batches:
            with token_mask(batch["attention_mask"]):
                forward_of(quantized)(batch)

    calibration(quantized, run, None)
    layer = layers(quantized)[name]
    weight = fake_quantize(layer.weight.detach(), layer.weight_quantizer.scale.detach(), layer.scheme.weight)
    alone = tiny_llama()
    alone.get_submodule(name).weight.data = weight
    kl, rise, tokens = 0.0, 0.0, 0
    with torch.no_grad():
        for batch in (batches[0], {k: v[:2] for k, v in batches[1].items()}):  # 6 windows
            known = batch["labels"] != -100
            p, q = (F.log_softmax(forward_of(m)(batch)[known].double(), -1) for m in (base, alone))
            kl += float(F.kl_div(q, p, reduction="sum", log_target=True))
            rise += float(F.nll_loss(q, batch["labels"][known], reduction="sum"))
            rise -= float(F.nll_loss(p, batch["labels"][known], reduction="sum"))
            tokens += int(known.sum())
    (row,) = [r for r in rows if r["name"] == name and r["bits"] == 3]
    # The logits are float32: a tenth of their last bit is 1e-4 of a rise of 1e-4 nats.
    assert row["kl"] == pytest.approx(kl / tokens, rel=1e-4)
    assert row["loss"] == pytest.approx(rise / tokens, rel=1e-3, abs=1e-7)
    original = base.get_submodule(name).weight
    trace = fisher_traces({name: original}, sensitivity._first(batches, 6), forward_of(base))[name]
    error = float((weight - original.detach()).square().sum())
    assert row["fisher"] == pytest.approx(0.5 * trace / weight.numel() * error, rel=1e-4)


def test_a_layer_at_8_bits_costs_next_to_nothing_and_at_3_bits_hundreds_of_times_more(batches, tiny_llama):
    model = tiny_llama()
    rows = measure(model, search(), batches, forward_of(model))["rows"]
    kl = {(r["name"], r["bits"]): r["kl"] for r in rows}
    assert len(kl) == 16
    for name in {r["name"] for r in rows}:
        # 5 bits more divide an error by 2^5 and its square by 2^10.
        assert 0 <= kl[name, 8] < kl[name, 3] / 2**8


def test_measuring_changes_no_bit_of_the_model(batches, tiny_llama):
    model = tiny_llama()
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    before, needed = state(model), [p.requires_grad for p in model.parameters()]
    measure(model, search(), batches, forward_of(model))
    after = state(model)
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    assert needed == [p.requires_grad for p in model.parameters()] and not layers(model)
    assert all(p.grad is None for p in model.parameters())


def test_a_killed_measurement_goes_on_and_ends_alike(batches, tiny_llama, tmp_path, monkeypatch):
    model, path = tiny_llama(), tmp_path / "sensitivity.json"
    whole = measure(model, search(), batches, forward_of(model), tmp_path / "whole" / "sensitivity.json", "k")
    costs = sensitivity._Inserted.costs

    def killed(self, *args):
        if self.bits == 8:
            raise KeyboardInterrupt
        return costs(self, *args)

    monkeypatch.setattr(sensitivity._Inserted, "costs", killed)
    with pytest.raises(KeyboardInterrupt):
        measure(model, search(), batches, forward_of(model), path, "k")
    assert {row["bits"] for row in json.loads(path.read_text())["rows"]} == {3}
    widths = []
    monkeypatch.setattr(
        sensitivity._Inserted, "costs", lambda self, *args: (widths.append(self.bits), costs(self, *args))[1]
    )
    resumed = measure(model, search(), batches, forward_of(model), path, "k")
    assert widths == [8]
    assert [(r["name"], r["bits"]) for r in resumed["rows"]] == [(r["name"], r["bits"]) for r in whole["rows"]]
    for ours, theirs in zip(resumed["rows"], whole["rows"], strict=True):
        assert ours["kl"] == pytest.approx(theirs["kl"], rel=1e-5)
    measure(model, search(), batches, forward_of(model), path, "another key")
    assert widths == [8, 3, 8]


def test_the_trace_of_a_softmax_layer_is_the_one_in_closed_form():
    torch.manual_seed(0)
    layer = nn.Linear(6, 5, bias=False)
    inputs = torch.randn(400, 8, 6)
    labels = torch.zeros(400, 8, dtype=torch.int64)
    labels[:, -1] = -100  # positions that must not count
    batches = [{"x": x[None], "labels": y[None]} for x, y in zip(inputs, labels, strict=True)]
    found = fisher_traces({"w": layer.weight}, batches, lambda batch: layer(batch["x"]))["w"]
    with torch.no_grad():
        x = inputs[:, :-1].flatten(0, 1)
        p = layer(x).softmax(-1)
        # grad of -log p(y) is (p - e_y) x^T; E_y ||p - e_y||^2 = 1 - ||p||^2.
        exact = (x.square().sum(1) * (1 - p.square().sum(1))).mean()
    # 400 independent estimates whose spread is about their mean: 5 % is one standard error.
    assert found == pytest.approx(float(exact), rel=0.15)
    assert math.isclose(found, fisher_traces({"w": layer.weight}, batches, lambda b: layer(b["x"]))["w"])


def test_a_map_of_one_width_is_the_uniform_one(tiny_llama):
    chosen, model = search(), tiny_llama()
    widths = {name: 3 for group in chosen.groups(model) for name in group.layers}
    ours, uniform = chosen.mixed(widths), chosen.uniform(3)
    assert isinstance(ours, SchemeMap)
    for name, _ in model.named_modules():
        if isinstance(model.get_submodule(name), nn.Linear):
            assert ours.scheme_of(name) == uniform.scheme_of(name)


INT8 = QuantSpec(bits=8, granularity="token", dynamic=True, absmax_rule="qmax")


@pytest.mark.parametrize("inputs", [None, INT8], ids=["a16", "a8"])
def test_a_mixed_map_is_exported_as_it_was_measured(inputs, batches, tiny_llama, tmp_path):
    model, chosen = tiny_llama(), search(widths=(2, 3, 8), input=inputs, calibration=RangeCalibration("mse"))
    groups = chosen.groups(model)
    costs: dict = {group.name: {} for group in groups}
    for row in measure(model, chosen, batches, forward_of(model))["rows"]:
        costs[row["name"]][row["bits"]] = row["kl"]
    widths = assign(costs, {group.name: group.bytes for group in groups}, chosen.budget(groups))
    assert len(set(widths.values())) > 1
    insert(model, chosen.mixed({name: widths[group.name] for group in groups for name in group.layers}))
    GPTQ()(model, lambda: [forward_of(model)(batch) for batch in batches] and None)
    set_stage(model, Stage.FROZEN)
    with record(model) as recorded, torch.no_grad():
        logits = forward_of(model)(batches[0])
    artifact = export(model, recorded, tmp_path / "m")
    assert artifact.packed_bytes == sum(group.bytes[widths[group.name]] for group in groups)
    assert artifact.packed_bytes <= chosen.budget(groups)
    packed, _ = load_packed(tmp_path / "m")
    with torch.no_grad():
        assert torch.equal(forward_of(packed)(batches[0]), logits)


def test_an_expert_that_no_token_of_a_batch_chose_counts_as_zero_there():
    torch.manual_seed(0)
    first, second = nn.Linear(6, 5), nn.Linear(6, 5)
    batches = [{"x": torch.randn(1, 4, 6), "labels": torch.zeros(1, 4, dtype=torch.int64)} for _ in range(2)]
    chosen = [first, second, first, second]

    def routed(batch):
        return chosen.pop(0)(batch["x"])

    both = fisher_traces({"first": first.weight, "second": second.weight}, batches, routed)
    assert both["first"] > 0 and both["second"] > 0


def test_widths_are_searched_beside_asymmetric_activations_too(batches, tiny_llama):
    model = tiny_llama()
    chosen = search(
        calibration=RangeCalibration("absmax"), input=QuantSpec(bits=8, granularity="tensor", symmetric=False)
    )
    rows = measure(model, chosen, batches, forward_of(model), key="k")["rows"]
    kl = {bits: sum(row["kl"] for row in rows if row["bits"] == bits) for bits in chosen.widths}
    assert 0 < kl[8] < kl[3]
