"""What each choice of scales costs before training: the KL divergence of the quantized model from the float one.

    python benchmarks/ranges.py                    # embedded model, 4 bits, groups of 128 and 32; minutes

The divergence KL(float || quantized), in millinats per token over the validation windows, is a hundred times less
noisy than a difference of losses, and blind to the first-order part of it, which any small change of a model that is
not at its optimum has.  Its standard error is over windows.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

from qat.calibration import RangeCalibration
from qat.data.documents import python_stdlib
from qat.data.language import LanguageData
from qat.data.windows import IGNORE
from qat.fake_quantizer import Stage, token_mask
from qat.insertion import insert, remove, set_stage
from qat.scheme import QuantSpec, uniform
from qat.tasks.models import load


def rules() -> Iterator[RangeCalibration]:
    yield RangeCalibration("absmax", weight="absmax")
    yield RangeCalibration("mse")
    yield RangeCalibration("mse, signed", signed=True)
    yield RangeCalibration("weighted mse, exponent 0.5, signed", importance=0.5, signed=True)
    yield RangeCalibration("weighted mse, exponent 0.75, signed", importance=0.75, signed=True)
    for power in (0.25, 0.5, 0.75, 1.0):
        yield RangeCalibration(f"weighted mse, exponent {power:g}", importance=power)


@torch.no_grad()
def divergence(model, reference: list[torch.Tensor], batches: list[dict]) -> tuple[float, float]:
    """Mean over windows of KL(reference || model), and its standard error, in millinats per token."""
    rows = []
    for before, batch in zip(reference, batches, strict=True):
        after = F.log_softmax(model(input_ids=batch["input_ids"], use_cache=False).logits, -1)
        known = batch["labels"] != IGNORE
        kl = (before.exp() * (before - after)).sum(-1) * known
        rows.append((kl.sum(1) / known.sum(1).clamp(min=1))[known.any(1)])
    values = 1e3 * torch.cat(rows).double()
    return float(values.mean()), float(values.std() / len(values) ** 0.5)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, nargs="+", default=[128, 32])
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/ranges.json"))
    arguments = parser.parse_args()
    model, tokenizer = load("stdlib_llama")
    model.eval()
    data = LanguageData(python_stdlib, "python_stdlib")
    data.tokenizer = tokenizer
    batches = list(data.val_dataloader())
    reference = [F.log_softmax(model(input_ids=b["input_ids"], use_cache=False).logits, -1) for b in batches]

    def run() -> None:
        for batch in data.calibration_dataloader():
            with token_mask(batch["attention_mask"]):
                model(input_ids=batch["input_ids"], use_cache=False)

    table, results = Table(title=f"{arguments.bits} bits: KL(float || quantized), millinats per token"), {}
    for column in ("scales", *(f"g{group}" for group in arguments.groups)):
        table.add_column(column, justify="left" if column == "scales" else "right")
    for rule in rules():
        row = []
        for group in arguments.groups:
            spec = QuantSpec(bits=arguments.bits, granularity="group", group_size=group)
            insert(model, uniform(spec, ignore=("*lm_head",)))
            rule(model, run)
            set_stage(model, Stage.FROZEN)
            mean, error = results[f"{rule.name}, g{group}"] = divergence(model, reference, batches)
            remove(model)
            row.append(f"{mean:.2f} ± {error:.2f}")
        table.add_row(rule.name, *row)
    Console().print(table)
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    facts = {"torch": torch.__version__, "corpus_digest": data.corpus_digest, "bits": arguments.bits}
    arguments.json.write_text(json.dumps({**facts, "mean_and_error": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
