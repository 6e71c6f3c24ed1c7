"""What each training method is worth: one factor at a time from the default recipe, at four schemes, in one table.

    python benchmarks/methods.py                                    # all of it; hours on two cores, resumable
    python benchmarks/methods.py --schemes w2-g64 --levers default "next token"
    python benchmarks/methods.py --seeds 0 1 2 --levers default torchao "torchao, distilled"

Every run trains the same float model on the same batches for as many steps, with 4 windows a step to be affordable; the
recipe itself, which has 16, is the lever "16 windows a step".  The learning rates of the default, of torchao's and
ModelOpt's QAT and of what has a grid of its own are chosen on the validation split with the first seed, by one rule:
further rates are tried until the best one has a worse one on both sides.  Other levers train at the default's rate.

Figures are losses on the test split, in millinats per token, with 95 % intervals over documents, paired.  Recovery over
control is (PTQ(control) - method) / (PTQ(control) - control): the control is the float model fine-tuned for as many
steps at the best of its own rates, with the first seed, and its PTQ the best one of GPTQ, AWQ before GPTQ and learned
rounding on the validation split.  Seconds and memory (by how much training raises the peak of its process; read from
Linux's /proc) are of training, without the calibration before it, which runs that start alike share.  `outliers` is
the outlier twin of `calibration.py`.

ModelOpt installs beside (`pip install nvidia-modelopt`); without it, leave its levers out by --levers.  Each run has a
process of its own, and every finished run is kept in the JSON file with all that it was run with, so an interrupted
benchmark goes on where it was.
"""

import argparse
import importlib.util
import itertools
import json
import os
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, astuple, dataclass, field, replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from calibration import MODELS, SCHEMES, isolated, outlier_twin
from rich.console import Console
from rich.table import Table

from qat.calibration import AWQ, CALIBRATIONS, GPTQ, Calibration, Reconstruction, Rotation
from qat.callbacks import Distillation, LoRA, Oscillation, QuantizationAwareTraining, ScalesOnly
from qat.callbacks.control import measure_control, weights_digest
from qat.callbacks.measure import Measure
from qat.data.documents import python_stdlib
from qat.data.language import LanguageData
from qat.estimators import DSQ, LSQ, SEQ, STE
from qat.evaluation import DocumentLosses, difference
from qat.evaluation.intervals import recovered
from qat.scheme import uniform
from qat.tasks.causal_lm import CausalLM
from qat.tasks.models import load

