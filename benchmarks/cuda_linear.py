"""Linear layers of Llama-3-8B on an NVIDIA GPU: qat's kernels against cuBLAS and other packages, side by side.

    python benchmarks/cuda_linear.py
    python benchmarks/cuda_linear.py --layers gate_up --tokens 1 16 --schemes w4a16

A call is captured in a CUDA graph; before each replay a buffer larger than the L2 cache is written, so that weights
come from memory as they do in a model.  Variants take turns, and medians are reported.  `of floor` is the least time in
which this card could do it, from its copy bandwidth and matrix peaks as measured here, over the time taken; `vs bf16`
is how many times as fast as cuBLAS in bfloat16.  Packages that are not installed, or fail, are named and left out.

Nothing here has run on a GPU yet.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import cuda_peers
import torch
from cpu_linear import SCHEMES
from rich.console import Console
from rich.table import Table
from torch import Tensor

from qat.inference import PackedLinear
from qat.inference.cuda_backend import CudaLinear, require_cuda
from qat.scheme import QuantScheme

LAYERS = {  # inputs, outputs
    "qkv": (4096, 6144), "o": (4096, 4096), "gate_up": (4096, 28672), "down": (14336, 4096), "lm_head": (4096, 128256),
}  # fmt: skip
TOKENS = (1, 4, 8, 16, 32, 64, 128, 256, 2048)
FLUSH_BYTES = 256 << 20  # several times the L2 cache of any card

Call = Callable[[], Tensor]
Timer = Callable[[dict[str, Call]], dict[str, float]]


@dataclass(frozen=True)
class Card:
    """What a GPU reaches: bytes a second of a copy, bfloat16 and int8 operations a second of a large product."""

    bandwidth: float
    bf16: float
    int8: float


@dataclass(frozen=True)
class Row:
    """One variant of one layer; `floor` and `seconds` in seconds."""

    layer: str
    tokens: int
    variant: str
    seconds: float
    floor: float
    of_floor: float
    vs_bf16: float


def floor(scheme: QuantScheme | None, inputs: int, outputs: int, tokens: int, card: Card) -> float:
    """Seconds that reading the operands once, or the multiplications, take at least; None is bfloat16."""
    weight_bits = 16.0 if scheme is None else scheme.weight.bits + 16 * scheme.weight.groups(inputs) / inputs
    moved = weight_bits / 8 * inputs * outputs + 2 * tokens * (inputs + outputs)
    peak = card.bf16 if scheme is None or scheme.input is None else card.int8
    return max(moved / card.bandwidth, 2 * tokens * inputs * outputs / peak)


def measure(
    layers: Sequence[str],
    tokens: Sequence[int],
    schemes: Sequence[str],
    card: Card,
    variants: Callable[[str, int, int, int], dict[str, Call]],
    timer: Timer,
) -> Iterable[Row]:
    """A row for each variant of each layer; `variants` (scheme, inputs, outputs, tokens) must hold `bf16`."""
    for layer in layers:
        inputs, outputs = LAYERS[layer]
        for count in tokens:
            for name in schemes:
                seconds = timer(variants(name, inputs, outputs, count))
                for variant, taken in seconds.items():
                    least = floor(None if variant == "bf16" else SCHEMES[name], inputs, outputs, count, card)
                    label = variant if variant == "bf16" else f"{name} {variant}"
                    yield Row(layer, count, label, taken, least, least / taken, seconds["bf16"] / taken)


def cuda_variants(name: str, inputs: int, outputs: int, tokens: int) -> dict[str, Call]:
    """cuBLAS, ours, and what else is installed."""
    x = torch.randn(tokens, inputs, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(outputs, inputs, device="cuda", dtype=torch.bfloat16)
    packed = PackedLinear(inputs, outputs, SCHEMES[name], device="cuda")
    packed.packed.random_(-(2**31), 2**31)
    packed.scale.uniform_(0.01, 0.02)
    ours = CudaLinear(packed, torch.bfloat16)
    calls: dict[str, Call] = {"bf16": lambda: torch.nn.functional.linear(x, weight), "qat": lambda: ours(x)}
    return calls | cuda_peers.calls(name, x, weight)


def cuda_timer(calls: dict[str, Call], rounds: int = 20) -> dict[str, float]:
    """Median seconds of each call as a CUDA graph, caches cold, in turns."""
    buffer = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    graphs = {name: _captured(call) for name, call in calls.items()}
    events = {name: [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)] for name in calls}
    for number in range(rounds):
        for name, graph in graphs.items():
            buffer.zero_()  # the host runs ahead meanwhile: the replay is in the queue when the buffer is done
            start, end = events[name][number]
            start.record()
            graph.replay()
            end.record()
    torch.cuda.synchronize()
    return {name: statistics.median(a.elapsed_time(b) for a, b in pairs) * 1e-3 for name, pairs in events.items()}


def _captured(call: Call) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def measured_card() -> Card:
    """Of the GPU at hand: a copy of 1 GiB, and products of 8192 x 8192 x 8192."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    b = torch.randint(-8, 8, (8192, 8192), device="cuda", dtype=torch.int8)
    calls: dict[str, Call] = {"copy": lambda: target.copy_(source), "bf16": lambda: a @ a}
    seconds = cuda_timer(calls | {"int8": lambda: torch._int_mm(b, b.T)})
    operations = 2 * 8192**3
    return Card(2 * source.nbytes / seconds["copy"], operations / seconds["bf16"], operations / seconds["int8"])


def show(rows: Sequence[Row], title: str) -> None:
    """Layers and variants by tokens: microseconds, fraction of the floor, times as fast as bfloat16."""
    table = Table(title=title)
    tokens = list(dict.fromkeys(r.tokens for r in rows))
    for column in ("layer", "variant", *(f"M={t}" for t in tokens)):
        table.add_column(column, justify="left" if column in ("layer", "variant") else "right")
    for layer, variant in dict.fromkeys((r.layer, r.variant) for r in rows):
        cells = {r.tokens: r for r in rows if (r.layer, r.variant) == (layer, variant)}
        shown = [
            f"{c.seconds * 1e6:.1f} {c.of_floor:.0%} {c.vs_bf16:.2f}x" if (c := cells.get(t)) else "-" for t in tokens
        ]
        table.add_row(layer, variant, *shown)
    Console(width=40 + 18 * len(tokens)).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", choices=LAYERS, default=list(LAYERS))
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES))
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/cuda_linear.json"))
    arguments = parser.parse_args()
    try:
        require_cuda(torch.device("cuda"))
    except ValueError as error:
        sys.exit(f"error: {error}")
    card = measured_card()
    torch.manual_seed(0)
    chosen = arguments.layers, arguments.tokens, arguments.schemes
    rows = list(measure(*chosen, card, cuda_variants, cuda_timer))
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    about = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "card": asdict(card)}
    left_out = cuda_peers.left_out()
    result = {**about, "left_out": left_out, "rows": [asdict(r) for r in rows]}
    arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    for name, reason in left_out.items():
        print(f"not measured: {name}: {reason}")
    peaks = f"{card.bandwidth / 1e12:.2f} TB/s, {card.bf16 / 1e12:.0f} TFLOP/s bf16, {card.int8 / 1e12:.0f} TOPS int8"
    show(rows, f"{about['gpu']}: {peaks}; microseconds, of floor, vs bf16")


if __name__ == "__main__":
    main()
