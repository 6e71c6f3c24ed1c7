from itertools import islice

import pytest
import torch

from qat.data.documents import SPLITS, Document
from qat.data.language import LanguageData
from qat.data.windows import IGNORE
from qat.tasks.causal_lm import CausalLM
from qat.tasks.models import load, train_tokenizer


def named(split: str, count: int, content="def f(x):\n    return x + 1\n" * 8) -> list[Document]:
    """Documents whose names fall into `split`."""
    candidates = (Document(f"{split}{i}.py", f"# {split}{i}\n{content}") for i in range(10_000))
    return list(islice((d for d in candidates if d.split == split), count))


CORPUS = [d for split in SPLITS for d in named(split, 5)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(CORPUS, 300)


@pytest.fixture
def data(tokenizer):
    def make(source=CORPUS, **fields):
        made = LanguageData(source, "test", **{"seq_len": 16, "batch_size": 2, **fields})
        made.tokenizer = tokenizer
        return made

    return make


def decoded(tokenizer, cut):
    return [tokenizer.decode(row[mask]) for row, mask in zip(cut.input_ids, cut.attention_mask, strict=True)]


def test_no_split_holds_text_of_another(data, tokenizer):
    language = data()
    language.setup()
    for split in SPLITS:
        found = " ".join(decoded(tokenizer, language.split(split)))
        assert f"# {split}" in found
        assert not any(f"# {other}" in found for other in SPLITS if other != split)


def test_held_out_windows_know_their_document(data, tokenizer):
    language = data(seq_len=32, windows_per_document=2)
    cut = language.split("test")
    documents = [d for d in CORPUS if d.split == "test"]
    assert cut.document.tolist() == [i for i in range(5) for _ in range(2)]
    for content, index in zip(decoded(tokenizer, cut), cut.document.tolist(), strict=True):
        assert content.removeprefix("<|endoftext|>") in documents[index].text


def test_a_document_starts_with_the_beginning_token(data, tokenizer):
    for split in ("validation", "test"):
        cut = data().split(split)
        first = [i for i, d in enumerate(cut.document.tolist()) if i == 0 or cut.document[i - 1] != d]
        assert {cut.input_ids[i, 0].item() for i in first} == {tokenizer.bos_token_id}


def test_training_windows_are_one_stream(data):
    cut = data().split("train")
    assert cut.attention_mask.all()
    assert (cut.labels != IGNORE).all()
    assert torch.equal(cut.input_ids.flatten()[1:], cut.labels.flatten()[:-1])


def test_calibration_has_as_many_windows_as_were_asked_for_the_first_of_each_document_before_the_second(data):
    """However few of a document validation and test may have: no figure is an average over calibration documents."""
    every = data(calibration_windows=1000, windows_per_document=1).split("calibration")
    length = every.document.bincount()
    assert len(length) == 5 and length.min() > 2
    for most in (3, 7):
        cut = data(calibration_windows=most, windows_per_document=1).split("calibration")
        assert cut.document.tolist() == [0, 1, 2, 3, 4, 0, 1][:most]
        assert torch.equal(cut.input_ids, every.input_ids[:most])
    assert length[every.document[-1]] == length.max()  # only the longest have windows left at the end


def test_held_out_loaders_serve_their_split_in_order(data):
    language = data()
    for split, loader in {
        "validation": language.val_dataloader(),
        "test": language.test_dataloader(),
        "calibration": language.calibration_dataloader(),
    }.items():
        served = torch.cat([batch["input_ids"] for batch in loader])
        assert torch.equal(served, language.split(split).input_ids)


def test_documents_are_read_once_and_setup_may_be_called_twice(data):
    reads = []

    def source():
        reads.append(1)
        return CORPUS

    language = data(source)
    language.setup("fit")
    first = language.split("train")
    language.setup("test")
    assert language.split("train") is first
    assert reads == [1]


def test_training_batches_are_endless_and_reproducible(data):
    a = [b["input_ids"] for b in islice(data().train_dataloader(), 60)]
    b = [b["input_ids"] for b in islice(data().train_dataloader(), 60)]
    assert len(a) == 60 > len(data().split("train")) // 2
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_extra_documents_are_for_training_only_and_have_their_share(data, tokenizer):
    extra = [Document("extra", "ZZZZ " * 2000)]
    language = data(extra=lambda: extra, extra_share=0.5)
    language.setup()
    batches = list(islice(language.train_dataloader(), 200))
    share = sum("ZZ" in tokenizer.decode(row) for b in batches for row in b["input_ids"]) / 400
    # Binomial, n = 400: four standard deviations.
    assert share == pytest.approx(0.5, abs=0.1)
    for split in ("validation", "test", "calibration"):
        assert "ZZ" not in " ".join(decoded(tokenizer, language.split(split)))


def test_extra_documents_too_short_for_a_window_are_refused(data):
    language = data(extra=lambda: [Document("x", "a")], extra_share=0.5)
    with pytest.raises(ValueError, match=r"data test: data\.extra has no window of 16 tokens"):
        language.train_dataloader()


@pytest.mark.parametrize(
    "fields",
    [
        {"seq_len": 8},
        {"batch_size": 3},
        {"seed": 1},
        {"source": CORPUS[:-1]},
        {"extra": lambda: [Document("x", "abc " * 200)], "extra_share": 0.5},
        {"extra": lambda: [Document("x", "abd " * 200)], "extra_share": 0.5},
        {"extra": lambda: [Document("x", "abc " * 200)], "extra_share": 0.4},
    ],
    ids=["length", "batch", "seed", "corpus", "extra", "other extra", "share"],
)
def test_the_digest_changes_with_whatever_changes_the_batches(data, fields):
    seen = {data().digest, data(extra=lambda: [Document("x", "abe " * 200)], extra_share=0.5).digest}
    changed = data(**fields).digest
    assert changed not in seen
    assert changed == data(**fields).digest


def test_the_digest_changes_with_the_tokenizer(data):
    language = data()
    before = language.digest
    other = data()
    other.tokenizer = train_tokenizer(CORPUS, 280)
    assert other.digest != before


def test_the_digest_does_not_depend_on_the_size_of_what_is_held_out(data):
    assert data(calibration_windows=1, windows_per_document=1).digest == data().digest


def test_a_missing_tokenizer_is_named():
    with pytest.raises(ValueError, match=r"data test has no tokenizer: set `data.tokenizer` before use"):
        LanguageData(CORPUS, "test").setup()


@pytest.mark.parametrize(
    ("source", "fields", "split", "documents"),
    [
        ([], {}, "train", "0 of 0"),
        ([d for d in CORPUS if d.split != "train"], {}, "train", "0 of 15"),
        ([d for d in CORPUS if d.split != "calibration"], {}, "calibration", "0 of 15"),
        ([d for d in CORPUS if d.split != "test"], {}, "test", "0 of 15"),
        (CORPUS, {"seq_len": 10_000}, "train", "5 of 20"),
        (CORPUS, {"calibration_windows": 0}, "calibration", "5 of 20"),
    ],
    ids=["empty", "no training", "no calibration", "no test", "too short", "no calibration window"],
)
def test_a_split_without_a_usable_token_says_what_to_do(data, source, fields, split, documents):
    with pytest.raises(
        ValueError, match=rf"the {split} split of data test has no usable token \({documents} documents"
    ):
        data(source, **fields).setup()


def test_a_tokenizer_without_special_tokens_works(data):
    language = data()
    language.tokenizer = train_tokenizer(CORPUS, 300)
    language.tokenizer.bos_token = language.tokenizer.eos_token = language.tokenizer.pad_token = None
    language.setup()
    assert (language.split("test").labels != IGNORE).any()


def test_text_that_contains_special_tokens_stays_one_document(data):
    source = [*CORPUS, *named("test", 6, "a <|endoftext|> b <|pad|> c " * 4)[5:]]
    cut = data(source, windows_per_document=100).split("test")
    assert cut.document.max() == 5


def test_a_real_model_has_its_documented_loss(stories_directory, shared_data):
    """README of the data: BOS, cut at 512 tokens, first 150 stories: 54,453 tokens, 1.305 nats (three decimals)."""
    from qat.data.windows import from_documents
    from qat.evaluation import evaluate

    stories = shared_data / "tinystories" / "train.txt"
    if not stories.is_file():
        pytest.skip(f"{stories} is absent: set QAT_SHARED_DATA to a folder that has tinystories/train.txt")
    model, tokenizer = load(str(stories_directory))
    with stories.open(encoding="utf-8") as file:
        texts = [t.strip() for t in file.read(400_000).split("<|endoftext|>") if t.strip()][:150]
    ids = [[tokenizer.bos_token_id, *tokenizer(t, add_special_tokens=False)["input_ids"]][:512] for t in texts]
    cut = from_documents(ids, 512, 0, None)
    batches = torch.utils.data.DataLoader(cut, batch_size=10)
    losses = evaluate(CausalLM(model, lr=1e-3), batches)
    assert len(losses.tokens) == 150
    assert losses.tokens.sum() == 54_453
    assert losses.loss == pytest.approx(1.305, abs=0.0005)
    assert losses.perplexity == pytest.approx(3.69, abs=0.005)


def test_one_token_stands_between_two_documents_where_a_tokenizer_has_no_start_token(data):
    language = data()
    language.tokenizer = train_tokenizer(CORPUS, 300)
    language.tokenizer.bos_token = None  # as Qwen2.5's
    eos = language.tokenizer.eos_token_id
    tokens = [i for document in language._tokenize(CORPUS) for i in document]
    assert tokens[0] == eos and tokens.count(eos) == len(CORPUS)
