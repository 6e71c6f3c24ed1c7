"""Whether GPTQ passes through a model that does not fit into memory, killed half-way and resumed.

    python benchmarks/gptq_memory.py --folder /tmp/gptq       # 1B-shaped; takes long on two cores
    python benchmarks/gptq_memory.py --folder /tmp/gptq --hidden 512 --intermediate 2048 --layers 4 --no-limit

A random Llama of Llama-3.2-1B's shape is written in float32 (or found where an earlier call left it), loaded as
`model=hf` loads, and calibrated block by block with `calibration.offload=true`, in a child process.  The child is
killed when half of the blocks are finished, and started again; the second one says how many it found finished.

Two bounds are kept apart.  *private* is memory that the system cannot take back: its peak is sampled.  *mapped* are
pages of weight files, which it drops when it needs them.  Where a memory cgroup can be made (as root), the child runs
in one limited to 0.6 of the model's float32 bytes and one block in float32, page cache included: that it ends is the
proof.
"""

import argparse
import json
import multiprocessing
import os
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from qat.calibration import GPTQ
from qat.fake_quantizer import token_mask
from qat.insertion import insert
from qat.scheme import QuantSpec, uniform
from qat.tasks.models import check_finite

CGROUPS = Path("/sys/fs/cgroup/memory")
WEIGHT = QuantSpec(bits=4, granularity="group", group_size=128)


def write_model(folder: Path, arguments: argparse.Namespace) -> int:
    """A random Llama in float32; returns its parameters' number."""
    config = LlamaConfig(
        vocab_size=arguments.vocab, hidden_size=arguments.hidden, intermediate_size=arguments.intermediate,
        num_hidden_layers=arguments.layers, num_attention_heads=arguments.hidden // 64,
        num_key_value_heads=arguments.hidden // 256, tie_word_embeddings=True,
    )  # fmt: skip
    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    with torch.device("meta"):
        return sum(p.numel() for p in LlamaForCausalLM(config).parameters())


def calibrate(model_folder: Path, blocks: Path, arguments: argparse.Namespace, report) -> None:
    """In the child: load, insert, calibrate; says when it starts on its blocks and when it ends."""
    model = LlamaForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    check_finite(model)
    insert(model, uniform(WEIGHT, ignore=("*lm_head",)))
    generator = torch.Generator().manual_seed(0)
    shape = (arguments.batch, arguments.tokens)
    batches = [torch.randint(arguments.vocab, shape, generator=generator) for _ in range(arguments.batches)]

    def run() -> None:
        for batch in batches:
            with torch.no_grad(), token_mask(torch.ones_like(batch)):
                model(input_ids=batch, use_cache=False)

    start = time.perf_counter()
    GPTQ(offload=True)(model, run, blocks)
    report.put(time.perf_counter() - start)


@contextmanager
def limited(limit: int | None):
    """A memory cgroup of at most `limit` bytes, or None where none is asked for or can be made."""
    group = CGROUPS / f"qat-{os.getpid()}"
    if limit is None:
        yield None
        return
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(limit))
    except OSError:
        yield None
        return
    try:
        yield group
    finally:
        group.rmdir()


def status(pid: int) -> dict[str, int]:
    """Bytes by name, of the resident-set lines of /proc/PID/status; empty once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    fields = dict(line.split(":", 1) for line in lines)
    return {name: int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile") if name in fields}


def watched(model: Path, blocks: Path, arguments: argparse.Namespace, group: Path | None, kill_at: int | None) -> dict:
    """Run the child to its end, or kill it once `kill_at` blocks are finished."""
    context = multiprocessing.get_context("spawn")
    report = context.Queue()
    child = context.Process(target=calibrate, args=(model, blocks, arguments, report))
    found = len(list(blocks.glob("*.safetensors")))
    with open(model / "model.safetensors") as file:  # pages cached already would be counted for nobody
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    child.start()
    assert child.pid is not None
    if group is not None:
        (group / "cgroup.procs").write_text(str(child.pid))
    peak, start, killed = {"RssAnon": 0, "RssFile": 0}, time.perf_counter(), False
    while child.is_alive():
        peak = {name: max(value, status(child.pid).get(name, 0)) for name, value in peak.items()}
        if kill_at is not None and len(list(blocks.glob("*.safetensors"))) >= kill_at:
            os.kill(child.pid, signal.SIGKILL)
            killed = True
        child.join(0.05)
    if not killed and child.exitcode:
        why = " (killed: it needed more memory than its group may have)" if child.exitcode == -signal.SIGKILL else ""
        raise SystemExit(f"the calibration ended with exit code {child.exitcode}{why}")
    limit = int((group / "memory.max_usage_in_bytes").read_text()) if group is not None else None
    return {
        "killed": killed,
        "blocks_found": found,
        "blocks_finished": len(list(blocks.glob("*.safetensors"))),
        "private_peak": peak["RssAnon"],
        "mapped_peak": peak["RssFile"],
        "cgroup_peak": limit,
        "seconds": round(time.perf_counter() - start, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=8192)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--batch", type=int, default=2, help="sequences in a batch")
    parser.add_argument("--tokens", type=int, default=256, help="tokens in a sequence")
    parser.add_argument("--folder", type=Path, required=True, help="for the model and its blocks: 10 GB for 1B")
    parser.add_argument(
        "--no-limit", action="store_true", help="no memory cgroup: small shapes have no room for Python"
    )
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/gptq_memory.json"))
    arguments = parser.parse_args()
    shape = f"{arguments.hidden}-{arguments.intermediate}-{arguments.layers}-{arguments.vocab}"
    model, blocks = arguments.folder / f"model-{shape}", arguments.folder / f"blocks-{shape}"
    if list(blocks.glob("*.safetensors")):
        raise SystemExit(f"{blocks} holds finished blocks of an earlier call, which would be taken: remove it first")
    parameters = write_model(model, arguments)
    with torch.device("meta"):
        config = LlamaConfig.from_pretrained(model)
        block = sum(p.numel() for p in LlamaForCausalLM(config).model.layers[0].parameters())
    bound = int(4 * (0.6 * parameters + block))
    runs = []
    with limited(None if arguments.no_limit else bound) as group:
        for kill_at in (arguments.layers // 2, None):
            runs.append(watched(model, blocks, arguments, group, kill_at))
    tokens = arguments.batches * arguments.batch * arguments.tokens
    table = Table(title=f"{parameters / 1e9:.3f} B parameters, {tokens} calibration tokens; GB")
    for name in (
        "run",
        "float32 bytes",
        "bound",
        "private peak",
        "of float32",
        "mapped peak",
        "cgroup peak",
        "seconds",
    ):
        table.add_column(name, justify="right")
    for run in runs:
        ended = "killed" if run["killed"] else f"resumed at {run['blocks_found']}, ended"
        gigabytes = [f"{v / 1e9:.2f}" if v is not None else "" for v in
                     (4 * parameters, bound, run["private_peak"], run["mapped_peak"], run["cgroup_peak"])]  # fmt: skip
        share = f"{run['private_peak'] / (4 * parameters):.3f}"
        table.add_row(ended, *gigabytes[:3], share, *gigabytes[3:], f"{run['seconds']:.0f}")
    Console().print(table)
    result = {"parameters": parameters, "block": block, "bound_bytes": bound, "tokens": tokens, "runs": runs,
              "torch": torch.__version__}  # fmt: skip
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    temporary = arguments.json.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(temporary, arguments.json)


if __name__ == "__main__":
    main()
