"""What training through the quantizer costs: step time and peak memory against plain fine-tuning and torchao's QAT.

`distilled` is `qat` whose loss is the divergence from the frozen float model instead of the next token's; its memory
counts the teacher.  `nested` is `qat` at 8, 4 and 2 bits of the same codes, backward once a width.

    python benchmarks/train_step.py                      # embedded model, 4,096 tokens a step
    python benchmarks/train_step.py --rounds 3 --group-size 32

Times: the variants take turns (plain, qat, torchao, plain, ...) in one process on the same batches, and the
ratio of the medians is reported, since the machine is shared.  Memory: the most that torch's allocator held above the
loaded model in two steps of a model of its own, which is exact and repeats to the byte (resident memory, which the
system rounds and reuses, varies by 2 %).  torchao is left out where it is not installed.
"""

import argparse
import copy
import itertools
import json
import statistics
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from qat.insertion import at_width, widths
from qat.training import divergence

VARIANTS = ("plain", "qat", "torchao", "distilled", "nested")


def prepare(variant: str, group_size: int, device: str):
    """A fresh embedded model, prepared for `variant`, its optimizer, and its teacher if it has one."""
    from qat.calibration import CALIBRATIONS
    from qat.fake_quantizer import Stage
    from qat.insertion import insert, set_stage
    from qat.scheme import QuantSpec, uniform
    from qat.tasks.models import load
    from qat.training import parameter_groups

    model = load("stdlib_llama")[0].to(device).train()
    if variant == "torchao":
        from torchao.quantization import quantize_
        from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

        weight = IntxFakeQuantizeConfig(torch.int4, group_size=group_size)
        quantize_(model, QATConfig(weight_config=weight, step="prepare"), filter_fn=_not_the_head)
    teacher = copy.deepcopy(model).eval() if variant == "distilled" else None
    if variant in ("qat", "distilled", "nested"):
        bits, nested = (8, (4, 2)) if variant == "nested" else (4, ())
        spec = QuantSpec(bits=bits, nested=nested, granularity="group", group_size=group_size)
        insert(model, uniform(spec, ignore=("*lm_head",)))
        CALIBRATIONS["absmax"](model, lambda: None)
        set_stage(model, Stage.TRAIN)
    groups = parameter_groups(model, lr=1e-4, scale_lr=1e-5)
    return model, torch.optim.AdamW(groups, fused=True), teacher


def _not_the_head(module: torch.nn.Module, name: str) -> bool:
    return isinstance(module, torch.nn.Linear) and not name.endswith("lm_head")


def step(model, optimizer, teacher, batch: torch.Tensor) -> None:
    for bits in widths(model) or (None,):
        with nullcontext() if bits is None else at_width(model, bits):
            backward(model, teacher, batch)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def backward(model, teacher, batch: torch.Tensor) -> None:
    logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    if teacher is None:
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
    else:
        with torch.no_grad():
            target = teacher(input_ids=batch[:, :-1], use_cache=False).logits
        loss = divergence(logits, target)
        del target
    loss.backward()


def batches(count: int, tokens: int, device: str) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(6, 2048, (tokens // 256, 257), generator=generator).to(device) for _ in range(count)]


def times(variants: list[str], arguments: argparse.Namespace) -> dict[str, list[float]]:
    prepared = {v: prepare(v, arguments.group_size, arguments.device) for v in variants}
    data = batches(arguments.rounds + 1, arguments.tokens, arguments.device)
    measured: dict[str, list[float]] = {v: [] for v in variants}
    for number, batch in enumerate(track(data, "rounds", transient=True)):
        for variant in variants:
            start = time.perf_counter()
            step(*prepared[variant], batch)
            if arguments.device != "cpu":
                torch.cuda.synchronize()
            if number:  # the first round warms up
                measured[variant].append(time.perf_counter() - start)
    return measured


def peak_memory(variant: str, arguments: argparse.Namespace) -> int:
    """Bytes that torch's allocator held above the loaded model at the worst moment of two steps."""
    prepared = prepare(variant, arguments.group_size, arguments.device)
    taught = sum(p.nbytes for p in prepared[2].parameters()) if prepared[2] is not None else 0
    data = batches(2, arguments.tokens, arguments.device)
    if arguments.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for batch in data:
            step(*prepared, batch)
        return torch.cuda.max_memory_allocated() - before + taught
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        for batch in data:
            step(*prepared, batch)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(trace))
        events = [e for e in json.loads(trace.read_text())["traceEvents"] if e["name"] == "[memory]"]
    changes = [e["args"]["Bytes"] for e in sorted(events, key=lambda e: e["ts"])]
    return max(itertools.accumulate(changes)) + taught


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/train_step.json"))
    arguments = parser.parse_args()
    variants = list(VARIANTS)
    try:
        import torchao
    except ImportError:
        torchao = None
        variants.remove("torchao")
    seconds = {v: statistics.median(t) for v, t in times(variants, arguments).items()}
    memory = {v: peak_memory(v, arguments) for v in track(variants, "memory", transient=True)}

    table = Table(title=f"embedded model, {arguments.tokens} tokens a step, w4a16 g{arguments.group_size}")
    for column in ("training", "s/step (median)", "ratio", "peak MB", "ratio"):
        table.add_column(column, justify="left" if column == "training" else "right")
    for v in variants:
        table.add_row(
            v,
            f"{seconds[v]:.3f}",
            f"{seconds[v] / seconds['plain']:.3f}",
            f"{memory[v] / 1e6:.0f}",
            f"{memory[v] / memory['plain']:.3f}",
        )
    Console().print(table)
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    facts = {"device": arguments.device, "threads": torch.get_num_threads(), "torch": torch.__version__}
    facts |= {"torchao": getattr(torchao, "__version__", None), "tokens": arguments.tokens, "rounds": arguments.rounds}
    arguments.json.write_text(
        json.dumps({**facts, "group_size": arguments.group_size, "seconds": seconds, "peak_bytes": memory}, indent=2)
        + "\n"
    )


if __name__ == "__main__":
    main()
