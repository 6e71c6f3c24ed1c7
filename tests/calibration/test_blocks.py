"""Block by block: nothing is lost to a kill, nothing is computed twice, nothing stays resident."""

import pytest
import torch
from llama_data import inserted, logits, runner
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from qat.attention import key_values
from qat.calibration import GPTQ, RangeCalibration
from qat.calibration.blocks import find_blocks, stream
from qat.fake_quantizer import Stage
from qat.insertion import insert, layers, set_stage
from qat.scheme import QuantSpec, uniform

QUICK = RangeCalibration("quick", weight="absmax")
QUICK_GPTQ = GPTQ(ranges=QUICK, sequential="block")


def states(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Counting(GPTQ):
    """Notes how many blocks it treats, and is killed in the one called `dies`."""

    treated, dies = 0, 99

    def _treat(self, module, run):
        if self.treated == self.dies:
            raise KeyboardInterrupt
        self.treated += 1
        super()._treat(module, run)


def counting(dies: int = 99, **settings) -> Counting:
    method = Counting(sequential="block", **settings)
    object.__setattr__(method, "dies", dies)
    return method


@pytest.fixture(scope="module")
def whole(tiny_llama):
    """The state of a model that was calibrated without a break."""
    model = inserted(tiny_llama())
    counting()(model, runner(model))
    return states(model)


def test_a_killed_calibration_goes_on_to_the_same_bits(tiny_llama, tmp_path, whole, monkeypatch):
    monkeypatch.setattr("qat.calibration.gptq.described", lambda method: "one method")  # `dies` is no setting
    model = inserted(tiny_llama())
    with pytest.raises(KeyboardInterrupt):
        counting(dies=1)(model, runner(model), tmp_path)
    assert len(list(tmp_path.glob("model.layers.0-*.safetensors"))) == len(list(tmp_path.iterdir())) == 1
    again, method = inserted(tiny_llama()), counting()
    method(again, runner(again), tmp_path)
    assert method.treated == 1
    assert same(states(again), whole)


def test_files_serve_equal_weights_inputs_and_settings_only(tiny_llama, tmp_path, whole):
    def treated(change=lambda model: None, **settings):
        model, method = inserted(tiny_llama()), counting(**settings)
        with torch.no_grad():
            change(model)
        method(model, runner(model), tmp_path)
        return vars(method).pop("treated")

    assert treated() == 2
    assert treated(lambda model: model.model.layers[1].mlp.up_proj.weight[0].mul_(2)) == 1  # the second block's
    assert treated(lambda model: model.model.embed_tokens.weight[5:].mul_(2)) == 2  # all inputs
    assert treated(damping=0.02) == 2


def test_a_damaged_file_is_made_again(tiny_llama, tmp_path, whole, caplog):
    for _ in range(2):
        model, method = inserted(tiny_llama()), GPTQ(sequential="block")
        method(model, runner(model), tmp_path)
        assert same(states(model), whole)
        for path in tmp_path.glob("model.layers.1-*"):
            path.write_bytes(path.read_bytes()[:-100])
    assert "is damaged" in caplog.text


def test_offloaded_weights_are_mapped_from_the_files_of_their_blocks(tiny_llama, tmp_path, whole):
    model = inserted(tiny_llama())
    GPTQ(sequential="block", offload=True)(model, runner(model), tmp_path)
    assert same(states(model), whole)
    with pytest.raises(ValueError, match="offload keeps finished blocks in files; give it a folder"):
        GPTQ(offload=True)(model, runner(model))


def test_offloading_writes_into_no_weight_that_it_was_given(tiny_llama, tmp_path):
    """Weights mapped from a checkpoint would keep a private page for each one written to, for as long as any lives."""
    model = inserted(tiny_llama())
    given = {name: p.data for name, p in model.named_parameters() if ".layers." in name and p.dim() == 2}
    before = {name: tensor.clone() for name, tensor in given.items()}
    for _ in range(2):  # calibrated, then restored from the files
        GPTQ(offload=True)(model, runner(model), tmp_path)
        assert all(torch.equal(given[name], before[name]) for name in given)
        assert not any(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
        for name, parameter in model.named_parameters():
            if name in given:
                parameter.data = given[name]


def test_only_the_block_at_hand_computes(tiny_llama):
    model, ran = inserted(tiny_llama()), []
    for index, block in enumerate(model.model.layers):
        block.mlp.register_forward_hook(lambda *_, index=index: ran.append(index))
    stream(model, runner(model), lambda block, run: (run(), QUICK(block, run)), "test")
    # Two batches: once for the calibration, once on to the next block.
    assert ran == [0, 0, 0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize("sequential", [True, False])
def test_a_block_sees_the_quantized_or_the_float_outputs_of_those_before(tiny_llama, sequential):
    model, seen = inserted(tiny_llama()), []

    def treat(block, run):
        if block is model.model.layers[1]:
            hook = block.input_layernorm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
            run()
            hook.remove()
        QUICK(block, run)

    stream(model, runner(model), treat, "test", sequential=sequential)
    set_stage(model, Stage.FROZEN if sequential else Stage.FLOAT)
    expected = []
    model.model.layers[1].input_layernorm.register_forward_pre_hook(lambda _, args: expected.append(args[0]))
    logits(model)
    assert torch.equal(seen[0], expected[0])


def test_dropout_is_off_and_the_training_flag_comes_back(tiny_llama):
    model, flags = inserted(tiny_llama()).train(), []

    def treat(block, run):
        block.mlp.register_forward_pre_hook(lambda module, _: flags.append(module.training))
        run()
        QUICK(block, run)

    stream(model, runner(model), treat, "test")
    assert flags and not any(flags) and model.model.layers[0].mlp.training


def test_a_killed_run_leaves_the_models_forward_alone(tiny_llama):
    model = inserted(tiny_llama())
    before = logits(model)

    def broken():
        runner(model)()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stream(model, broken, QUICK, "test")
    assert torch.equal(logits(model), before)


def test_blocks_that_are_no_chain_are_refused():
    class Parallel(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

        def forward(self, x):
            return self.blocks[0](x) + self.blocks[1](x * 2)

    model = inserted(Parallel(), **{"*": layers_scheme()})
    with pytest.raises(ValueError, match="block 1 is not called with the output of block 0"):
        stream(model, lambda: model(torch.randn(2, 3, 8)), QUICK, "test")


def layers_scheme():
    from qat.scheme import QuantScheme, QuantSpec

    return QuantScheme(weight=QuantSpec(bits=4, granularity="channel"))


def test_a_model_without_blocks_is_treated_whole():
    model = inserted(nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)), layers_scheme())
    assert find_blocks(model) == ("", [])
    GPTQ()(model, lambda: model(torch.randn(32, 8)))
    assert all((layer.weight_quantizer.scale != 1).all() for layer in layers(model).values())


def test_a_block_is_calibrated_anew_where_its_keys_and_values_are_quantized_otherwise(tiny_llama, tmp_path):
    tokens = torch.arange(24)[None]

    def scales(kv_cache, folder):
        model = tiny_llama(torch.float32)
        spec = QuantSpec(bits=4, granularity="group", group_size=32)
        insert(model, uniform(spec, ignore=("*lm_head",), kv_cache=kv_cache))
        GPTQ()(model, lambda: model(tokens, use_cache=False), folder)
        return [kept.key_quantizer.scale.detach().clone() for kept in key_values(model).values()]

    for kv_cache in ("int8", "fp8"):
        kept, alone = scales(kv_cache, tmp_path), scales(kv_cache, None)
        assert all(torch.equal(a, b) for a, b in zip(kept, alone, strict=True))


def test_a_run_that_keeps_keys_and_values_calibrates_as_one_that_does_not(tiny_llama):
    """Blocks are replayed, and a cache would grow with every replay."""
    tokens, found = torch.arange(24)[None], []
    for use_cache in (True, False):
        model = tiny_llama(torch.float32)
        insert(model, uniform(QuantSpec(bits=4, granularity="group", group_size=32), ignore=("*lm_head",)))
        GPTQ()(model, lambda m=model, cached=use_cache: m(tokens, use_cache=cached))
        found.append(model.state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_forward_that_a_block_was_given_is_its_own_again_afterwards(tiny_llama):
    model, calls = inserted(tiny_llama()), []
    block = model.model.layers[0]
    original = block.forward

    def given(*args, **kwargs):  # as one that moves its inputs to the block's device
        calls.append(1)
        return original(*args, **kwargs)

    block.forward = given
    QUICK_GPTQ(model, runner(model))
    assert block.forward is given and calls  # calibration ran it, too
    assert "forward" not in model.model.layers[1].__dict__


def test_a_cache_that_a_block_is_handed_by_position_is_not_replayed_either():
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64, n_positions=32, bos_token_id=0, eos_token_id=0)
    tokens, found = torch.arange(24)[None], []
    for use_cache in (True, False):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config).eval()
        insert(model, uniform(QuantSpec(bits=4, granularity="group", group_size=32), ignore=("*lm_head",)))
        GPTQ()(model, lambda m=model, cached=use_cache: m(tokens, use_cache=cached))
        found.append(model.state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