TRAINED = ("w4-g128", "w3-g128", "w2-g64", "w4a8-g128")
WINDOWS = 12  # of each held-out document: differences are a thousandth of the loss
ESTIMATORS = {
    "lsq": LSQ(),
    "lsq, log2": LSQ(relative=True),
    "dsq": DSQ(),
    "seq": SEQ(),
    "ste": STE(),
    "ste, absmax": STE(follow="absmax"),
}
STARTS: dict[str, Calibration] = {
    **CALIBRATIONS,
    "awq": AWQ(),
    "awq, gptq": AWQ("awq, gptq", then=GPTQ()),
    "rotation, gptq": Rotation("rotation, gptq"),
    "adaround": Reconstruction(),
    "block_ap": Reconstruction("block_ap", learn="weights", lr=1e-3),
}
LADDER = (3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
GRID = (1e-4, 3e-4, 1e-3)


@dataclass(frozen=True)
class Lever:
    """One way to train: what differs from the default recipe.

    Attributes:
        grid: learning rates to choose from, on `LADDER`, which is gone along while the best one is at an end; empty for
            the one that the default chose.
    """

    method: str = "qat"
    calibration: str = "gptq"
    estimator: str = "lsq"
    distillation: float = 1.0
    temperature: float = 1.0
    scale_lr: float | None = None
    trainable: str = "all"
    damping: float = 0.0
    freezing: float | None = None
    hidden: float = 0.0
    levels: str = "full"
    steps: int = 120
    batch: int = 4
    grid: tuple[float, ...] = field(default=())


LEVERS = {
    "default": Lever(grid=GRID),
    "torchao": Lever("torchao", distillation=0.0, grid=GRID),
    "torchao, distilled": Lever("torchao", grid=GRID),
    "ModelOpt": Lever("modelopt", distillation=0.0, grid=GRID),
    "ModelOpt, distilled": Lever("modelopt", grid=GRID),
    "next token": Lever(distillation=0.0, grid=GRID),
    "from MSE ranges": Lever(calibration="mse"),
    "from weighted MSE": Lever(calibration="weighted_mse"),
    "from AWQ": Lever(calibration="awq"),
    "from AWQ, then GPTQ": Lever(calibration="awq, gptq"),
    "from rotation, then GPTQ": Lever(calibration="rotation, gptq"),
    "from learned rounding": Lever(calibration="adaround"),
    "from Block-AP": Lever(calibration="block_ap"),
    "LSQ, log2 of scales": Lever(estimator="lsq, log2"),
    "DSQ": Lever(estimator="dsq"),
    "STE, calibrated scales": Lever(estimator="ste"),
    "STE, absmax each step": Lever(estimator="ste, absmax"),
    "2 bits without zero, LSQ": Lever(levels="odd"),
    "2 bits without zero, SEQ": Lever(levels="odd", estimator="seq"),
    "scale rate 1e-3": Lever(scale_lr=1e-3),
    "scale rate 1e-5": Lever(scale_lr=1e-5),
    "damping 1e-2": Lever(damping=1e-2),
    "freezing 0.02": Lever(freezing=0.02),
    "temperature 2": Lever(temperature=2.0),
    "LoRA, rank 16": Lever(trainable="lora", grid=(1e-3, 3e-3)),
    "scales only": Lever(trainable="scales", grid=(1e-4, 3e-4, 1e-3)),  # the rate is the scales'
    "hidden states 1": Lever(hidden=1.0),
    "hidden states 10": Lever(hidden=10.0),
    "hidden states 100": Lever(hidden=100.0),
    "hidden states 10, from learned rounding": Lever(hidden=10.0, calibration="adaround"),
    "hidden states 10, temperature 2, from learned rounding": Lever(
        hidden=10.0, temperature=2.0, calibration="adaround"
    ),
    "2 bits without zero, from learned rounding": Lever(levels="odd", calibration="adaround"),
    "2 bits without zero, hidden states 10, from learned rounding": Lever(
        levels="odd", hidden=10.0, calibration="adaround"
    ),
    "next token, hidden states 1": Lever(distillation=0.0, hidden=1.0),
    "480 steps": Lever(steps=480),
    "480 steps of 16 windows": Lever(steps=480, batch=16),
    "16 windows a step": Lever(batch=16),
}
CONTROL_GRID = (1e-5, 3e-5, 1e-4)


class TorchaoQAT(L.Callback):
    """torchao's fake quantization of the same layers, by its own API and defaults."""

    def __init__(self, scheme: str):
        self.weight, self.inputs = SCHEMES[scheme]

    def setup(self, trainer, pl_module, stage):
        from torchao.quantization import quantize_
        from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

        dtype = getattr(torch, f"int{self.weight.bits}")
        weight = IntxFakeQuantizeConfig(dtype, group_size=self.weight.group_size)
        inputs = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False) if self.inputs else None
        chosen = lambda m, name: isinstance(m, torch.nn.Linear) and not name.endswith("lm_head")  # noqa: E731
        config = QATConfig(weight_config=weight, activation_config=inputs, step="prepare")
        quantize_(pl_module.model, config, filter_fn=chosen)


class ModelOptQAT(L.Callback):
    """NVIDIA ModelOpt's fake quantization of the same layers: its own API, amax from its `max` calibration."""

    def __init__(self, scheme: str):
        self.weight, self.inputs = SCHEMES[scheme]

    def setup(self, trainer, pl_module, stage):
        import modelopt.torch.quantization as mtq

        weight = {"num_bits": self.weight.bits, "block_sizes": {-1: self.weight.group_size}, "enable": True}
        token = {"num_bits": 8, "type": "dynamic", "block_sizes": {-1: None, "type": "dynamic"}, "enable": True}
        rules = {
            "*weight_quantizer": weight,
            "*input_quantizer": token if self.inputs else {"enable": False},
            "*lm_head*": {"enable": False},
            "*output_quantizer": {"enable": False},
            "*bmm_quantizer": {"enable": False},
        }
        mtq.quantize(pl_module.model, {"quant_cfg": rules, "algorithm": "max"})


PEERS = {"torchao": TorchaoQAT, "modelopt": ModelOptQAT}


def float_model(kind: str) -> torch.nn.Module:
    model, _ = load("stdlib_llama")
    return outlier_twin(model) if kind == "outliers" else model


class Quantization(QuantizationAwareTraining):
    """Knows how long its calibration took, after which memory is looked at anew."""

    spent = 0.0

    def calibrate(self, *arguments, **named) -> None:
        start = time.perf_counter()
        super().calibrate(*arguments, **named)
        self.spent += time.perf_counter() - start
        forget_peak()


