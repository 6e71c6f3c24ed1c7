"""How fast a loaded model reads a prompt and writes tokens, and the memory that it takes."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from qat.inference.decode import step
from qat.inference.llama import fused_decoder


@dataclass(frozen=True)
class Speed:
    """Of one batch size.

    Attributes:
        batch: sequences at once.
        prefill: prompt tokens a second, all sequences together.
        decode: new tokens a second, all sequences together; greedy.
        cache_bytes: of keys and values, at the end.
    """

    batch: int
    prefill: float
    decode: float
    cache_bytes: int


@torch.inference_mode()
def speed(model: Any, batch: int, prompt: int, new_tokens: int, rounds: int = 3) -> Speed:
    """Measure a model, after a round that warms up; medians over rounds, and over the tokens of all of them.

    Args:
        model: a transformers model, packed or not, where it runs.
        batch: sequences.
        prompt: tokens of each, random.
        new_tokens: of each, after the prompt; at least 2, as the first one comes from the prompt.
        rounds: how often.

    Raises:
        ValueError: a size is too small.
    """
    if min(batch, prompt, rounds) < 1 or new_tokens < 2:
        raise ValueError(f"batch and prompt must be at least 1 and new tokens 2, got {batch}, {prompt}, {new_tokens}")
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, vocabulary, (batch, prompt), generator=generator).to(model.device)
    reading, writing = [], []
    for number in range(rounds + 1):
        run = _by_decoder(model, batch, prompt + new_tokens) or _by_transformers(model)
        seconds, token = _timed(lambda: run.read(tokens), model.device)  # noqa: B023
        steps = []
        run.begin()
        for _ in range(new_tokens - 1):
            taken, token = _timed(lambda: run.write(token), model.device)  # noqa: B023
            steps.append(taken)
        if number:
            reading.append(seconds)
            writing += steps
    prefill, decode = batch * prompt / statistics.median(reading), batch / statistics.median(writing)
    return Speed(batch, prefill, decode, run.cache_bytes())


@dataclass
class _Run:
    """One sequence of calls; `read` and `write` return the next token, (batch, 1)."""

    read: Callable[[Tensor], Tensor]
    write: Callable[[Tensor], Tensor]
    begin: Callable[[], None]
    cache_bytes: Callable[[], int]


def _by_decoder(model: Any, batch: int, capacity: int) -> _Run | None:
    decoder = fused_decoder(model)
    if decoder is None:
        return None
    cache = decoder.new_cache(batch, capacity)
    steps: list[Callable[[Tensor], Tensor]] = []
    return _Run(
        lambda tokens: _next(decoder(tokens, cache, last=True)),
        lambda token: _next(steps[0](token)),
        lambda: steps.append(step(decoder, cache)),  # records, or captures a graph: not a token's time
        lambda: cache.nbytes,
    )


def _by_transformers(model: Any) -> _Run:
    cache = DynamicCache(config=model.config)

    def forward(tokens: Tensor) -> Tensor:
        return _next(model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits)

    def held() -> int:
        layers: Any = cache.layers
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)

    return _Run(forward, forward, lambda: None, held)


def _next(logits: Tensor) -> Tensor:
    return logits[:, -1:].argmax(-1)


def _timed(call: Callable[[], Tensor], device: torch.device) -> tuple[float, Tensor]:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, result


def tensor_bytes(model: Any) -> int:
    """Bytes of all parameters and buffers, shared ones once."""
    return sum({t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}.values())
