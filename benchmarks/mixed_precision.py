"""A width for each layer, against one width for all, at equal bytes, without training.

    python benchmarks/mixed_precision.py

The embedded model, GPTQ, groups of 128.  At the bytes of uniform 4-bit and of uniform 3-bit weights (4.125 and 3.125
bits a weight with their scales): one width for all; a greedy choice by sensitivity alone (from the smallest width, the
group that costs most gets the next width while that fits, whatever it weighs); and the integer programme on the KL
divergence, on the rise of the loss, and on the Fisher estimate.  Every model is quantized whole by GPTQ and measured on
the test split; differences are paired, with 95 % intervals over documents.
"""

import argparse
import functools
import json
import os
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from qat.calibration import GPTQ
from qat.data.documents import python_stdlib
from qat.data.language import LanguageData
from qat.diagnosis import Group, WidthSearch, assign, measure
from qat.diagnosis.widths import Table as Costs
from qat.evaluation import DocumentLosses, difference, evaluate
from qat.fake_quantizer import Stage, token_mask
from qat.insertion import insert, set_stage
from qat.scheme import SchemeMap
from qat.tasks.causal_lm import CausalLM
from qat.tasks.models import load

UNIFORM = (4, 3)


def data_of(tokenizer, windows: int) -> LanguageData:
    data = LanguageData(python_stdlib, "python_stdlib", windows_per_document=windows)
    data.tokenizer = tokenizer
    return data


def greedy(costs: Costs, sizes: Costs, budget: int) -> dict[str, int]:
    """By sensitivity alone: the group that costs most gets the next width, as long as any of them fits."""
    chosen = {group: min(by_width) for group, by_width in costs.items()}
    while True:
        used = sum(sizes[g][b] for g, b in chosen.items())
        for group in sorted(chosen, key=lambda g: -costs[g][chosen[g]]):
            wider = [b for b in costs[group] if b > chosen[group]]
            if wider and used - sizes[group][chosen[group]] + sizes[group][min(wider)] <= budget:
                chosen[group] = min(wider)
                break
        else:
            return chosen


def quantized_losses(schemes: SchemeMap | None, data: LanguageData) -> DocumentLosses:
    """Losses on the test split after GPTQ by `schemes`; of the float model where that is None."""
    model, _ = load("stdlib_llama")
    task = CausalLM(model.eval(), lr=0.0).eval()
    if schemes is not None:
        insert(model, schemes)

        @torch.no_grad()
        def run() -> None:
            for batch in data.calibration_dataloader():
                with token_mask(batch["attention_mask"]):
                    task(batch)

        GPTQ()(model, run)
        set_stage(model, Stage.FROZEN)
    return evaluate(task, data.test_dataloader(), losses=lambda module, batch: module.losses(batch))


def assignments(search: WidthSearch, groups: list[Group], rows: list[dict], bits: int) -> dict[str, dict[str, int]]:
    """Widths by group, of everything that is compared at the bytes of uniform `bits`."""
    sizes = {group.name: group.bytes for group in groups}
    costs: dict[str, dict[str, dict[int, float]]] = {k: {g: {} for g in sizes} for k in ("kl", "loss", "fisher")}
    for row in rows:
        for kind, by_group in costs.items():
            by_group[row["name"]][row["bits"]] = row[kind]
    budget = sum(size[bits] for size in sizes.values())
    return {
        "uniform": dict.fromkeys(sizes, bits),
        "greedy": greedy(costs["kl"], sizes, budget),
        **{f"programme, {kind}": assign(by_group, sizes, budget) for kind, by_group in costs.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=32, help="of the calibration split, for the sensitivities")
    parser.add_argument("--test-windows", type=int, default=4, help="of each test document")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/mixed_precision.json"))
    arguments = parser.parse_args()
    model, tokenizer = load("stdlib_llama")
    task, data = CausalLM(model, lr=0.0).eval(), data_of(tokenizer, arguments.test_windows)
    search = WidthSearch(budget_bits=4.125, ignore=["*lm_head"], windows=arguments.windows)
    groups, kept = search.groups(model), Path("outputs/mixed_precision/sensitivity.json")
    key = f"{arguments.windows} windows, torch {torch.__version__}"
    rows = measure(model, search, list(data.calibration_dataloader()), task, kept, key)["rows"]
    result: dict = {"torch": torch.__version__, "windows": arguments.windows, "rows": rows, "models": []}
    result["float_loss"] = quantized_losses(None, data).loss
    measured = functools.cache(lambda widths: quantized_losses(search.mixed(dict(widths)), data))
    sizes, table = {group.name: group.bytes for group in groups}, Table(title="GPTQ g128, test split")
    for column in ("bits a weight", "widths", "KB", "predicted KL", "loss - float", "programme (kl) - this"):
        table.add_column(column, justify="left" if column == "widths" else "right")
    for bits in UNIFORM:
        tried = assignments(search, groups, rows, bits)
        by_layer = {n: tuple((la, w[g.name]) for g in groups for la in g.layers) for n, w in tried.items()}
        best = measured(by_layer["programme, kl"])
        for name, widths in tried.items():
            losses, size = measured(by_layer[name]), sum(sizes[g][b] for g, b in widths.items())
            gap = difference(best, losses)
            predicted = sum(r["kl"] for r in rows if widths[r["name"]] == r["bits"])
            entry = {"name": name, "uniform_bits": bits, "widths": widths, "bytes": size, "predicted_kl": predicted}
            entry |= {"loss": losses.loss, "programme_minus_this": gap.value, "interval": gap.interval}
            result["models"].append(entry)
            cost, (low, high) = 1e3 * (losses.loss - result["float_loss"]), gap.interval or (0.0, 0.0)
            table.add_row(
                f"{8 * size / sum(g.weights for g in groups):.3f}", name, f"{size / 1e3:.1f}", f"{1e3 * predicted:.1f}",
                f"{cost:+.2f}", f"{1e3 * (gap.value or 0):+.2f} [{1e3 * low:+.2f}, {1e3 * high:+.2f}]",
            )  # fmt: skip
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    temporary = arguments.json.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(temporary, arguments.json)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