def forget_peak() -> None:
    """From here on, `peak_mb` is of what comes."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_mb() -> float:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def quantization(scheme: str, lever: Lever, lr: float, blocks: Path | None = None) -> Quantization:
    """`blocks` keeps what is calibrated, for others that start as this one does."""
    weight, inputs = SCHEMES[scheme]
    scales = lever.trainable == "scales"
    return Quantization(
        uniform(replace(weight, grid=lever.levels), inputs, ignore=("*lm_head",)),
        calibration=STARTS[lever.calibration],
        estimator=ESTIMATORS[lever.estimator],
        scale_lr=lr if scales else lever.scale_lr,
        freeze_share=0.0 if scales else 0.1,
        submodule="model",
        untie=lever.calibration.startswith("rotation"),
        calibration_folder=blocks,
    )


def language(seed: int, batch: int) -> LanguageData:
    data = LanguageData(python_stdlib, "python_stdlib", seed=seed, batch_size=batch, windows_per_document=WINDOWS)
    data.tokenizer = load("stdlib_llama")[1]
    return data


def trainer(steps: int, callbacks: Iterable[L.Callback]) -> L.Trainer:
    return L.Trainer(
        max_steps=steps, max_epochs=1, gradient_clip_val=1.0, callbacks=list(callbacks), logger=False,
        enable_checkpointing=False, enable_model_summary=False, limit_val_batches=0, num_sanity_val_steps=0,
    )  # fmt: skip


def plain(measured: dict[str, DocumentLosses]) -> dict[str, dict[str, list[float]]]:
    """As JSON has it."""
    fields = ("nll", "correct", "tokens")
    return {s: {k: np.round(getattr(m, k), 4).tolist() for k in fields} for s, m in measured.items()}


def trained(kind: str, scheme: str, lever: Lever, lr: float, seed: int, blocks: Path) -> dict[str, Any]:
    """Losses by document on both held-out splits after one training, its seconds, and by how much memory rose."""
    alike = (kind, scheme, lever.levels, lever.calibration, lever.estimator, lever.trainable, str(seed))
    blocks /= " ".join(alike).replace(" ", "-")
    L.seed_everything(seed, verbose=False)
    task = CausalLM(float_model(kind), lr=lr, weight_decay=0.0)
    data = language(seed, lever.batch)
    ours: Any = quantization(scheme, lever, lr, blocks) if lever.method == "qat" else None
    callbacks: list[L.Callback] = [Distillation(lever.distillation, lever.temperature, hidden=lever.hidden)]
    if lever.method in PEERS:
        callbacks.append(PEERS[lever.method](scheme))
    else:
        learn = {"all": [], "lora": [LoRA(r=16)], "scales": [ScalesOnly()]}[lever.trainable]
        callbacks += [ours, *learn, Oscillation(lever.damping, lever.freezing)]
    run = trainer(lever.steps, callbacks)
    forget_peak()
    before, start = peak_mb(), time.perf_counter()
    run.fit(task, data)
    seconds, after = time.perf_counter() - start - (ours.spent if ours else 0.0), peak_mb()
    run.datamodule = data
    found = {"losses": plain(Measure(run, task, ours)("trained"))}
    return found | {"seconds": round(seconds, 1), "memory_mb": round(after - before, 1)}


def control(kind: str, scheme: str | None, lr: float, seed: int, steps: int, batch: int) -> dict[str, Any]:
    """Losses of the control, or of its PTQ at `scheme`."""
    L.seed_everything(seed, verbose=False)
    task, data = CausalLM(float_model(kind), lr=lr, weight_decay=0.0), language(seed, batch)
    run = trainer(steps, [])
    run.fit(task, data)
    run.datamodule = data
    callback: Any = None if scheme is None else quantization(scheme, Lever(), lr)
    if callback is None:
        return {"losses": plain(Measure(run, task, callback)("control"))}
    measured = measure_control(task, run, callback, [STARTS[name] for name in ("gptq", "awq, gptq", "adaround")])
    return {"losses": plain(measured.ptq), "calibration": measured.calibration}


class Missing(Exception):
    """A run that is not finished, and shall not be run."""


class Runs:
    """Finished runs by what they were, in a JSON file; what is not there is run, or with `finished` Missing."""

    def __init__(self, path: Path, blocks: Path, threads: int, console: Console, finished: bool = False):
        self.path, self.blocks, self.threads, self.console, self.finished = path, blocks, threads, console, finished
        model = weights_digest(load("stdlib_llama")[0])
        self.state = json.loads(path.read_text()) if path.exists() else {"model": model, "runs": {}}
        if self.state["model"] != model:
            raise SystemExit(f"{path} holds runs of another float model: move it away, or choose another --json")

    def __call__(self, function: Any, name: str, facts: dict[str, Any], *arguments: Any) -> dict[str, Any]:
        runs = self.state["runs"]
        facts = json.loads(json.dumps(facts))  # lists, where the file has them
        if name in runs and runs[name]["facts"] != facts:
            raise SystemExit(f"{name!r} in {self.path} was run with other settings: {runs[name]['facts']}, now {facts}")
        if name not in runs and self.finished:
            raise Missing(name)
        if name not in runs:
            start = time.perf_counter()
            found = isolated(function, self.threads, *arguments)
            found["all_seconds"] = round(time.perf_counter() - start, 1)
            runs[name] = {"facts": facts, "threads": self.threads, "torch": torch.__version__, **found}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text(json.dumps(self.state) + "\n")
            os.replace(temporary, self.path)
            loss = {split: losses(runs[name], split).loss for split in ("validation", "test")}
            spent = runs[name]["all_seconds"]
            self.console.print(f"{name}, {spent} s: validation {loss['validation']:.5f}, test {loss['test']:.5f}")
        return runs[name]

    def lever(self, kind: str, scheme: str, name: str, lr: float, seed: int) -> dict[str, Any]:
        lever = LEVERS[name]
        facts = {k: v for k, v in asdict(lever).items() if k != "grid"}
        title = f"{kind} {scheme} {name} lr={lr:g} seed={seed}"
        return self(trained, title, facts, kind, scheme, replace(lever, grid=()), lr, seed, self.blocks)

    def best_rate(self, kind: str, scheme: str, name: str, seed: int) -> float:
        """Of the lever's grid, or of the default's, on the validation split."""
        grid = LEVERS[name].grid
        if not grid:
            return self.best_rate(kind, scheme, "default", seed)
        return best_on_ladder(grid, lambda lr: self.lever(kind, scheme, name, lr, seed))

    def control(self, kind: str, name: str, scheme: str | None, seed: int) -> dict[str, Any]:
        """The lever's control, or its PTQ at `scheme`, with the best of its rates."""
        lever = LEVERS[name]

        def run(scheme: str | None, lr: float) -> dict[str, Any]:
            title = f"{kind} control{', ' + scheme if scheme else ''} lr={lr:g} seed={seed} "
            title += f"{lever.steps} steps of {lever.batch}"
            return self(control, title, {}, kind, scheme, lr, seed, lever.steps, lever.batch)

        return run(scheme, best_on_ladder(CONTROL_GRID, lambda lr: run(None, lr)))


