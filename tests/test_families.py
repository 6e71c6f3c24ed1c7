"""One path for every family of models: insert, calibrate, train, export, verify, load again."""

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from qat.calibration import AWQ, CALIBRATIONS, Rotation, SmoothQuant
from qat.cli import _layers
from qat.export import export, record
from qat.fake_quantizer import Stage, token_mask
from qat.functional import dequantize
from qat.inference import load_packed
from qat.insertion import insert, layers, plan, prepare, set_stage
from qat.packing import unpack
from qat.scheme import QuantSpec, SchemeMap, uniform
from qat.structure import unfuse_experts

USUAL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts_per_tok": 2, "num_experts": 4, "moe_intermediate_size": 32}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 96, "n_positions": 64} | dict.fromkeys(
    ("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0
)
FAMILIES = {
    "Llama": USUAL,
    "Mistral": USUAL,
    "Qwen2": USUAL,
    "Qwen3": USUAL | {"head_dim": 16},
    "Gemma": USUAL | {"head_dim": 16},
    "Gemma2": USUAL | {"head_dim": 16},
    "GPT2": GPT2,
    "Mixtral": USUAL | {"num_local_experts": 4},
    "Qwen2Moe": USUAL | EXPERTS | {"shared_expert_intermediate_size": 32},
    "Qwen3Moe": USUAL | EXPERTS | {"head_dim": 16},
}
MOE = ["Mixtral", "Qwen2Moe", "Qwen3Moe"]
W4 = uniform(QuantSpec(bits=4, granularity="group", group_size=32), ignore=["*lm_head"])
TOKENS = torch.randint(1, 96, (4, 32), generator=torch.Generator().manual_seed(1))


