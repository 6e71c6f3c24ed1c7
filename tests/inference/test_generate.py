import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qat.export import export, record
from qat.inference import load_packed, stream


@pytest.fixture
def packed_stories(stories_directory, scheme, quantize_model, tmp_path):
    model = quantize_model(AutoModelForCausalLM.from_pretrained(stories_directory), scheme("w8a16-channel"))
    with record(model) as recorded, torch.no_grad():
        model(torch.arange(24)[None])
    export(model, recorded, tmp_path / "m", tokenizer=AutoTokenizer.from_pretrained(stories_directory))
    return load_packed(tmp_path / "m")


@pytest.fixture
def by_transformers(monkeypatch):
    monkeypatch.setattr("qat.inference.generate.fused_decoder", lambda model: None)


@pytest.mark.parametrize("path", ["decoder", "transformers"])
def test_the_stream_is_what_generate_writes(path, packed_stories, request):
    if path == "transformers":
        request.getfixturevalue("by_transformers")
    model, tokenizer = packed_stories
    prompt = tokenizer("Once upon a time", return_tensors="pt")
    ids = model.generate(**prompt, max_new_tokens=20, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    pieces = list(stream(model, tokenizer, "Once upon a time", max_new_tokens=20))
    assert len(pieces) > 5
    assert "".join(pieces).strip() == tokenizer.decode(ids, skip_special_tokens=True).strip()


def test_sampling_follows_the_seed(packed_stories):
    def sample(seed: int) -> str:
        torch.manual_seed(seed)
        return "".join(stream(*packed_stories, "Once", max_new_tokens=20, temperature=1.0))

    assert sample(0) == sample(0) != sample(1)


def test_an_abandoned_stream_stops(packed_stories, by_transformers):
    model, tokenizer = packed_stories
    steps = []
    model.register_forward_pre_hook(lambda module, args: steps.append(1))
    pieces = stream(model, tokenizer, "Once upon a time", max_new_tokens=400)
    next(pieces)
    pieces.close()  # waits for the thread
    assert len(steps) < 200


def test_a_failure_while_generating_reaches_the_reader(packed_stories, by_transformers):
    model, tokenizer = packed_stories
    model.forward = None
    with pytest.raises(TypeError):
        list(stream(model, tokenizer, "Once"))


def test_chat_without_a_template_is_refused(packed_stories):
    with pytest.raises(ValueError, match="no chat template"):
        list(stream(*packed_stories, "Once", chat=True))