def best_on_ladder(grid: tuple[float, ...], run: Callable[[float], dict[str, Any]]) -> float:
    """The rate with the lowest validation loss, one that has been tried on both sides."""
    tried = {lr: losses(run(lr), "validation").loss for lr in grid}
    while True:
        best = min(tried, key=tried.__getitem__)
        at = LADDER.index(best)
        if not (beside := [lr for lr in LADDER[max(at - 1, 0) : at + 2] if lr not in tried]):
            return best
        tried |= {lr: losses(run(lr), "validation").loss for lr in beside}


def losses(run: dict[str, Any], split: str = "test") -> DocumentLosses:
    return DocumentLosses(**{k: np.asarray(v) for k, v in run["losses"][split].items()})


@dataclass(frozen=True)
class Row:
    """Of the table: means over seeds, with intervals over documents, of all seeds together."""

    lever: str
    lr: str = ""
    above_control: str = ""
    recovery: str = ""
    above_default: str = ""
    seconds: str = ""
    memory_mb: str = ""


def rows(names: list[str], runs: Runs, kind: str, scheme: str, seeds: list[int]) -> list[Row]:
    """PTQ of the default's control, and then every lever."""
    first = seeds[0]
    try:
        rate = runs.best_rate(kind, scheme, "default", first)
        default = pooled([losses(runs.lever(kind, scheme, "default", rate, s)) for s in seeds])
    except Missing:
        return []
    found = []
    for name in names:
        try:
            lr = runs.best_rate(kind, scheme, name, first)
            own = [runs.lever(kind, scheme, name, lr, s) for s in seeds]
            controls = [runs.control(kind, name, quantized, first) for quantized in (None, scheme)]
        except Missing:
            continue
        here = pooled(losses(r) for r in own)
        best, worst = (pooled([losses(run)] * len(seeds)) for run in controls)
        if not found:
            above = f"{1e3 * difference(worst, best).value:+.1f}"
            by = controls[1]["calibration"]
            found.append(Row(f"PTQ(control), by {by}", above_control=above, above_default=millinats(worst, default)))
        share = recovered(worst, here, best)
        found.append(
            Row(
                name,
                f"{lr:.0e}".replace("e-0", "e-"),
                f"{1e3 * difference(here, best).value:+.1f}",
                share.reason or f"{share.value:.2f} [{share.low:.2f}, {share.high:.2f}]",
                "" if name == "default" else millinats(here, default),
                f"{np.mean([r['seconds'] for r in own]):.0f}",
                f"{np.mean([r['memory_mb'] for r in own]):.0f}",
            )
        )
    return found


