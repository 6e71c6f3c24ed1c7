import copy

import pytest
import torch
from torch import nn

import qat.insertion as insertion
import qat.structure as structure
from qat.estimators import LSQ, PACT, STE
from qat.fake_quantizer import Stage
from qat.nn import FakeQuantLinear
from qat.scheme import QuantScheme, QuantSpec, SchemeMap

CHANNEL = QuantScheme(weight=QuantSpec(bits=4, granularity="channel"))
GROUP = QuantScheme(weight=QuantSpec(bits=4, granularity="group", group_size=16))
STATIC = QuantScheme(weight=QuantSpec(bits=8, granularity="channel"), input=QuantSpec(bits=8, granularity="tensor"))


class Subclass(nn.Linear):
    pass


class Net(nn.Module):
    def __init__(self, bias: bool = True):
        super().__init__()
        self.conv = nn.Conv1d(2, 2, 1)
        self.first = nn.Linear(32, 24, bias=bias)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(24, 24), nn.ReLU()), nn.Linear(24, 8)])
        self.special = Subclass(8, 8)

    def forward(self, x):
        return self.special(self.blocks[1](self.blocks[0](self.first(x))))


def rules(scheme=CHANNEL, **others) -> SchemeMap:
    return SchemeMap(name="test", rules={**others, "*": scheme})


def snapshot(model):
    return {
        name: (type(m), set(m.__dict__), set(m._modules), {k: id(p) for k, p in m._parameters.items()})
        for name, m in model.named_modules()
    }


def test_plain_linear_layers_are_quantized_and_nothing_else():
    model = Net()
    inserted = insertion.insert(model, rules())
    assert list(inserted) == ["first", "blocks.0.0", "blocks.1"]
    assert type(model.conv) is nn.Conv1d
    assert type(model.special) is Subclass
    assert inserted == insertion.layers(model)


def test_each_layer_gets_the_scheme_of_its_rule_and_the_estimator():
    model, estimator = Net(), STE()
    schemes = SchemeMap(name="test", rules={"first": None, "blocks.0.*": STATIC, "*": CHANNEL})
    insertion.insert(model, schemes, estimator)
    assert type(model.first) is nn.Linear
    assert model.blocks[0][0].scheme == STATIC
    assert model.blocks[1].scheme == CHANNEL
    assert all(q.estimator is estimator for q in insertion.quantizers(model))
    assert len(insertion.quantizers(model)) == 3


def test_activations_may_have_an_estimator_of_their_own():
    model = Net()
    insertion.insert(model, rules(STATIC), STE(), PACT())
    kinds = {(type(m.weight_quantizer.estimator), type(m.input_quantizer.estimator)) for m in
             insertion.layers(model).values()}  # fmt: skip
    assert kinds == {(STE, PACT)}


@pytest.mark.parametrize(
    ("schemes", "estimators", "message"),
    [
        (rules(), (PACT(), None), "first: PACT learns where to clip static activations"),
        (rules(), (LSQ(), PACT()), "first: its input stays in float"),
    ],
    ids=["weights", "no activations"],
)
def test_an_estimator_that_cannot_train_a_layer_is_refused_by_name_before_anything_changes(
    schemes, estimators, message
):
    model = Net()
    with pytest.raises(ValueError, match=message):
        insertion.insert(model, schemes, *estimators)
    assert not insertion.layers(model)


def test_lsq_is_the_default_estimator():
    assert all(
        q.estimator == LSQ() for q in map(lambda m: m.weight_quantizer, insertion.insert(Net(), rules()).values())
    )


def test_insertion_changes_no_output_and_no_name():
    model, x = Net(), torch.randn(4, 32)
    before, names = model(x), list(dict(model.named_parameters()))
    insertion.insert(model, rules(STATIC))
    assert torch.equal(model(x), before)
    assert [n for n, _ in model.named_parameters() if "quantizer" not in n] == names
    float_state = Net().state_dict()
    assert set(float_state) < set(model.state_dict())


