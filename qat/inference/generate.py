"""Text from a model, piece by piece."""

import logging
from collections.abc import Iterator
from threading import Event, Thread
from typing import Any

import torch
from transformers import TextIteratorStreamer
from transformers.generation.streamers import TextStreamer

from qat.inference.decode import generate
from qat.inference.llama import LlamaDecoder, fused_decoder

log = logging.getLogger(__name__)


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

    A Llama-like model decodes over a static cache (`qat.inference.decode`), any other by transformers' `generate`, and
    so does one that is being trained (float layers that require gradients, or fake-quantized ones); greedy text is the
    same.

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
    decoder = fused_decoder(model)
    if decoder is not None and (reason := _beyond(model, decoder, inputs["input_ids"].shape[1] + max_new_tokens)):
        log.info("transformers generates, layer by layer: %s", reason)
        decoder = None
    if decoder is None:
        return _by_transformers(model, tokenizer, inputs, max_new_tokens, temperature, top_p)
    return _by_decoder(model, decoder, tokenizer, inputs, max_new_tokens, temperature, top_p)


def _by_decoder(
    model: Any,
    decoder: LlamaDecoder,
    tokenizer: Any,
    inputs: Any,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
) -> Iterator[str]:
    streamer = _Pieces(tokenizer, skip_prompt=True, skip_special_tokens=True)
    settings = model.generation_config
    stop = settings.eos_token_id
    tokens = generate(
        decoder, inputs["input_ids"], max_new_tokens, stop=[stop] if isinstance(stop, int) else stop or [],
        temperature=temperature, top_p=top_p, top_k=_TOP_K if settings.top_k is None else settings.top_k,
    )  # fmt: skip
    streamer.put(inputs["input_ids"])  # which it skips
    for token in tokens:
        streamer.put(token.cpu())
        yield from streamer.take()
    streamer.end()
    yield from streamer.take()


class _Pieces(TextStreamer):
    """Keeps the pieces that transformers would print."""

    kept: tuple[str, ...] = ()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.kept = (*self.kept, text)

    def take(self) -> list[str]:
        taken, self.kept = self.kept, ()
        return [piece for piece in taken if piece]


# What transformers samples from where a model's generation config does not say.
_TOP_K = 50
# Settings of a generation config that change which token comes next, and that the decode loop does not know.
_UNKNOWN = {
    "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_length": 0, "min_new_tokens": 0, "num_beams": 1,
    "bad_words_ids": None, "sequence_bias": None, "forced_bos_token_id": None, "forced_eos_token_id": None,
    "suppress_tokens": None, "begin_suppress_tokens": None, "guidance_scale": 1.0, "encoder_repetition_penalty": 1.0,
    "exponential_decay_length_penalty": None, "stop_strings": None, "watermarking_config": None,
}  # fmt: skip


def _beyond(model: Any, decoder: LlamaDecoder, tokens: int) -> str | None:
    """What of a generation the decode loop does not do, or None."""
    if decoder.window is not None and tokens > decoder.window:
        return f"{tokens} tokens are more than the attention window of {decoder.window}"
    for name, neutral in _UNKNOWN.items():
        value = getattr(model.generation_config, name, None)
        if value is not None and value != neutral:
            return f"the generation config sets {name}"
    return None


def _by_transformers(
    model: Any, tokenizer: Any, inputs: Any, max_new_tokens: int, temperature: float, top_p: float
) -> Iterator[str]:
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