def millinats(one: DocumentLosses, other: DocumentLosses) -> str:
    gap = difference(one, other)
    return f"{1e3 * gap.value:+.1f} [{1e3 * gap.low:+.1f}, {1e3 * gap.high:+.1f}]"


def markdown(tables: dict[str, list[Row]]) -> str:
    """One table of all schemes: what the default reaches, and how far from it the others end."""
    by_name: dict[str, dict[str, Row]] = {}
    for title, table in tables.items():
        for line in table:
            name = "PTQ(control)" if line.lever.startswith("PTQ(control)") else line.lever
            by_name.setdefault(name, {})[title] = line
    lines = [["", *tables], ["---"] * (len(tables) + 1)]
    for name, found in by_name.items():
        cells = [found.get(title) for title in tables]
        if name == "default":
            lines.append(["default, above the control", *(c.above_control if c else "" for c in cells)])
            lines.append(["default, recovery over control", *(c.recovery if c else "" for c in cells)])
            lines.append(["default, rate", *(c.lr if c else "" for c in cells)])
            continue
        at = [f"{c.above_default}{f' at {c.lr}' if LEVERS[name].grid else ''}" if c and c.lr else "" for c in cells]
        lines.append([name, *(c.above_default if c and not c.lr else a for c, a in zip(cells, at, strict=True))])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def pooled(found: Iterable[DocumentLosses]) -> DocumentLosses:
    """One document's sums over all seeds."""
    every = list(found)
    return DocumentLosses(*(sum(getattr(m, k) for m in every) for k in ("nll", "correct", "tokens")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["plain"], choices=MODELS)
    parser.add_argument("--schemes", nargs="+", default=list(TRAINED), choices=TRAINED)
    parser.add_argument("--levers", nargs="+", default=list(LEVERS), choices=list(LEVERS), metavar="LEVER")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="the first one chooses the learning rates")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/methods.json"))
    parser.add_argument("--blocks", type=Path, default=Path("outputs/methods"), help="keeps what is calibrated")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of each run")
    parser.add_argument("--finished", action="store_true", help="run nothing: leave out what is not in the JSON file")
    parser.add_argument("--markdown", action="store_true", help="print all schemes as one table in Markdown, too")
    arguments = parser.parse_args()
    peers = {LEVERS[name].method for name in arguments.levers} & PEERS.keys()
    for missing in [m for m in peers if not arguments.finished and importlib.util.find_spec(m) is None]:
        parser.error(f"{missing} is not installed here: leave its levers out with --levers")
    torch.set_num_threads(1)  # a fork inherits no threads: the parent must not have started any
    console = Console(width=160)
    runs = Runs(arguments.json, arguments.blocks, arguments.threads, console, arguments.finished)
    tables = {}
    for kind, scheme in itertools.product(arguments.models, arguments.schemes):
        weight, inputs = SCHEMES[scheme]
        names = [
            name
            for name in arguments.levers
            # Rotation serves activations.
            if not ("rotation" in name and inputs is None) and not (name.startswith("2 bits") and weight.bits != 2)
        ]
        found = rows(names, runs, kind, scheme, arguments.seeds)
        tables[scheme if kind == "plain" else f"{scheme}, {kind}"] = found
        title = f"{kind}, {scheme}: test loss above the control's, millinats per token; seeds {arguments.seeds}"
        table = Table(title=title)
        for column in ("lever", "lr", "above control", "recovery over control", "above default", "s", "MB"):
            table.add_column(column, justify="left" if column == "lever" else "right")
        for line in found:
            table.add_row(*astuple(line))
        console.print(table)
    if arguments.markdown:
        print(markdown(tables))


if __name__ == "__main__":
    main()
