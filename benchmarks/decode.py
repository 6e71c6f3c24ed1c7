"""Tokens a second of a random Llama in bfloat16 and in each scheme, all through the same decode loop.

    python benchmarks/decode.py                              # 1B-shaped, CPU, two threads, batch 1
    python benchmarks/decode.py --head 16 8 --batch 1 8      # lm_head in bfloat16 and in w8a16
    python benchmarks/decode.py --through transformers       # without the fused decoder
    python benchmarks/decode.py --device cuda --shape 8B --batch 1 8 32 --head 16 4

Weights are constants: the speed does not depend on them.  The variants take turns, a few tokens each, in one process,
and medians are reported.  On a CPU, bfloat16 is prepacked where torch can on this processor, and plain where it cannot;
the table says which.  On a GPU all of them run as CUDA graphs.  Memory is the bytes of the model's tensors.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cpu_linear import SCHEMES as PACKED
from cpu_linear import facts
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig
from transformers.initialization import no_init_weights

from qat.inference import PackedLinear
from qat.inference.cpu_backend import use_cpu_kernels
from qat.inference.cuda_backend import require_cuda, use_cuda_kernels
from qat.inference.decode import Step, step
from qat.inference.llama import LlamaDecoder
from qat.scheme import QuantScheme

LLAMA = {
    "vocab_size": 128256, "max_position_embeddings": 4096, "tie_word_embeddings": False, "num_attention_heads": 32,
    "num_key_value_heads": 8,
}  # fmt: skip
SHAPES = {
    "1B": {**LLAMA, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16},
    "8B": {**LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
}
PROMPT = 16
SCHEMES: dict[str, QuantScheme | None] = {"bf16": None, **PACKED}


class Prepacked(nn.Module):
    """A bfloat16 layer in oneDNN's own order for one token."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), 1)

    def forward(self, input: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(input, self.weight, None, "none", [], "")


def packed(layer: nn.Linear, scheme: QuantScheme) -> PackedLinear:
    """Some codes in the shape of `layer`."""
    new = PackedLinear(layer.in_features, layer.out_features, scheme, device=layer.weight.device)
    new.packed.fill_(0x7A6B5C4D)
    new.scale.fill_(0.02 / 2 ** (scheme.weight.bits - 1))
    return new


@torch.no_grad()
def build(shape: str, scheme: QuantScheme | None, head: int, embedding: Tensor) -> Any:
    """The model, its decoder layers by `scheme`, its head in bfloat16 (16) or weight-only INT8 or INT4."""
    device = embedding.device
    with no_init_weights(), torch.device(device):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPES[shape]), dtype=torch.bfloat16)
    model.model.embed_tokens.weight = nn.Parameter(embedding, requires_grad=False)
    prepack = device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    for name, layer in list(model.named_modules()):
        if "norm" in name.rpartition(".")[2]:
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
        if prepack and scheme is None:
            model.set_submodule(name, Prepacked(layer))
    if scheme is not None and device.type == "cpu":
        use_cpu_kernels(model, torch.bfloat16)
    elif scheme is not None:
        use_cuda_kernels(model, torch.bfloat16)
    return model.eval().requires_grad_(False)  # else it has no fused decoder


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of all tensors, shared ones once; prepacked weights are as large as plain ones."""
    tensors = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    return sum(tensors.values()) + sum(m.weight.numel() * 2 for m in model.modules() if isinstance(m, Prepacked))


def through_transformers(model: Any, batch: int, capacity: int) -> Step:
    """A step of the model's own forward and growing cache, after the prompt."""
    cache = DynamicCache(config=model.config)

    def run(tokens: Tensor) -> Tensor:
        return model(input_ids=tokens, past_key_values=cache, use_cache=True).logits

    run(torch.zeros(batch, PROMPT, dtype=torch.int64, device=model.device))
    return run


def through_decoder(model: Any, batch: int, capacity: int, modules: bool = False) -> Step:
    """A step of the fused decoder, after the prompt; by its modules, or the fastest that there is."""
    decoder = LlamaDecoder(model)
    cache = decoder.new_cache(batch, capacity)
    decoder(torch.zeros(batch, PROMPT, dtype=torch.int64, device=model.device), cache, last=True)
    return (lambda tokens: decoder(tokens, cache)) if modules else step(decoder, cache)


