"""Tokens one after the other, over a static cache.

    prompt   one pass over all of its tokens; the last one's logits
    then     one token of each row a step: `step` picks how that runs

A step is the same work every time: on CUDA it is captured once in a graph and replayed; on the CPU kernels it is
recorded once as a list of calls with their arguments (`cpu_step`); else the decoder's modules run.  The graph has not
run on a GPU yet.
"""

import logging
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor

from qat.inference import cpu_step
from qat.inference.cache import KeyValueCache, Span
from qat.inference.llama import LlamaDecoder

log = logging.getLogger(__name__)

Step = Callable[[Tensor], Tensor]
Work = Callable[[], Tensor]


def step(decoder: LlamaDecoder, cache: KeyValueCache) -> Step:
    """The fastest way to run one token of each row.

    Returns:
        A function from tokens (batch, 1), int64, to logits (batch, 1, vocabulary), which advances the cache.  Its
        result may be overwritten by the next call.
    """
    if decoder.device.type == "cuda":
        with torch.cuda.device(decoder.device):
            return FixedStep(decoder, cache, cuda_graph)
    if (reason := cpu_step.why_not(decoder, cache.batch)) is None:
        return cpu_step.CpuStep(decoder, cache)
    log.info("no recorded step for %s: the decoder's modules run", reason)
    return lambda tokens: decoder(tokens, cache, last=True)


class FixedStep:
    """A step whose launches are the same each time: slot and tokens are read from tensors, the mask covers the cache.

    Args:
        decoder: on any device.
        cache: of it; the step reads and writes its tensors in place.
        capture: of the work, which returns logits, what runs it again.
    """

    def __init__(self, decoder: LlamaDecoder, cache: KeyValueCache, capture: Callable[[Work], Work] = lambda run: run):
        self.decoder, self.cache = decoder, cache
        device = decoder.device
        self.tokens = torch.zeros(cache.batch, 1, dtype=torch.int64, device=device)
        self.slot = torch.full((1,), min(cache.length, cache.capacity - 1), dtype=torch.int64, device=device)
        self.all_slots = torch.arange(cache.capacity, device=device)
        decoder.rotary(cache.capacity)  # outside of what is captured
        self.replay = capture(self.run)

    def run(self) -> Tensor:
        """(batch, 1, vocabulary): everything that changes from step to step is read from the device's memory."""
        mask = (self.all_slots <= self.slot) & (self.all_slots >= self.cache.start[:, None])
        positions = (self.slot - self.cache.start[:, None]).clamp_(min=0)
        span = Span(self.slot, positions, self.cache.capacity, mask[:, None, None])
        return self.decoder.run(self.tokens, self.cache, span)

    def __call__(self, tokens: Tensor) -> Tensor:
        """(batch, 1) -> (batch, 1, vocabulary), overwritten by the next call.

        Raises:
            ValueError: the cache is full, or has another batch.
        """
        self.cache.require(tokens)
        self.tokens.copy_(tokens)
        self.slot.fill_(self.cache.length)
        logits = self.replay()
        self.cache.length += 1
        return logits


def cuda_graph(run: Work) -> Work:
    """Capture `run` after two runs on a side stream, which compile kernels and fill torch's allocator.

    Those write to the next free slot alone, which the first real step overwrites.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = run()

    def replay() -> Tensor:
        graph.replay()
        return logits

    return replay


def sample(logits: Tensor, temperature: float, top_p: float = 1.0, top_k: int | None = None) -> Tensor:
    """One token a row.

    Args:
        logits: (batch, vocabulary), floating.
        temperature: 0 takes the likeliest token.
        top_p: sample from the likeliest tokens that hold this much probability.
        top_k: and from this many at most.

    Returns:
        (batch,), int64.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(min(top_k, logits.shape[-1])).values[:, -1:], -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        probability = ordered.softmax(-1)
        beyond = probability.cumsum(-1) - probability >= top_p  # what comes before holds enough: the first one stays
        logits = logits.masked_fill(beyond.scatter(-1, order, beyond), -torch.inf)
    return logits.softmax(-1).multinomial(1)[:, 0]


@torch.inference_mode()
def generate(
    decoder: LlamaDecoder,
    prompt: Tensor,
    max_new_tokens: int,
    attention_mask: Tensor | None = None,
    stop: Collection[int] = (),
    pad: int = 0,
    **sampling: Any,
) -> Iterator[Tensor]:
    """Continue the prompts.

    Args:
        decoder: of a model.
        prompt: (batch, tokens), int64, padded on the left.
        max_new_tokens: where it stops at the latest.
        attention_mask: (batch, tokens), 0 for padding; None where there is none.
        stop: ids that end a row; it ends when all rows have one.
        pad: what rows that have ended go on with.
        sampling: `temperature`, `top_p` and `top_k` of `sample`; the likeliest token by default.

    Yields:
        (batch,), int64: the next token of each row.

    Raises:
        ValueError: the model's attention window is shorter, or the mask pads elsewhere than on the left.
    """
    batch, tokens = prompt.shape
    cache = decoder.new_cache(batch, tokens + max_new_tokens)
    if attention_mask is not None:
        if (attention_mask.diff(dim=-1) < 0).any() or not attention_mask[:, -1].all():
            raise ValueError("prompts must be padded on the left: set tokenizer.padding_side = 'left'")
        cache.reset(tokens - attention_mask.sum(-1))
    sampling = {"temperature": 0.0, **sampling}
    logits = decoder(prompt, cache, last=True)
    ended = torch.zeros(batch, dtype=torch.bool, device=prompt.device)
    stops = torch.tensor(sorted(stop), dtype=torch.int64, device=prompt.device)
    advance: Step | None = None
    for number in range(max_new_tokens):
        token = sample(logits[:, -1], **sampling).masked_fill(ended, pad)
        yield token
        ended |= torch.isin(token, stops)
        if number + 1 == max_new_tokens or (len(stops) and ended.all()):
            return
        advance = advance or step(decoder, cache)
        logits = advance(token[:, None])
