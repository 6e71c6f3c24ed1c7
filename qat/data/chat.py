"""Conversations for fine-tuning an assistant: one window each, loss on the assistant's tokens only."""

import hashlib
import json
import logging
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from qat.data import windows
from qat.data.documents import Document, Split
from qat.data.language import LanguageData
from qat.data.windows import IGNORE, Windows

log = logging.getLogger(__name__)

# What a template is told of today: were it the true date, tokens would change at midnight, under a resumed run and
# under every cached control.  The day is the one that Llama's templates print where nobody tells them.
TODAY = datetime(2024, 7, 26)
_DIRECTIVES = {f"%{d}": TODAY.strftime(f"%{d}") for d in "aAbBcdDeFgGhHIjmMpRSTuUVwWxXyYzZ"}
_DIRECTIVES |= {f"%-{d}": _DIRECTIVES[f"%{d}"].lstrip("0") or "0" for d in "dHIjmMSy"}
# A macro, because transformers passes no function on to templates; `+` and the line feed keep what follows as it is.
_STRFTIME_NOW = (
    "{% macro strftime_now(format) %}{{ format | replace('%%', '\x00')"
    + "".join(f" | replace('{directive}', '{text}')" for directive, text in _DIRECTIVES.items())
    + " | replace('\x00', '%') }}{% endmacro %}\n"
)


class ChatData(LanguageData):
    """Conversations through the model's chat template, for which today is always `TODAY`.

    Args:
        path: a JSONL file; a line is {"messages": [{"role": ..., "content": ...}, ...]} or
            {"prompt": ..., "response": ...}.
        name, seq_len, batch_size, seed, calibration_windows: as `LanguageData`; longer conversations are
            cut at `seq_len` tokens, and left out if no assistant token remains.

    Raises:
        ValueError: the file is missing, a line is not a conversation (named by number), the tokenizer has
            no chat template or one that refuses a conversation or rewrites its earlier turns (named by
            number), or a split has no assistant token.
    """

    def __init__(
        self,
        path: str,
        name: str = "chat",
        seq_len: int = 512,
        batch_size: int = 8,
        seed: int = 0,
        calibration_windows: int = 128,
    ):
        super().__init__(
            lambda: conversations(Path(path)),
            name=name,
            seq_len=seq_len,
            batch_size=batch_size,
            seed=seed,
            calibration_windows=calibration_windows,
        )

    _remedy = "more conversations, or a larger data.seq_len if the assistant speaks late in them"

    def _windows(self, split: Split, documents: list[Document]) -> Windows:
        if not getattr(self.tokenizer, "chat_template", None):
            raise ValueError(f"data {self.name}: the model's tokenizer has no chat template; use data=text")
        rows, origin = [], []
        for index, document in enumerate(documents):
            try:
                ids, labels = self.encode(json.loads(document.text))
            except ValueError as error:
                number = self.documents.index(document) + 1
                raise ValueError(f"{error} (conversation {number} of the {len(self.documents)} in the file)") from error
            ids, labels = ids[: self.seq_len], labels[: self.seq_len]
            if any(label != IGNORE for label in labels):
                rows.append((ids, labels))
                origin.append(index)
        if len(rows) < len(documents):
            log.info(
                "data %s, %s split: %d of %d conversations left out: the assistant is silent in their first %d tokens",
                *(self.name, split, len(documents) - len(rows), len(documents), self.seq_len),
            )
        cut = windows.from_pairs(rows, origin, self.seq_len, self._pad_id)
        return windows.spread(cut, self.calibration_windows) if split == "calibration" else cut

    def encode(self, messages: list[dict[str, str]]) -> tuple[list[int], list[int]]:
        """Token ids and shifted labels of a conversation; a label is -100 unless the assistant says that token.

        The assistant's part is the text that the template adds between the generation prompt and the end of
        the message, so it works with every template whose text only ever grows.  Where it begins with
        white space that is one token with the end of the prompt, that token is the assistant's.

        Raises:
            ValueError: the template refuses the messages, or rewrites earlier turns.
        """
        text = self._template(messages, False)
        ids = self._tokens(text)
        spoken = [False] * len(ids)
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, after = self._template(messages[:turn], True), self._template(messages[: turn + 1], False)
            if not (text.startswith(after) and after.startswith(before)):
                raise ValueError(
                    f"data {self.name}: the chat template rewrites earlier turns when a later one is added, so the "
                    f"assistant's tokens of turn {turn} cannot be told apart; train on conversations of one turn"
                )
            # Not by the spans of tokens in the text, from which some tokenizers (Llama 3's) leave out white space.
            first, stop = (_shared(ids, self._tokens(part)) for part in (before, after))
            spoken[first:stop] = [True] * (stop - first)
        labels = [i if said else IGNORE for i, said in zip(ids[1:], spoken[1:], strict=True)]
        return ids[:-1], labels

    def _tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _template(self, messages: list[dict[str, str]], prompt: bool) -> str:
        if not messages:
            return ""
        options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": prompt}
        options["chat_template"] = _STRFTIME_NOW + self.tokenizer.get_chat_template()
        options["date_string"] = TODAY.strftime("%d %b %Y")
        try:
            return self.tokenizer.apply_chat_template(messages, **options)
        except TemplateError as error:  # as some do where there is a system message, or one speaker twice in a row
            roles = ", ".join(message["role"] for message in messages)
            raise ValueError(
                f"data {self.name}: the model's chat template refuses a conversation of {roles} "
                f"({messages[0]['content'][:40]!r}...): {error}; take such turns out of the file"
            ) from error


def _shared(a: list[int], b: list[int]) -> int:
    """How many tokens two lists have in common before they part."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def conversations(path: Path) -> list[Document]:
    """The conversations of a JSONL file; a document's text is the JSON list of its messages.

    Raises:
        ValueError: as `ChatData`.
    """
    if not path.is_file():
        raise ValueError(f"data.path={path}: no such file")
    documents = {}
    # Not splitlines(), which also splits at characters that JSON strings may hold, such as U+2028.
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            messages = _messages(json.loads(line))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number} is not a conversation: {error}") from error
        content = json.dumps(messages, ensure_ascii=False)
        documents[hashlib.sha256(content.encode()).hexdigest()] = content
    if not documents:
        raise ValueError(f"{path} holds no conversation")
    return [Document(name, content) for name, content in documents.items()]


def _messages(row: Any) -> list[dict[str, str]]:
    if not isinstance(row, dict):
        raise ValueError(f"it is a JSON {type(row).__name__}, not an object")
    if "messages" not in row:
        if not {"prompt", "response"} <= row.keys():
            raise ValueError(f"it has the keys {sorted(row)}, not 'messages', nor 'prompt' and 'response'")
        turns = [("user", row["prompt"]), ("assistant", row["response"])]
    else:
        turns = [(m["role"], m["content"]) for m in row["messages"]]
    if not turns or not all(isinstance(word, str) for turn in turns for word in turn):
        raise ValueError("every message needs a role and a text")
    return [{"role": role, "content": content} for role, content in turns]
