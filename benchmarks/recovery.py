"""Accuracy of INT4 training against torchao's QAT: same float model, batches, steps, schedule and lr grid.

    python benchmarks/recovery.py                       # g128 and g32, three seeds; hours on two cores, resumable
    python benchmarks/recovery.py --groups 128 --seeds 0 --scale-lr 3e-5    # one row; other settings add runs

For each method the learning rate is chosen on the validation split with the first group size and seed, and kept for
the others.  Figures are losses on the test split in nats per token; differences are paired over documents, and more
windows of each document are measured than a run measures, since the differences are a thousandth of the loss.
Every finished run is kept in the JSON file, so an interrupted benchmark goes on where it was.
"""

import argparse
import json
import os
from pathlib import Path

import lightning as L
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from qat.calibration import CALIBRATIONS
from qat.callbacks import Distillation, QuantizationAwareTraining
from qat.callbacks.control import weights_digest
from qat.callbacks.measure import Measure
from qat.data.documents import python_stdlib
from qat.data.language import LanguageData
from qat.estimators import LSQ, STE
from qat.evaluation import DocumentLosses, difference
from qat.scheme import QuantSpec, uniform
from qat.tasks.causal_lm import CausalLM
from qat.tasks.models import load

ESTIMATORS = {"lsq": LSQ(), "ste": STE(), "follow": STE(follow="absmax")}
WINDOWS = 12


class TorchaoQAT(L.Callback):
    """torchao's fake quantization of the same layers, by its own API and defaults."""

    def __init__(self, group_size: int):
        self.group_size = group_size

    def setup(self, trainer, pl_module, stage):
        from torchao.quantization import quantize_
        from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

        weight = IntxFakeQuantizeConfig(torch.int4, group_size=self.group_size)
        chosen = lambda m, name: isinstance(m, torch.nn.Linear) and not name.endswith("lm_head")  # noqa: E731
        quantize_(pl_module.model, QATConfig(weight_config=weight, step="prepare"), filter_fn=chosen)


def ours(group_size: int, arguments: argparse.Namespace) -> QuantizationAwareTraining:
    schemes = uniform(QuantSpec(bits=4, granularity="group", group_size=group_size), ignore=("*lm_head",))
    return QuantizationAwareTraining(
        schemes,
        calibration=CALIBRATIONS[arguments.calibration],
        estimator=ESTIMATORS[arguments.estimator],
        scale_lr=arguments.scale_lr,
        submodule="model",
    )


def train(method: str, group_size: int, lr: float, seed: int, arguments: argparse.Namespace) -> dict:
    """One run: losses by document on both held-out splits."""
    L.seed_everything(seed, verbose=False)
    model, tokenizer = load("stdlib_llama")
    task = CausalLM(model, lr=lr, weight_decay=0.0)
    data = LanguageData(python_stdlib, "python_stdlib", seed=seed, windows_per_document=WINDOWS)
    data.tokenizer = tokenizer
    callback = ours(group_size, arguments) if method == "qat" else TorchaoQAT(group_size)
    trainer = L.Trainer(
        max_steps=arguments.steps,
        max_epochs=1,
        gradient_clip_val=1.0,
        callbacks=[Distillation(arguments.distillation), callback],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        limit_val_batches=0,
        num_sanity_val_steps=0,
    )
    trainer.fit(task, data)
    trainer.datamodule = data
    measured = Measure(trainer, task, callback)(f"{method} g{group_size}")
    return {split: {k: getattr(m, k).tolist() for k in ("nll", "correct", "tokens")} for split, m in measured.items()}


def losses(run: dict, split: str) -> DocumentLosses:
    return DocumentLosses(**{k: np.asarray(v) for k, v in run[split].items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-4, 3e-4, 1e-3])
    parser.add_argument("--scale-lr", type=float, default=1e-4)
    parser.add_argument("--calibration", default="weighted_mse", choices=list(CALIBRATIONS))
    parser.add_argument(
        "--estimator", default="lsq", choices=list(ESTIMATORS),
        help="ste keeps the calibrated scales, follow recomputes absmax every step",
    )  # fmt: skip
    parser.add_argument(
        "--distillation", type=float, default=0.0, help="share of KL(float || quantized) in the loss, for both methods"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--groups", type=int, nargs="+", default=[128, 32])
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/recovery.json"))
    arguments = parser.parse_args()
    import torchao  # noqa: F401  a run of ours takes minutes: say now what is missing

    torch.set_flush_denormal(True)
    console = Console()
    model = weights_digest(load("stdlib_llama")[0])
    state = json.loads(arguments.json.read_text()) if arguments.json.exists() else {"model": model, "runs": {}}
    if state.get("model") != model:
        parser.error(f"{arguments.json} holds runs of another float model: move it away, or choose another --json")

    def run(method: str, group: int, lr: float, seed: int) -> dict:
        tuned = (
            f" {arguments.estimator} scale_lr={arguments.scale_lr:g} {arguments.calibration}" if method == "qat" else ""
        )
        taught = f" distillation={arguments.distillation:g}" if arguments.distillation else ""
        key = f"{method} g{group} lr={lr:g} seed={seed} steps={arguments.steps}{tuned}{taught}"
        if key not in state["runs"]:
            state["runs"][key] = train(method, group, lr, seed, arguments)
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            temporary = arguments.json.with_suffix(".tmp")
            temporary.write_text(json.dumps(state))
            os.replace(temporary, arguments.json)
        loss = {split: losses(state["runs"][key], split).loss for split in ("validation", "test")}
        console.print(f"{key}: validation {loss['validation']:.5f}, test {loss['test']:.5f}")
        return state["runs"][key]

    objective = f", distillation {arguments.distillation:g}" if arguments.distillation else ""
    table = Table(title=f"w4a16, {arguments.steps} steps{objective}, lr from {arguments.lr}, test split")
    for column in ("group", "seed", "lr qat", "lr torchao", "qat", "torchao", "qat - torchao, millinats", "95 %"):
        table.add_column(column, justify="right")
    gaps: dict[int, list[float]] = {}
    best = {}
    for method in ("qat", "torchao"):
        first = arguments.groups[0], arguments.seeds[0]
        tried = {lr: losses(run(method, first[0], lr, first[1]), "validation").loss for lr in arguments.lr}
        best[method] = min(tried, key=tried.__getitem__)
    for group in arguments.groups:
        for seed in arguments.seeds:
            a, b = (losses(run(m, group, best[m], seed), "test") for m in ("qat", "torchao"))
            gap = difference(a, b)
            gaps.setdefault(group, []).append(gap.value)
            row = (f"{1e3 * gap.value:+.2f}", f"{1e3 * gap.low:+.2f} to {1e3 * gap.high:+.2f}")
            rates = (f"{best['qat']:g}", f"{best['torchao']:g}")
            table.add_row(f"g{group}", str(seed), *rates, f"{a.loss:.5f}", f"{b.loss:.5f}", *row)
    console.print(table)
    means = {f"g{group}": 1e3 * sum(values) / len(values) for group, values in gaps.items()}
    means["all"] = sum(means.values()) / len(means)
    console.print("mean difference, millinats (below 0: qat is better):", {k: round(v, 2) for k, v in means.items()})


if __name__ == "__main__":
    main()