def test_references_parameters_and_hooks_survive():
    model, seen = Net(), []
    first, weight = model.first, model.first.weight
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model.first.register_forward_hook(lambda *_: seen.append("forward"))
    model.first.register_full_backward_hook(lambda *_: seen.append("backward"))
    for layer in insertion.insert(model, rules()).values():
        layer.weight_quantizer.set_scale(torch.full_like(layer.weight_quantizer.scale, 0.02))
    insertion.set_stage(model, Stage.TRAIN)
    assert model.first is first
    assert isinstance(first, nn.Linear) and isinstance(first, FakeQuantLinear)
    assert model.first.weight is weight
    before = weight.detach().clone()
    model(torch.randn(4, 32, requires_grad=True)).sum().backward()
    optimizer.step()
    assert seen == ["forward", "backward"]
    assert not torch.equal(weight, before)


def test_all_layers_that_do_not_fit_are_named_and_none_is_changed():
    model = Net()
    before = snapshot(model)
    with pytest.raises(ValueError, match="scheme test does not fit the model") as error:
        insertion.insert(model, rules(GROUP))
    message = str(error.value)
    assert "blocks.0.0: group_size 16 does not divide 24 inputs; use granularity=channel" in message
    assert "blocks.1: group_size 16 does not divide 24 inputs" in message
    assert "first" not in message
    assert snapshot(model) == before


def test_planning_changes_nothing():
    model = Net()
    before = snapshot(model)
    assert insertion.plan(model, rules(first=None)) == {"blocks.0.0": CHANNEL, "blocks.1": CHANNEL}
    assert snapshot(model) == before


@pytest.mark.parametrize("scheme", [CHANNEL, STATIC], ids=str)
def test_removing_restores_the_linear_layer_exactly(scheme):
    model, x = Net(), torch.randn(4, 32)
    before, output = snapshot(model), model(x)
    insertion.insert(model, rules(scheme))
    insertion.set_stage(model, Stage.TRAIN)
    insertion.remove(model)
    assert snapshot(model) == before
    assert torch.equal(model(x), output)
    assert list(model.state_dict()) == list(Net().state_dict())


def test_what_was_removed_can_be_inserted_again():
    model = Net()
    insertion.insert(model, rules(STATIC))
    insertion.remove(model)
    assert insertion.layers(model) == {}
    insertion.insert(model, rules(CHANNEL))
    assert all(layer.input_quantizer is None for layer in insertion.layers(model).values())


def test_removal_keeps_the_trained_weights():
    model = Net()
    insertion.insert(model, rules())
    with torch.no_grad():
        model.first.weight.fill_(0.3)
    insertion.remove(model)
    assert torch.equal(model.first.weight, torch.full((24, 32), 0.3))


def test_a_second_insertion_is_refused_rather_than_nested():
    model = Net()
    insertion.insert(model, rules())
    with pytest.raises(ValueError, match="quantizes no layer"):
        insertion.insert(model, rules())


def test_a_pattern_that_matches_nothing_is_named_even_if_others_match():
    with pytest.raises(ValueError, match=r"'\*haed' matches no layer: they are called first, blocks.0.0, "):
        insertion.insert(Net(), SchemeMap(name="typo", rules={"*haed": None, "*": CHANNEL}))


def test_a_map_that_quantizes_nothing_lists_layers_and_rules():
    with pytest.raises(ValueError, match=r"of 4 linear layers .*first, blocks.0.0, .* none matches .*'first'") as error:
        insertion.insert(Net(), SchemeMap(name="test", rules={"first": None}))
    assert "scheme test quantizes no layer" in str(error.value)


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(ValueError, match="of 0 linear layers none matches"):
        insertion.insert(nn.Sequential(nn.Conv1d(1, 1, 1)), rules())


