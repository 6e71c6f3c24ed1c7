import json
import logging

import pytest

from qat.data.chat import ChatData, conversations
from qat.data.documents import SPLITS, Document
from qat.data.windows import IGNORE
from qat.tasks.models import CHAT_TEMPLATE, train_tokenizer

# Qwen3 and DeepSeek-R1 do this: what the assistant thought is dropped once the user speaks again.
REWRITING = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}"
    "{% if m['role'] == 'assistant' and not loop.last %}{{ m['content'].split('</think>')[-1] }}"
    "{% else %}{{ m['content'] }}{% endif %}{{ '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def turns(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    talk = [{"role": "assistant" if i % 2 else "user", "content": c} for i, c in enumerate(contents)]
    return talk if system is None else [{"role": "system", "content": system}, *talk]


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def make_tokenizer():
    documents = [Document("x", "what is one plus two? three. what about four? five! be brief. ok " * 4)]
    trained = train_tokenizer(documents, 320)

    def make(template=CHAT_TEMPLATE):
        trained.chat_template = template
        return trained

    return make


@pytest.fixture
def chat(tmp_path, make_tokenizer):
    def make(rows=None, template=CHAT_TEMPLATE, **fields):
        rows = [{"messages": turns(f"what is {i}?", f"it is {i}.")} for i in range(200)] if rows is None else rows
        data = ChatData(write(tmp_path / "chat.jsonl", rows), **{"seq_len": 64, **fields})
        data.tokenizer = make_tokenizer(template)
        return data

    return make


def labelled(data, ids, labels) -> str:
    """Labels are the next tokens; what they say."""
    assert all(label in (following, IGNORE) for label, following in zip(labels, ids[1:], strict=False))
    return data.tokenizer.decode([label for label in labels if label != IGNORE])


@pytest.mark.parametrize(
    "messages",
    [
        turns("what is one?", "three."),
        turns("a", "first answer", "b", "second"),
        turns("hi", "ok", system="be brief."),
        turns("hi", "ok", "bye"),
        turns("hi", "ok", "bye")[1:],
        turns("hi", ""),
        turns("漢字?", "é\u2028\n  x  "),
        turns("<|assistant|>fake<|end|>", "real"),
    ],
    ids=["one turn", "two turns", "system", "user last", "assistant first", "empty", "unicode", "roles in text"],
)
def test_the_loss_is_on_the_assistants_words_and_its_end_only(chat, messages):
    data = chat()
    ids, labels = data.encode(messages)
    assert len(ids) == len(labels)
    spoken = "".join(m["content"] + "<|end|>" for m in messages if m["role"] == "assistant")
    assert labelled(data, ids, labels) == spoken


def test_inputs_are_the_templates_text(chat):
    data, messages = chat(), turns("hi", "ok", "and?", "fine")
    ids, labels = data.encode(messages)
    whole = data.tokenizer.apply_chat_template(messages, tokenize=False)
    assert data.tokenizer.decode([*ids, labels[-1]]) == whole


def test_no_label_without_an_assistant(chat):
    assert set(chat().encode(turns("hi"))[1]) == {IGNORE}


def test_a_template_that_rewrites_earlier_turns_is_refused(chat):
    data = chat(template=REWRITING)
    with pytest.raises(ValueError, match=r"data chat: the chat template rewrites earlier turns .*tokens of turn 1"):
        data.encode(turns("a", "hm</think>first", "b", "second"))
    ids, labels = data.encode(turns("a", "hm</think>first"))
    assert labelled(data, ids, labels) == "hm</think>first<|end|>"


def test_a_tokenizer_without_a_template_is_refused(chat):
    with pytest.raises(ValueError, match="data chat: the model's tokenizer has no chat template; use data=text"):
        chat(template=None).setup()


def test_every_window_is_one_conversation_with_its_answer(chat):
    data = chat()
    data.setup()
    for split in SPLITS:
        cut = data.split(split)
        assert len(cut) > 0
        assert cut.document.tolist() == list(range(len(cut)))
        for ids, labels, mask in zip(cut.input_ids, cut.labels, cut.attention_mask, strict=True):
            said = labelled(data, ids[mask].tolist(), labels[mask].tolist())
            assert said.startswith("it is ") and said.endswith(".<|end|>")
            assert (labels[~mask] == IGNORE).all()
            number = said.removeprefix("it is ").removesuffix(".<|end|>")
            assert f"what is {number}?" in data.tokenizer.decode(ids)


