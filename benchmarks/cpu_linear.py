"""Linear layers on a CPU: qat's kernels against torch's float and integer operators, side by side.

    python benchmarks/cpu_linear.py
    python benchmarks/cpu_linear.py --threads 1 --tokens 1 --rounds 31

All variants take turns in one process on the same input and the medians are reported, since machines are shared; in
an order that is drawn anew for each round, because a call is slower after one that has filled the caches.
qat's kernels read the exported bytes; torch's operators get the layouts that they ask for, made beforehand.
Inputs are bfloat16 but where the name says fp32.  Times are of whole calls, Python included.  On a machine that is
so busy that processes wait for a core, `--clock cpu` counts only the time on one; for one thread only.
"""

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

from qat.inference import PackedLinear
from qat.kernels import build, cpu
from qat.scheme import QuantScheme, QuantSpec

SHAPES = ((2048, 2048), (4096, 14336))  # inputs, outputs
GROUP = 128
INT8_INPUT = QuantSpec(bits=8, granularity="token", dynamic=True, absmax_rule="qmax")
INT4, INT8 = QuantSpec(bits=4, granularity="group", group_size=GROUP), QuantSpec(bits=8, granularity="channel")
SCHEMES = {
    "w4a16": QuantScheme(weight=INT4),
    "w4a8": QuantScheme(weight=INT4, input=INT8_INPUT),
    "w8a16": QuantScheme(weight=INT8),
    "w8a8": QuantScheme(weight=INT8, input=INT8_INPUT),
}
# How many tokens an operator is measured with at most: beyond, a call takes seconds and is far from the fastest.
MOST_TOKENS = {"int4pack fp32": 1, "int8pack fp32": 1, "int4pack bf16": 16, "int8pack bf16": 16}


def layer(scheme: QuantScheme, inputs: int, outputs: int) -> PackedLinear:
    """A packed layer with random codes, on qat's kernels."""
    new = PackedLinear(inputs, outputs, scheme)
    new.packed.random_(-(2**31), 2**31)
    new.scale.uniform_()
    new.backend = "cpu"
    return new


def on(kernels: cpu.Kernels, made: PackedLinear, x: torch.Tensor) -> torch.Tensor:
    """What `made` computes, by the kernels of another instruction set."""
    weight, bits = made.scheme.weight, made.scheme.input.bits if made.scheme.input else 0
    size = weight.group_size or made.in_features
    return cpu.packed_linear(x, made.packed, made.scale, None, None, weight.bits, size, bits, None, "qmax", use=kernels)


def variants(inputs: int, outputs: int, tokens: int) -> dict[str, Callable[[], torch.Tensor]]:
    """Calls by name; each returns (tokens, outputs)."""
    torch.manual_seed(0)
    x32 = torch.randn(tokens, inputs)
    x16 = x32.bfloat16()
    scale4, scale8 = torch.rand(outputs, inputs // GROUP).bfloat16(), torch.rand(outputs, 1).bfloat16()
    tiles = torch.randint(0, 256, (outputs, inputs // 2), dtype=torch.uint8)  # torch's order of some codes
    scale_and_zero = torch.stack([scale4.T, torch.zeros_like(scale4.T)], -1).contiguous()
    int8 = torch.randint(-128, 128, (outputs, inputs), dtype=torch.int8)
    w32 = torch.randn(outputs, inputs)
    w16 = w32.bfloat16()
    ours = {name: partial(layer(scheme, inputs, outputs), x16) for name, scheme in SCHEMES.items()}
    if cpu.kernels().isa == 2:
        avx2 = cpu.Kernels(build.load(), 1)
        ours |= {
            f"{name}, AVX2": partial(on, avx2, layer(scheme, inputs, outputs), x16) for name, scheme in SCHEMES.items()
        }
    int4pack = torch.ops.aten._weight_int4pack_mm_for_cpu
    calls: dict[str, Callable[[], torch.Tensor]] = {
        "fp32": partial(F.linear, x32, w32),
        "bf16": partial(F.linear, x16, w16),
        **ours,
        "int4pack bf16": partial(int4pack, x16, tiles, GROUP, scale_and_zero),
        "int4pack fp32": partial(int4pack, x32, tiles, GROUP, scale_and_zero.float()),
        "int8pack bf16": partial(torch._weight_int8pack_mm, x16, int8, scale8[:, 0]),
        "int8pack fp32": partial(torch._weight_int8pack_mm, x32, int8, scale8[:, 0].float()),
    }
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        prepacked = torch.ops.mkldnn._reorder_linear_weight(w16, tokens)
        calls["bf16 prepacked"] = partial(torch.ops.mkldnn._linear_pointwise, x16, prepacked, None, "none", [], "")
    return {name: call for name, call in calls.items() if tokens <= MOST_TOKENS.get(name, tokens)}


def medians(
    calls: dict[str, Callable[[], torch.Tensor]], rounds: int, seconds: float, clock: Callable[[], float]
) -> dict[str, float]:
    """Median seconds of each call, taken in turns until `rounds` or, after three, `seconds` are over."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    began, order, draw = time.perf_counter(), list(calls.items()), random.Random(0)
    for number in range(rounds + 1):
        draw.shuffle(order)
        for name, call in order:
            start = clock()
            call()
            if number:  # the first round warms up
                times[name].append(clock() - start)
        if number >= 3 and time.perf_counter() - began > seconds:
            break
    return {name: statistics.median(values) for name, values in times.items()}


def facts() -> dict[str, object]:
    """The processor, compiler and versions that a result belongs to."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    wanted = [flag for flag in flags if flag.startswith(("avx", "fma", "f16c", "amx"))]
    compiler = build.run([*build.compiler(), "--version"]).splitlines()[0]
    return {
        "processor": model or platform.processor(), "features": wanted, "isa": cpu.kernels().isa, "compiler": compiler,
        "compiler_flags": build.FLAGS, "torch": torch.__version__, "python": platform.python_version(),
        "group_size": GROUP,
    }  # fmt: skip


def show(console: Console, results: list[dict], threads: int) -> None:
    names = list(dict.fromkeys(name for r in results for name in r["seconds"]))
    table = Table(title=f"microseconds, median, {threads} thread{'s' * (threads > 1)}")
    for column in ("layer", "tokens", *names):
        table.add_column(column, justify="right")
    for r in results:
        best = min(r["seconds"].values())
        cells = [r["seconds"].get(name) for name in names]
        shown = ["-" if c is None else f"{'[bold]' * (c == best)}{c * 1e6:.0f}" for c in cells]
        table.add_row(f"{r['inputs']}→{r['outputs']}", str(r["tokens"]), *shown)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 128])
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--seconds", type=float, default=10, help="a row's budget, after three rounds (%(default)s)")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/cpu_linear.json"))
    arguments = parser.parse_args()
    if arguments.clock == "cpu" and arguments.threads != [1]:
        parser.error("--clock cpu adds up the time of all threads: use it with --threads 1")
    clock = time.perf_counter if arguments.clock == "wall" else time.process_time
    console, results = Console(width=160), []
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        rows = []
        for (inputs, outputs), tokens in ((s, t) for s in SHAPES for t in arguments.tokens):
            seconds = medians(variants(inputs, outputs, tokens), arguments.rounds, arguments.seconds, clock)
            rows.append(
                {"threads": threads, "inputs": inputs, "outputs": outputs, "tokens": tokens, "seconds": seconds}
            )
        show(console, rows, threads)
        results += rows
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps({**facts(), "clock": arguments.clock, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