THROUGH: dict[str, Callable[[Any, int, int], Step]] = {
    "fastest": through_decoder,
    "modules": partial(through_decoder, modules=True),
    "transformers": through_transformers,
}


@torch.inference_mode()
def measure(steps: dict[str, Step], token: Tensor, rounds: int, tokens: int, clock: Callable[[], float]) -> dict:
    """Median seconds a step; greedy, so that a step includes the choice of its token."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, run in steps.items():
            next_token = token
            for _ in range(tokens):
                start = clock()
                next_token = run(next_token)[:, -1:].argmax(-1)
                if token.is_cuda:
                    torch.cuda.synchronize()
                if number:  # the first round warms up
                    times[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def show(results: list[dict], title: str) -> None:
    table = Table(title=title)
    for column in ("batch", "layers", "lm_head", "ms/token", "tokens/s", "speed", "GB"):
        table.add_column(column, justify="left" if column in ("layers", "lm_head") else "right")
    float_seconds = {r["batch"]: r["seconds"] for r in results if r["layers"].startswith("bf16")}
    for r in results:
        base = float_seconds.get(r["batch"])
        speed = "-" if base is None else f"{base / r['seconds']:.2f}x"
        rate = f"{r['batch'] / r['seconds']:.1f}"
        row = r["batch"], r["layers"], r["lm_head"], f"{r['seconds'] * 1e3:.1f}", rate, speed, f"{r['bytes'] / 1e9:.2f}"
        table.add_row(*map(str, row))
    Console(width=100).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", choices=SHAPES, default="1B", help="of the model; 8B on a GPU alone (%(default)s)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--head", type=int, nargs="+", choices=(16, 8, 4), default=[16], help="bits of lm_head")
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES))
    parser.add_argument("--through", choices=THROUGH, default="fastest", help="what runs a step (%(default)s)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=8, help="a turn (%(default)s)")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: for one thread, busy machines")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/decode.json"))
    arguments = parser.parse_args()
    if arguments.clock == "cpu" and (arguments.threads != 1 or arguments.device != "cpu"):
        parser.error("--clock cpu adds up the time of all threads: use it with --threads 1, on a CPU")
    if arguments.device == "cuda":
        require_cuda(torch.device("cuda"))
    elif arguments.shape == "8B":
        parser.error("--shape 8B takes 16 GB a variant: use it with --device cuda")
    torch.set_num_threads(arguments.threads)
    config = SHAPES[arguments.shape]
    size = config["vocab_size"], config["hidden_size"]
    embedding = torch.full(size, 0.01, dtype=torch.bfloat16, device=arguments.device)
    # The float model's head stays bfloat16: it is what is compared with.
    wanted = [(n, h) for n in arguments.schemes for h in (arguments.head if n != "bf16" else [16])]
    models = {(n, h): build(arguments.shape, SCHEMES[n], h, embedding) for n, h in wanted}
    clock = time.perf_counter if arguments.clock == "wall" else time.process_time
    prepacked = arguments.device == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    names = {"bf16": "bf16 prepacked" if prepacked else "bf16"}
    results = []
    for batch in arguments.batch:
        capacity = PROMPT + arguments.tokens * (arguments.rounds + 1)
        make = THROUGH[arguments.through]
        with torch.inference_mode():
            steps = {key: make(model, batch, capacity) for key, model in models.items()}
        token = torch.zeros(batch, 1, dtype=torch.int64, device=arguments.device)
        seconds = measure(steps, token, arguments.rounds, arguments.tokens, clock)
        results += [
            {"batch": batch, "layers": names.get(name, name), "lm_head": "bf16" if head == 16 else f"w{head}a16",
             "seconds": value, "bytes": tensor_bytes(models[name, head])}
            for (name, head), value in seconds.items()
        ]  # fmt: skip
    where = f"{arguments.threads} threads" if arguments.device == "cpu" else torch.cuda.get_device_name()
    show(results, f"{arguments.shape}-shaped Llama, {where}, through {arguments.through}")
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    settings = {name: str(value) for name, value in vars(arguments).items() if name != "json"}
    arguments.json.write_text(json.dumps({**facts(), **settings, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
