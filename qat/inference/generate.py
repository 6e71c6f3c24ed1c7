"""Text from a model, piece by piece."""

from collections.abc import Iterator
from threading import Event, Thread
from typing import Any

import torch
from transformers import TextIteratorStreamer


def stream(
    model: Any,
    tokenizer: Any,
    prompt: str,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    chat: bool = False,
) -> Iterator[str]:
    """Continue `prompt`, yielding text as soon as its words are complete.

    Args:
        model: a transformers model, packed or not.
        tokenizer: its tokenizer.
        prompt: what the model reads; one user message where `chat`.
        max_new_tokens: where it stops at the latest.
        temperature: 0 takes the likeliest token each time.
        top_p: sample from the likeliest tokens that hold this much probability.
        chat: wrap the prompt in the tokenizer's chat template.

    Yields:
        Pieces that concatenate to the generated text, without the prompt.

    Raises:
        ValueError: `chat` without a chat template, or a prompt without a token.
    """
    inputs = _encode(tokenizer, prompt, chat).to(model.device)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature > 0 else _GREEDY
    failure: list[BaseException] = []
    abandoned = Event()

    def stop(ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.full((len(ids),), abandoned.is_set(), device=ids.device)

    def run() -> None:
        try:
            model.generate(
                **inputs, max_new_tokens=max_new_tokens, streamer=streamer, stopping_criteria=[stop], **sampling
            )
        except BaseException as error:  # handed to the consumer, who would wait forever otherwise
            failure.append(error)
            streamer.end()

    worker = Thread(target=run, daemon=True)
    worker.start()
    try:
        yield from (piece for piece in streamer if piece)
    finally:  # also when the consumer takes no more pieces
        abandoned.set()
        worker.join()
    if failure:
        raise failure[0]


# None and not 1.0: transformers warns about sampling parameters that greedy search ignores.
_GREEDY = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


def _encode(tokenizer: Any, prompt: str, chat: bool) -> Any:
    if chat and not tokenizer.chat_template:
        raise ValueError("chat=True, but the tokenizer has no chat template: use chat=False, or a chat model")
    if chat:
        messages = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    if inputs["input_ids"].numel() == 0:
        raise ValueError("the prompt has no token: write something, or use a tokenizer that adds a start token")
    inputs["input_ids"] = inputs["input_ids"].to(torch.long)
    return inputs