def test_insertion_works_on_the_meta_device_and_loads_later():
    with torch.device("meta"):
        model = Net()
    insertion.insert(model, rules(STATIC))
    assert {p.device.type for p in model.parameters()} == {"meta"}
    real = Net()
    insertion.insert(real, rules(STATIC))
    for quantizer in insertion.quantizers(real):
        quantizer.set_scale(torch.full_like(quantizer.scale, 0.05))
    insertion.set_stage(real, Stage.FROZEN)
    model.to_empty(device="cpu")
    model.load_state_dict(real.state_dict())
    assert {q.current_stage for q in insertion.quantizers(model)} == {Stage.FROZEN}
    x = torch.randn(4, 32)
    assert torch.equal(model(x), real(x))


def test_stages_move_together():
    model = Net()
    insertion.insert(model, rules(STATIC))
    insertion.set_stage(model, Stage.FROZEN)
    assert [int(q.stage) for q in insertion.quantizers(model)] == [Stage.FROZEN] * 6


def test_tied_linear_layers_are_refused_by_both_names():
    model = Net()
    model.blocks[0][0].weight = nn.Parameter(torch.randn(8, 24))
    model.blocks[1].weight = model.blocks[0][0].weight
    with pytest.raises(ValueError, match=r"blocks.0.0: its weight is tied to blocks.1, which would be quantized"):
        insertion.insert(model, rules())
    insertion.insert(model, rules(**{"blocks.*": None}))
    assert list(insertion.layers(model)) == ["first"]


def test_a_tied_output_layer_is_refused_with_its_remedy_and_can_be_untied(tiny_llama, tmp_path):
    model = tiny_llama(tie=True)
    message = r"lm_head: its weight is tied to model.embed_tokens.*leave it in float.*or untie it first with qat.untie"
    with pytest.raises(ValueError, match=message):
        insertion.insert(model, rules())
    assert insertion.layers(model) == {}
    ids = torch.arange(12)[None]
    before = model(ids).logits
    embedding = model.model.embed_tokens.weight
    structure.untie(model)
    assert model.model.embed_tokens.weight is embedding
    assert model.lm_head.weight is not embedding
    assert torch.equal(model(ids).logits, before)
    assert "lm_head" in insertion.insert(model, rules())
    insertion.remove(model)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    model.save_pretrained(tmp_path)
    assert torch.equal(type(model).from_pretrained(tmp_path).lm_head.weight, model.lm_head.weight)


def test_untying_what_is_not_tied_changes_nothing(tiny_llama):
    model = tiny_llama(tie=False)
    weight = model.lm_head.weight
    structure.untie(model)
    assert model.lm_head.weight is weight


def test_a_tied_output_layer_left_in_float_stays_tied(tiny_llama):
    model = tiny_llama(tie=True)
    insertion.insert(model, SchemeMap(name="test", rules={"*lm_head": None, "*": CHANNEL}))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_deep_copied_model_is_quantized_too():
    model = Net()
    insertion.insert(model, rules())
    other = copy.deepcopy(model)
    insertion.remove(model)
    assert list(insertion.layers(other)) == ["first", "blocks.0.0", "blocks.1"]


def test_torchs_encoder_reads_no_weight_past_its_quantized_layers():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)
    model, x = nn.TransformerEncoder(layer, 2).eval(), torch.randn(2, 8, 32)
    padding = torch.arange(8).expand(2, 8) >= torch.tensor([[8], [5]])
    with torch.no_grad():
        before = model(x), model(x, src_key_padding_mask=padding)
    insertion.insert(
        model, SchemeMap(name="w2", rules={"*": QuantScheme(weight=QuantSpec(bits=2, granularity="channel"))})
    )
    for quantized in insertion.layers(model).values():
        quantized.weight_quantizer.set_scale(quantized.weight.detach().abs().amax(1, keepdim=True))
    insertion.set_stage(model, Stage.FROZEN)
    with torch.no_grad():  # where torch would take its fast paths
        fast = model(x), model(x, src_key_padding_mask=padding)
    slow = model(x), model(x, src_key_padding_mask=padding)
    for was, now, right in zip(before, fast, slow, strict=True):
        torch.testing.assert_close(now[~padding], right[~padding], rtol=0, atol=1e-5)  # of order 1, sums ordered anew
        assert not torch.allclose(now[~padding], was[~padding], atol=0.1)
