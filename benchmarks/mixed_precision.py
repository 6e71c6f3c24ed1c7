"""A width for each layer, against one width for all, at equal bytes, without training.

    python benchmarks/mixed_precision.py

The embedded model, GPTQ, groups of 128.  At the bytes of uniform 4-bit and of uniform 3-bit weights (4.125 and 3.125
bits a weight with their scales): one width for all; a greedy choice by sensitivity alone (from the smallest width, the
group that costs most gets the next width while that fits, whatever it weighs); and the integer programme on the KL
divergence, on the rise of the loss, and on the Fisher estimate.  Every model is quantized whole by GPTQ, once for each
seed, which draws its calibration windows, and measured on the test split: KL(float || quantized) and the loss.  Each is
compared with the programme that minimises it.  Differences are paired, with 95 % intervals over documents, all seeds
together.  Every finished model is kept in the JSON file.
"""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from calibration import by_document_sums, calibration_batches, interval, language
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

from qat.calibration import GPTQ
from qat.data.language import LanguageData
from qat.data.windows import IGNORE
from qat.diagnosis import Group, WidthSearch, assign, measure
from qat.diagnosis.widths import Table as Costs
from qat.fake_quantizer import Stage, token_mask
from qat.insertion import insert, set_stage
from qat.scheme import SchemeMap
from qat.tasks.causal_lm import CausalLM
from qat.tasks.models import load

UNIFORM = (4, 3)
COMPARED = ("kl", "loss")


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


class Measured:
    """Quantized models against the float one on the test split: sums by document of KL and of the loss above float."""

    def __init__(self, data: LanguageData, test: LanguageData):
        self.data, self.batches = data, list(test.test_dataloader())
        # float16 keeps the logarithms of 2,048 probabilities to 0.001, and 400 MB instead of 800
        self.reference = [self._logs(self._model(), batch).half() for batch in self.batches]

    @staticmethod
    def _model() -> torch.nn.Module:
        return load("stdlib_llama")[0].eval()

    @staticmethod
    @torch.no_grad()
    def _logs(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return F.log_softmax(model(input_ids=batch["input_ids"], use_cache=False).logits, -1)

    def __call__(self, schemes: SchemeMap, seed: int) -> dict[str, list[float]]:
        """`kl`, `loss` (nats) and `tokens`, each by document."""
        model, batches = self._model(), calibration_batches(self.data, seed)
        insert(model, schemes)

        @torch.no_grad()
        def run() -> None:
            for batch in batches:
                with token_mask(batch["attention_mask"]):
                    model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)

        GPTQ()(model, run)
        set_stage(model, Stage.FROZEN)
        rows: dict[str, list[Any]] = {"kl": [], "loss": []}
        for batch, reference in zip(self.batches, self.reference, strict=True):
            ours, float_, known = self._logs(model, batch), reference.float(), batch["labels"] != IGNORE
            kl = (float_.exp() * (float_ - ours)).sum(-1) * known
            label = batch["labels"].clamp(min=0)[..., None]
            rise = (float_ - ours).gather(-1, label)[..., 0] * known
            for name, values in (("kl", kl), ("loss", rise)):
                rows[name].append((values.sum(1), known.sum(1), batch["document"]))
        (kl, tokens), (loss, _) = (by_document_sums(rows[name]) for name in ("kl", "loss"))
        return {"kl": kl.tolist(), "loss": loss.tolist(), "tokens": tokens.tolist()}


def assignments(groups: list[Group], rows: list[dict], bits: int) -> dict[str, dict[str, int]]:
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


def text(sums: list[dict[str, list[float]]], name: str, minus: list[dict[str, list[float]]] | None = None) -> str:
    """Millinats per token and their interval, all seeds together; of a difference, where there is another model."""
    values, tokens = (sum(np.array(s[key]) for s in sums) for key in (name, "tokens"))
    if minus is not None:
        values = values - sum(np.array(s[name]) for s in minus)
    value, low, high = interval(values, tokens)
    return f"{value:+.2f} [{low:+.2f}, {high:+.2f}]"


def kept(path: Path, facts: dict[str, Any]) -> tuple[dict[str, Any], Callable[[], None]]:
    """What the file holds, where it was made with `facts`, and what writes it, atomically."""
    state = json.loads(path.read_text()) if path.exists() else {"facts": facts, "models": {}}
    if state["facts"] != facts:
        raise SystemExit(f"{path} was made with {state['facts']}, not {facts}: move it away, or choose another --json")

    def write() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(state, indent=1) + "\n")
        os.replace(temporary, path)

    return state, write


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=64, help="of the calibration split, for the sensitivities")
    parser.add_argument("--test-windows", type=int, default=8, help="of each test document")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the calibration windows")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/mixed_precision.json"))
    arguments = parser.parse_args()
    torch.set_flush_denormal(True)
    facts = {"torch": torch.__version__, "windows": arguments.windows, "test_windows": arguments.test_windows}
    state, write = kept(arguments.json, facts)
    model, tokenizer = load("stdlib_llama")
    task, data = CausalLM(model, lr=0.0).eval(), language()
    test = LanguageData(data.documents, "python_stdlib", windows_per_document=arguments.test_windows)
    test.tokenizer = tokenizer
    search = WidthSearch(budget_bits=4.125, ignore=["*lm_head"], windows=arguments.windows)
    groups = search.groups(model)
    if "rows" not in state:
        at = Path("outputs/mixed_precision/sensitivity.json")
        found = measure(model, search, calibration_batches(data, 0), task, at, f"seed 0, {facts}")
        state["rows"] = found["rows"]
        write()
    measured = Measured(data, test)

    def model_of(widths: dict[str, int], seed: int) -> dict[str, list[float]]:
        key = f"{','.join(str(widths[g.name]) for g in groups)} seed={seed}"
        if key not in state["models"]:
            by_layer = {layer: widths[g.name] for g in groups for layer in g.layers}
            state["models"][key] = measured(search.mixed(by_layer), seed)
            write()
        return state["models"][key]

    table = Table(title=f"GPTQ g128, test split, millinats per token, calibration seeds {arguments.seeds}")
    against = [f"programme, {kind} - this, {kind}" for kind in COMPARED]
    for column in ("bits a weight", "widths", *COMPARED, *against):
        table.add_column(column, justify="left" if column == "widths" else "right")
    for bits in UNIFORM:
        tried = assignments(groups, state["rows"], bits)
        best = {k: [model_of(tried[f"programme, {k}"], seed) for seed in arguments.seeds] for k in COMPARED}
        for name, widths in tried.items():
            sums = [model_of(widths, seed) for seed in arguments.seeds]
            size = sum(g.bytes[widths[g.name]] for g in groups)
            cells = [text(sums, kind) for kind in COMPARED]
            cells += ["" if name == f"programme, {k}" else text(best[k], k, sums) for k in COMPARED]
            table.add_row(f"{8 * size / sum(g.weights for g in groups):.3f}", name, *cells)
            Console(width=160).print(bits, name, list(widths.values()), *cells)
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