def test_prompt_and_response_are_a_conversation(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "p", "response": "r"}, {"messages": turns("p", "r")}])
    (document,) = conversations(path=tmp_path / "a.jsonl")
    assert path.endswith("a.jsonl")
    assert json.loads(document.text) == turns("p", "r"), "both rows say the same, so they are one document"


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"], ids=lambda c: f"U+{ord(c):04X}")
def test_only_line_feeds_end_a_line(tmp_path, separator):
    # JSON lets strings hold these as they are; str.splitlines() would split there.
    row = {"messages": turns(f"a{separator}b", "c")}
    write(tmp_path / "a.jsonl", [row, {"messages": turns("d", "e")}])
    assert [json.loads(d.text)[0]["content"] for d in conversations(tmp_path / "a.jsonl")] == [f"a{separator}b", "d"]


def test_windows_line_ends_and_blank_lines_are_fine(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"prompt": "p", "response": "r"}\r\n\r\n  \n{"prompt": "q", "response": "r"}')
    assert len(conversations(tmp_path / "a.jsonl")) == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "Expecting property name"),
        ("plain text", "Expecting value"),
        ("[1, 2]", "it is a JSON list, not an object"),
        ('"text"', "it is a JSON str, not an object"),
        ("5", "it is a JSON int, not an object"),
        ('{"text": "x"}', r"it has the keys \['text'\], not 'messages', nor 'prompt' and 'response'"),
        ('{"prompt": "x"}', r"it has the keys \['prompt'\]"),
        ('{"messages": []}', "every message needs a role and a text"),
        ('{"messages": null}', "NoneType"),
        ('{"messages": [{"role": "user"}]}', "'content'"),
        ('{"messages": [{"role": "user", "content": null}]}', "every message needs a role and a text"),
        ('{"messages": [{"role": 1, "content": "x"}]}', "every message needs a role and a text"),
        ('{"messages": [{"role": "user", "content": [{"type": "text"}]}]}', "every message needs a role and a text"),
        ('{"prompt": "x", "response": 3}', "every message needs a role and a text"),
    ],
    ids=lambda value: value[:30],
)
def test_a_bad_line_is_named_by_its_number(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text('{"prompt": "p", "response": "r"}\n\n' + line + "\n")
    with pytest.raises(ValueError, match=rf"a.jsonl, line 3 is not a conversation: .*{message}"):
        conversations(tmp_path / "a.jsonl")


@pytest.mark.parametrize("content", ["", "\n \n"], ids=["empty", "blank"])
def test_an_empty_file_is_refused(tmp_path, content):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(ValueError, match=r"a.jsonl holds no conversation"):
        conversations(tmp_path / "a.jsonl")


@pytest.mark.parametrize("path", ["absent.jsonl", "."], ids=["absent", "folder"])
def test_a_missing_file_is_named(tmp_path, path):
    with pytest.raises(ValueError, match=r"data.path=.*: no such file"):
        conversations(tmp_path / path)


def test_a_long_conversation_is_cut_and_keeps_its_beginning(chat):
    data = chat([{"messages": turns(f"q {i}", f"answer {i} " * 50)} for i in range(80)], seq_len=24)
    data.setup()
    cut = data.split("train")
    assert cut.input_ids.shape[1] == 24
    assert cut.attention_mask.all()
    said = [
        labelled(data, ids.tolist(), labels.tolist()) for ids, labels in zip(cut.input_ids, cut.labels, strict=True)
    ]
    assert all(s.startswith("answer ") and "<|end|>" not in s for s in said)


def test_a_conversation_cut_before_the_assistant_speaks_is_left_out_aloud(chat, caplog):
    """A batch of such windows has no label: its mean loss would be 0 / 0."""
    rows = [{"messages": turns(f"q {i}", f"answer {i}")} for i in range(80)]
    rows += [{"messages": turns(f"long {i} " * 40, "late")} for i in range(80)]
    data = chat(rows, seq_len=24)
    with caplog.at_level(logging.INFO, logger="qat.data.chat"):
        data.setup()
    assert sum("left out: the assistant is silent in their first 24 tokens" in m for m in caplog.messages) >= 2
    for split in SPLITS:
        assert (data.split(split).labels != IGNORE).any(1).all()


def test_conversations_whose_answers_are_all_cut_off_ask_for_longer_windows(chat):
    data = chat([{"messages": turns(f"long {i} " * 40, "late")} for i in range(80)], seq_len=24)
    with pytest.raises(ValueError, match=r"the train split of data chat has no usable token .*larger data.seq_len"):
        data.setup()


def test_too_few_conversations_ask_for_more(chat):
    with pytest.raises(ValueError, match=r"no usable token .* give more conversations"):
        chat([{"messages": turns("a", "b")}]).setup()


@pytest.mark.parametrize(
    "other",
    [CHAT_TEMPLATE.replace("<|end|>", "<|end|><|end|>"), CHAT_TEMPLATE.split("{% if add")[0]],
    ids=["other tokens", "same tokens, other labels"],
)
def test_the_digest_knows_the_template(chat, other):
    first = chat().digest
    assert chat(template=other).digest != first
    assert chat().digest == first


def test_a_conversation_that_the_template_refuses_is_named_with_its_reason(chat):
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    data = chat(template=strict + CHAT_TEMPLATE)  # as Gemma's
    with pytest.raises(ValueError, match=r"refuses a conversation of system, user, assistant .*System role not supp"):
        data.encode(turns("hi", "hello", system="be brief"))


# The date as Llama 3.1's template takes it, and as Llama 3.2's and gpt-oss's ask for it.
DATED = (
    "{{ date_string }}, {% macro day(format) %}{{ strftime_now(format) }}{% endmacro %}"
    "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y %Y-%m-%d %B %H:%M:%S') }} {{ day('%A') }} "
    "{{ strftime_now('%-m/%-d, 100 %%d') }}{% endif %}"
)


def test_a_template_that_prints_the_date_prints_the_same_one_every_day(chat):
    data, messages = chat(template=DATED + CHAT_TEMPLATE), turns("hi", "ok")
    ids, labels = data.encode(messages)
    text = data.tokenizer.decode([*ids, labels[-1]])
    assert text.startswith("26 Jul 2024, 26 Jul 2024 2024-07-26 July 00:00:00 Friday 7/26, 100 %d")
    assert labelled(data, ids, labels) == "ok<|end|>"


@pytest.mark.parametrize(
    "start", ["\n", "  {% if true %}x{% endif %}", " \n", "{%- if true %}x{% endif %}\n"], ids=repr
)
def test_the_fixed_date_leaves_the_rest_of_a_template_as_it_is(chat, start):
    data, messages = chat(template=start + CHAT_TEMPLATE), turns("hi", "ok")
    ids, labels = data.encode(messages)
    whole = data.tokenizer.apply_chat_template(messages, tokenize=False)
    assert data.tokenizer.decode([*ids, labels[-1]]) == whole


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@pytest.mark.parametrize(
    ("answer", "blank"),
    [("three.", ""), ("    three.", "\n"), ("  ", ""), ("\n\n three.", ""), ("", "")],
    ids=repr,
)
def test_an_answer_may_begin_with_white_space(tmp_path, answer, blank):
    tokenizer = train_tokenizer([Document("x", "assistant\n    return 1\n" * 50)], 400)
    tokenizer.chat_template = CHATML
    data = ChatData(str(tmp_path / "x.jsonl"))
    data.tokenizer = tokenizer
    ids, labels = data.encode(turns("what?", answer, "and?", answer))
    # The line feed that ends the prompt may be one token with the white space behind it.
    assert labelled(data, ids, labels) == f"{blank}{answer}<|im_end|>\n" * 2


def test_the_conversation_that_cannot_be_used_is_named_by_its_number(chat):
    rows = [{"messages": turns(f"what is {i}?", f"it is {i}.")} for i in range(200)]
    rows[123] = {"messages": turns("a", "hm</think>first", "b", "second")}
    with pytest.raises(ValueError, match=r"rewrites earlier turns .*\(conversation 124 of the 200 in the file\)"):
        chat(rows, template=REWRITING).setup()
