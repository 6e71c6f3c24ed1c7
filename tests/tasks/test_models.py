import json
import shutil

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from qat.data.documents import Document
from qat.tasks.models import CHAT_TEMPLATE, SPECIAL_TOKENS, check_finite, load, new_llama, train_tokenizer

DOCUMENTS = [Document(f"{i}.py", f"def f{i}(x):\n    return x + {i}\n" * 5) for i in range(20)]
TOKENIZER = train_tokenizer(DOCUMENTS, 300)
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def llama(**fields):
    return new_llama("test", DOCUMENTS, **{"vocab_size": 300, **SIZES, **fields})


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "saved"
    model, tokenizer = llama()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def change(folder, **tensors):
    """Overwrite tensors of a saved model, or remove them where the value is None."""
    state = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        name = next(n for n in state if n.endswith(name.replace("__", ".")))
        if tensor is None:
            del state[name]
        else:
            state[name] = torch.full_like(state[name], tensor) if isinstance(tensor, float) else tensor
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_model_survives_its_folder(saved):
    model, tokenizer = llama()
    loaded, loaded_tokenizer = load(str(saved))
    for (name, a), (other, b) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(a, b)
    assert loaded_tokenizer.get_vocab() == tokenizer.get_vocab()
    assert loaded_tokenizer.chat_template == CHAT_TEMPLATE
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parameters_have_the_dtype_asked_for(saved, dtype):
    assert {p.dtype for p in load(str(saved), dtype)[0].parameters()} == {getattr(torch, dtype)}


@pytest.mark.parametrize("name", ["./absent", "/absent/model", "../absent", "~/absent"])
def test_a_missing_folder_is_named_and_never_asked_of_a_hub(name):
    with pytest.raises(ValueError, match=f"model {name}: no such folder"):
        load(name)


def test_a_folder_without_a_config_is_no_model(tmp_path):
    with pytest.raises(ValueError, match=r"has no config.json, so it is not a Hugging Face model folder"):
        load(str(tmp_path))


@pytest.mark.parametrize("kept", [0, 4, 100, 5000], ids=lambda n: f"{n} bytes")
def test_a_truncated_file_is_refused(folder, kept):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"cannot be loaded \(is the folder complete\?\): "):
        load(str(folder))


def test_bytes_that_are_no_tensors_are_refused(folder):
    (folder / "model.safetensors").write_bytes(b"\xff" * 1000)
    with pytest.raises(ValueError, match=r"cannot be loaded \(is the folder complete\?\): "):
        load(str(folder))


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json"])
def test_a_missing_file_is_refused(folder, file):
    (folder / file).unlink()
    with pytest.raises(ValueError, match=r"cannot be loaded \(is the folder complete\?\)"):
        load(str(folder))


def test_a_broken_config_is_refused(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be loaded"):
        load(str(folder))


def test_a_tensor_of_another_shape_is_refused(folder):
    change(folder, up_proj__weight=torch.zeros(3, 3))
    with pytest.raises(ValueError, match="cannot be loaded"):
        load(str(folder))


def test_an_absent_tensor_is_refused_and_not_made_up(folder):
    change(folder, up_proj__weight=None)
    with pytest.raises(
        ValueError, match=r"its checkpoint lacks 1 parameters, such as model.layers.0.mlp.up_proj.weight"
    ):
        load(str(folder))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_parameter_that_is_not_finite_is_named(folder, bad):
    change(folder, input_layernorm__weight=bad)
    with pytest.raises(
        ValueError, match=r"model.layers.0.input_layernorm.weight holds 16 NaN or infinite values of 16"
    ):
        load(str(folder))


def test_one_bad_value_is_counted():
    model = torch.nn.Linear(3, 2)
    check_finite(model)
    with torch.no_grad():
        model.bias[1] = torch.nan
    with pytest.raises(ValueError, match="parameter bias holds 1 NaN or infinite values of 2"):
        check_finite(model)


def test_an_unknown_dtype_is_refused(saved):
    with pytest.raises(ValueError, match="float31"):
        load(str(saved), "float31")


def test_a_new_model_is_a_function_of_its_seed():
    (a, tokenizer), (b, again), (c, _) = llama(), llama(), llama(seed=1)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert any(not torch.equal(x, y) for x, y in zip(a.parameters(), c.parameters(), strict=True))
    assert tokenizer.get_vocab() == again.get_vocab()


def test_a_new_model_has_the_dimensions_asked_for():
    model, tokenizer = llama(hidden_size=8)
    assert model.model.embed_tokens.weight.shape == (300, 8)
    assert (model.config.bos_token_id, model.config.pad_token_id) == (tokenizer.bos_token_id, tokenizer.pad_token_id)


def test_a_tokenizer_learns_from_the_training_split_only():
    held_out = next(d for d in (Document(f"h{i}", "QJXQJX " * 500) for i in range(100)) if d.split == "test")
    _, tokenizer = new_llama("test", lambda: [*DOCUMENTS, held_out], vocab_size=300, **SIZES)
    assert len(tokenizer("QJXQJX")["input_ids"]) == 6


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@settings(deadline=None, max_examples=60)
@given(TEXT)
@example("hello , world . do n't  x 's 'm ?")
@example("\r\n\t\x00\ufeff\u2028 <|end|><|end|> é e\u0301 漢字 🇩🇪")
@example("  leading and trailing  ")
def test_any_text_survives_the_tokenizer(content):
    ids = TOKENIZER(content)["input_ids"]
    assert TOKENIZER.decode(ids) == content
    assert all(0 <= i < 300 for i in ids)


def test_roles_are_single_tokens():
    for token in SPECIAL_TOKENS:
        assert len(TOKENIZER(token)["input_ids"]) == 1
    ids = TOKENIZER.apply_chat_template(
        [{"role": "user", "content": "x"}], add_generation_prompt=True, tokenize=True, return_dict=True
    )["input_ids"]
    assert TOKENIZER.decode(ids) == "<|user|>x<|end|><|assistant|>"


def test_the_saved_config_says_what_it_is(saved):
    assert json.loads((saved / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
