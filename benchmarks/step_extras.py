"""What each addition to a training step costs, as a share of the step: health, damping, freezing, MSE scales.

    python benchmarks/step_extras.py                     # embedded model, 4,096 tokens a step

Seconds of one thread's CPU time, which neighbours on the machine disturb little; medians, the parts taking turns.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from train_step import batches, prepare, step

from qat.diagnosis.health import Health, gradient_ratio
from qat.estimators import STE
from qat.insertion import layers
from qat.training.oscillation import Freezing, damping_gradient


def parts(model: torch.nn.Module) -> dict[str, Callable[[], object]]:
    """What callbacks and estimators add to a step, by name."""
    quantized, health = list(layers(model).values()), Health()
    health.start(model)
    freezing = [Freezing(layer, 0.9, 0.01) for layer in quantized]
    mse = STE(follow="mse")
    scales = [(layer.matrix.detach(), layer.weight_quantizer.scale.detach()) for layer in quantized]
    return {
        "health, every step": lambda: health.step(model),
        "health, a look": lambda: (gradient_ratio(model), health.look(model)),
        "damping": lambda: [damping_gradient(layer) for layer in quantized],
        "freezing": lambda: [f.step() for f in freezing],
        "ste_mse": lambda: [mse.scale(w, s, quantized[0].weight_quantizer.spec) for w, s in scales],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/step_extras.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, optimizer, teacher = prepare("qat", 128, "cpu")
    timed = {"step": lambda: step(model, optimizer, teacher, batch), **parts(model)}
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for number, batch in enumerate(batches(arguments.rounds + 1, arguments.tokens, "cpu")):  # noqa: B007
        for name, part in timed.items():
            start = time.process_time()
            part()
            if number:  # the first round warms up
                seconds[name].append(time.process_time() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    table = Table(title=f"embedded model, {arguments.tokens} tokens a step, w4a16 g128, one thread")
    for column in ("part", "CPU ms (median)", "share of the step"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for name, value in medians.items():
        table.add_row(name, f"{1e3 * value:.2f}", f"{100 * value / medians['step']:.2f} %")
    Console().print(table)
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    facts = {"torch": torch.__version__, "tokens": arguments.tokens, "rounds": arguments.rounds}
    arguments.json.write_text(json.dumps({**facts, "cpu_seconds": medians}, indent=2) + "\n")


if __name__ == "__main__":
    main()