def family(name: str, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    config = getattr(transformers, f"{name}Config")(**FAMILIES[name], initializer_range=0.1)
    return AutoModelForCausalLM.from_config(config).eval()


def calibrated(name: str, calibration: str, schemes: SchemeMap = W4) -> torch.nn.Module:
    model = family(name)
    prepare(model, schemes)
    insert(model, schemes)

    @torch.no_grad()
    def run() -> None:
        model(TOKENS, use_cache=False)

    CALIBRATIONS[calibration](model, run)
    set_stage(model, Stage.TRAIN)
    return model


def trained(model: torch.nn.Module) -> torch.nn.Module:
    """Two steps, since scales have no gradient while GPTQ's weights are on the grid; then all have one."""
    optimizer = torch.optim.SGD(model.train().parameters(), 0.05)
    for _ in range(2):
        optimizer.zero_grad()
        model(TOKENS, labels=TOKENS, use_cache=False).loss.backward()
        optimizer.step()
    for layer_name, layer in layers(model).items():
        for gradient in (layer.weight.grad, layer.weight_quantizer.scale.grad):
            assert gradient is not None and torch.isfinite(gradient).all() and gradient.abs().sum() > 0, layer_name
    return model


@torch.no_grad()
def exported(model: torch.nn.Module, directory):
    with record(model) as recorded:
        logits = model.train()(TOKENS, use_cache=False).logits
    export(model, recorded, directory)
    return recorded, logits


def stored(model: torch.nn.Module, name: str) -> torch.Tensor:
    """The weight of a layer in a model that transformers loaded; an expert's is part of a fused parameter."""
    if ".experts." not in name:
        return model.get_submodule(name).weight
    before, _, (index, part) = *name.rpartition(".experts.")[:2], name.rpartition(".experts.")[2].split(".")
    fused = model.get_submodule(f"{before}.experts")
    if part in ("w2", "down_proj"):
        return fused.down_proj[int(index)]
    return fused.gate_up_proj[int(index)].chunk(2)[part in ("w3", "up_proj")]


@pytest.mark.parametrize("calibration", ["absmax", "gptq"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_goes_the_whole_way_and_every_reader_gets_what_was_trained(name, calibration, tmp_path):
    model = trained(calibrated(name, calibration))
    recorded, logits = exported(model, tmp_path / "m")
    assert len(recorded) == len(layers(model)) > 7
    packed, _ = load_packed(tmp_path / "m")
    for layer, used in recorded.items():
        module = packed.get_submodule(layer)
        assert torch.equal(unpack(module.packed, 4, module.in_features), used.codes), layer
        assert torch.equal(module.scale.float(), used.scale), layer
    with torch.no_grad():
        assert torch.equal(packed.train()(TOKENS, use_cache=False).logits, logits)
    if name == "GPT2":
        with pytest.raises(OSError, match="no file named"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "m")
        return
    # Experts are fused again while loading, which dequantizes in the dtype of the scales.
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if name in MOE else {}
    dtype = torch.bfloat16 if name in MOE else torch.float32
    served = AutoModelForCausalLM.from_pretrained(tmp_path / "m", **options)
    with torch.no_grad():
        served(TOKENS)  # dequantizes
    for layer, used in recorded.items():
        assert torch.equal(stored(served, layer), dequantize(used.codes, used.scale).to(dtype).float()), layer


@pytest.mark.parametrize("name", FAMILIES)
def test_layers_are_inspected_against_the_float_model_in_whatever_form_that_has_them(name, tmp_path):
    model = calibrated(name, "absmax")
    exported(model, tmp_path / "m")
    rows = _layers(load_packed(tmp_path / "m")[0], family(name), tmp_path)
    assert len(rows) == len(layers(model))
    assert all(0.01 < row["error"] < 0.15 for row in rows)  # what rounding to 4 bits costs


@pytest.mark.parametrize("method", [AWQ(), SmoothQuant(), Rotation()], ids=lambda m: m.name)
@pytest.mark.parametrize("name", ["Gemma", "GPT2", *MOE])
def test_a_method_that_moves_factors_refuses_a_block_it_does_not_know(name, method):
    with pytest.raises(ValueError, match=f"calibration {method.name} .*use calibration=gptq or calibration=weighted"):
        method.check(calibrated(name, "absmax"))


@pytest.mark.parametrize("name", MOE)
def test_experts_of_their_own_compute_what_the_fused_ones_do(name):
    model = family(name)
    parameters = sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        before = model(TOKENS).logits
        unfuse_experts(model)
        # The products are the same; the sums over an expert's tokens may be taken in another order.
        torch.testing.assert_close(model(TOKENS).logits, before, rtol=1e-5, atol=1e-5)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_fused_experts_are_refused_with_the_remedy_and_not_left_in_float_silently():
    with pytest.raises(ValueError, match=r"layers.0.mlp.experts: its experts share one parameter.*unfuse_experts"):
        plan(family("Mixtral"), W4)
    kept = SchemeMap(name="test", rules={"*experts*": None, **W4.rules})
    model = family("Mixtral")
    prepare(model, kept)
    assert not any("experts" in name for name in insert(model, kept))


def test_experts_of_another_form_are_refused_by_name():
    torch.manual_seed(0)
    config = transformers.GptOssConfig(**USUAL, num_local_experts=2, num_experts_per_tok=1, head_dim=16)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=r"layers.0.mlp.experts: experts of GptOssExperts are not down.*leave them in"):
        prepare(model, W4)


def test_experts_that_no_token_chose_train_with_zero_gradients():
    model = calibrated("Mixtral", "absmax").train()
    model(TOKENS[:1, :1], use_cache=False).logits.sum().backward()
    sizes = [float(layer.weight.grad.abs().sum()) for name, layer in layers(model).items() if ".experts." in name]
    assert len(sizes) == 2 * 4 * 3
    assert sum(size == 0 for size in sizes) == 2 * 2 * 3  # two of four experts a token


def test_padding_reaches_no_expert_s_range():
    model = family("Qwen3Moe")
    prepare(model, W4)
    static = uniform(
        QuantSpec(bits=8, granularity="channel"), QuantSpec(bits=8, granularity="tensor"), ignore=["*lm_head"]
    )
    insert(model, static)
    mask, scales = torch.arange(32).expand(4, 32) < 20, []
    for junk in (5, 90):
        ids = torch.where(mask, TOKENS, junk)

        @torch.no_grad()
        def run(ids=ids) -> None:
            with token_mask(mask):
                model(ids, attention_mask=mask, use_cache=False)

        CALIBRATIONS["absmax"](model, run)
        scales.append(torch.cat([layer.input_quantizer.scale.detach() for layer in layers(model).values()]))
    assert torch.equal(*scales)


@pytest.mark.parametrize("name", ["Mixtral", "Qwen2Moe", "Qwen3Moe"])
def test_a_rule_may_name_any_layer_of_the_experts(name):
    up, down = ("w3", "w2") if name == "Mixtral" else ("up_proj", "down_proj")
    for pattern, left in ((f"*.experts.*.{up}", {up}), ("*.experts.0.*", None), ("*.experts.*", {up, down})):
        model, schemes = family(name), SchemeMap(name="test", rules={pattern: None, **W4.rules})
        prepare(model, schemes)
        experts = [layer for layer in insert(model, schemes) if ".experts." in layer]
        if left is None:
            assert experts and not any(".experts.0." in layer for layer in experts)
        else:
            assert not left & {layer.rpartition(".")[2] for layer in experts}
            assert bool(experts) == (down not in left)
