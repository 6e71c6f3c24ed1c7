"""Tokens a second at batch 1: a 1B-shaped Llama in bfloat16 and in each scheme, through the same decode loop.

    python benchmarks/decode.py                          # two threads, lm_head in bfloat16
    python benchmarks/decode.py --head 8 --threads 1     # lm_head in w8a16, as embeddings stay bfloat16

Weights are constants: the speed does not depend on them.  The variants take turns, a few tokens
each, in one process, and medians are reported.  bfloat16 is prepacked where torch can on this processor, and plain
where it cannot; the table says which.  Memory is the bytes of the model's tensors.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cpu_linear import facts
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig
from transformers.initialization import no_init_weights

from qat.inference import PackedLinear
from qat.scheme import QuantScheme, QuantSpec

SHAPE = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 2048, "tie_word_embeddings": False,
}  # fmt: skip
INT8_INPUT = QuantSpec(bits=8, granularity="token", dynamic=True, absmax_rule="qmax")
INT4, INT8 = QuantSpec(bits=4, granularity="group", group_size=128), QuantSpec(bits=8, granularity="channel")
SCHEMES = {
    "bf16": None,
    "w4a16": QuantScheme(weight=INT4),
    "w4a8": QuantScheme(weight=INT4, input=INT8_INPUT),
    "w8a16": QuantScheme(weight=INT8),
    "w8a8": QuantScheme(weight=INT8, input=INT8_INPUT),
}


class Prepacked(nn.Module):
    """A bfloat16 layer in oneDNN's own order for one token."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), 1)

    def forward(self, input: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(input, self.weight, None, "none", [], "")


def packed(layer: nn.Linear, scheme: QuantScheme) -> PackedLinear:
    """Some codes in the shape of `layer`, on qat's kernels."""
    new = PackedLinear(layer.in_features, layer.out_features, scheme)
    new.backend = "cpu"
    new.packed.fill_(0x7A6B5C4D)
    new.scale.fill_(0.02 / 2 ** (scheme.weight.bits - 1))
    return new


@torch.no_grad()
def build(scheme: QuantScheme | None, head: int, embedding: Tensor) -> Any:
    """The model, its decoder layers by `scheme`, its head in bfloat16 (16) or weight-only INT8 or INT4."""
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE), dtype=torch.bfloat16)
    model.model.embed_tokens.weight = nn.Parameter(embedding, requires_grad=False)
    prepack = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.LayerNorm) or "norm" in name.rpartition(".")[2]:
            layer.weight.fill_(1)
        if not isinstance(layer, nn.Linear):
            continue
        is_head = name == "lm_head"
        wanted = scheme if not is_head else None if head == 16 else SCHEMES[f"w{head}a16"]
        if wanted is not None:
            model.set_submodule(name, packed(layer, wanted))
            continue
        if is_head:
            layer.weight = nn.Parameter(embedding, requires_grad=False)  # shared: it is read whole either way
        else:
            layer.weight.fill_(0.01)
        if prepack:
            model.set_submodule(name, Prepacked(layer))
    return model.eval()


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of all tensors, shared ones once; prepacked weights are as large as plain ones."""
    tensors = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    return sum(tensors.values()) + sum(m.weight.numel() * 2 for m in model.modules() if isinstance(m, Prepacked))


class Decoder:
    """Greedy decoding, a token a step, after a prompt of 16 tokens."""

    def __init__(self, model: Any):
        self.model, self.cache = model, DynamicCache(config=model.config)
        self.token = torch.arange(16)[None]
        self.step()

    @torch.inference_mode()
    def step(self) -> None:
        logits = self.model(input_ids=self.token, past_key_values=self.cache, use_cache=True).logits
        self.token = logits[:, -1:].argmax(-1)


def measure(decoders: dict[str, Decoder], rounds: int, tokens: int, clock: Callable[[], float]) -> dict[str, float]:
    """Median seconds a token."""
    times: dict[str, list[float]] = {name: [] for name in decoders}
    for number in range(rounds + 1):
        for name, decoder in decoders.items():
            for _ in range(tokens):
                start = clock()
                decoder.step()
                if number:  # the first round warms up
                    times[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=8, help="a turn (%(default)s)")
    parser.add_argument("--head", type=int, choices=(16, 8, 4), default=16, help="bits of lm_head (%(default)s)")
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES))
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: for one thread, busy machines")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/decode.json"))
    arguments = parser.parse_args()
    if arguments.clock == "cpu" and arguments.threads != 1:
        parser.error("--clock cpu adds up the time of all threads: use it with --threads 1")
    torch.set_num_threads(arguments.threads)
    embedding = torch.full((SHAPE["vocab_size"], SHAPE["hidden_size"]), 0.01, dtype=torch.bfloat16)
    # The float model's head stays bfloat16: it is what is compared with.
    models = {n: build(SCHEMES[n], 16 if n == "bf16" else arguments.head, embedding) for n in arguments.schemes}
    memory = {name: tensor_bytes(model) for name, model in models.items()}
    clock = time.perf_counter if arguments.clock == "wall" else time.process_time
    seconds = measure({n: Decoder(m) for n, m in models.items()}, arguments.rounds, arguments.tokens, clock)

    prepacked = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    head = {16: "bfloat16", 8: "w8a16", 4: "w4a16"}[arguments.head]
    table = Table(title=f"1B-shaped Llama, batch 1, {arguments.threads} threads, lm_head {head} (bf16's: bfloat16)")
    for column in ("layers", "ms/token", "tokens/s", "speed", "GB"):
        table.add_column(column, justify="left" if column == "layers" else "right")
    for name, value in seconds.items():
        label = name if name != "bf16" else "bf16 prepacked" if prepacked else "bf16 (cannot be prepacked here)"
        speed = f"{seconds['bf16'] / value:.2f}x" if "bf16" in seconds else "-"
        table.add_row(label, f"{value * 1e3:.1f}", f"{1 / value:.1f}", speed, f"{memory[name] / 1e9:.2f}")
    Console().print(table)
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    measured = {"seconds_a_token": seconds, "tensor_bytes": memory, "bf16_prepacked": prepacked, "lm_head": head}
    settings = {"threads": arguments.threads, "clock": arguments.clock, "shape": SHAPE}
    arguments.json.write_text(json.dumps({**facts(), **settings, **measured}, indent=2) + "\n")


if __name__ == "__main__":
    main()
