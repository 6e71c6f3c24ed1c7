"""What each calibration costs and saves, without training: all methods on one model, at six schemes, in one table.

    python benchmarks/calibration.py                      # all of it; hours on two cores, resumable
    python benchmarks/calibration.py --schemes w4-g128 --methods mse gptq --seeds 0 --models plain

Per method and scheme: KL(float || quantized) over the validation windows, and the loss difference to float over the
test documents, both in millinats per token with a 95 % interval (bootstrap over documents); seconds; and by how much
calibrating raised the peak memory of its process.  A calibration seed draws other windows of the calibration split;
methods that look at weights alone are run with the first seed only, and observers of inputs on the static scheme only.

`outliers` is the outlier twin of the embedded model: the same function, but 1 in 32 of the gains of every norm
multiplied by 10 to 100 and the columns after it divided, so that activations have the outliers of large models.  Every
finished cell is kept in the JSON file, so an interrupted benchmark goes on where it was.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

from qat.calibration import AWQ, CALIBRATIONS, GPTQ, RangeCalibration, Reconstruction, Rotation, SmoothQuant
from qat.calibration.llama_like import find_pairs
from qat.calibration.ranges import OBSERVERS
from qat.data.documents import python_stdlib
from qat.data.language import LanguageData
from qat.data.windows import IGNORE
from qat.fake_quantizer import Stage, token_mask
from qat.insertion import insert, set_stage
from qat.scheme import QuantSpec, uniform
from qat.structure import untie
from qat.tasks.models import load

MSE = RangeCalibration("mse")
INPUTS = {f"mse, {name} inputs": RangeCalibration(name, input=name) for name in OBSERVERS if name != "mse"}
METHODS = {
    **CALIBRATIONS,
    **INPUTS,
    "gptq": GPTQ(),
    "gptq, weighted": GPTQ("gptq, weighted", ranges=RangeCalibration("weighted_mse", importance=0.5)),
    "gptq, block": GPTQ("gptq, block", sequential="block"),
    "gptq, float inputs": GPTQ("gptq, float inputs", sequential="none"),
    "gptq, in order": GPTQ("gptq, in order", act_order=False),
    "awq": AWQ(),
    "awq, gptq": AWQ("awq, gptq", then=GPTQ()),
    "smoothquant": SmoothQuant(),
    "smoothquant, gptq": SmoothQuant("smoothquant, gptq", then=GPTQ()),
    "rotation, mse": Rotation("rotation, mse", then=MSE),
    "rotation, gptq": Rotation("rotation, gptq"),
    "adaround": Reconstruction(),
    "block ap": Reconstruction("block ap", learn="weights", lr=1e-3),
}
WEIGHTS_ALONE = {"absmax", "mse", "rotation, mse"}  # inputs are scaled by token, as they come: no data enters
INT8_INPUT = QuantSpec(bits=8, granularity="token", dynamic=True, absmax_rule="qmax")
SCHEMES = {
    "w4-g128": (QuantSpec(bits=4, granularity="group", group_size=128), None),
    "w4-channel": (QuantSpec(bits=4, granularity="channel"), None),
    "w3-g128": (QuantSpec(bits=3, granularity="group", group_size=128), None),
    "w2-g64": (QuantSpec(bits=2, granularity="group", group_size=64), None),
    "w4a8-g128": (QuantSpec(bits=4, granularity="group", group_size=128), INT8_INPUT),
    "w8a8-channel": (QuantSpec(bits=8, granularity="channel"), INT8_INPUT),
    "w8a8-static": (QuantSpec(bits=8, granularity="channel"), QuantSpec(bits=8, granularity="tensor")),
}
MODELS = ("plain", "outliers")
WINDOWS = 128
EVERY = 32  # one norm gain in so many becomes an outlier
RESAMPLES = 2000


@torch.no_grad()
def outlier_twin(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """`model`, in place, with some norm gains 10 to 100 times larger, the columns after them smaller: one function."""
    generator = torch.Generator().manual_seed(seed)
    for block in model.model.layers:
        for pair in find_pairs(block, ("qkv", "gate_up")):
            features = len(pair.producer.weight)
            chosen = torch.randperm(features, generator=generator)[: features // EVERY]
            factor = torch.ones(features)
            factor[chosen] = 10 ** -(1 + torch.rand(len(chosen), generator=generator))
            pair.fold(factor)
    return model


def float_model(kind: str) -> torch.nn.Module:
    model, _ = load("stdlib_llama")
    untie(model)  # rotation needs it; the function stays
    return outlier_twin(model.eval()) if kind == "outliers" else model.eval()


def language() -> LanguageData:
    data = LanguageData(python_stdlib, "python_stdlib", calibration_windows=1 << 20)
    data.tokenizer = load("stdlib_llama")[1]
    return data


def calibration_batches(data: LanguageData, seed: int) -> list[dict]:
    split = data.split("calibration")
    chosen = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))[:WINDOWS].tolist()
    return list(torch.utils.data.DataLoader(torch.utils.data.Subset(split, chosen), batch_size=16))


@torch.no_grad()
def measured(model: torch.nn.Module, data: LanguageData) -> Iterator[dict[str, torch.Tensor]]:
    """Log-probabilities and losses of each batch: of the validation split, then of the test split."""
    for split, loader in (("validation", data.val_dataloader()), ("test", data.test_dataloader())):
        for batch in loader:
            logits = model(input_ids=batch["input_ids"], use_cache=False).logits
            known = batch["labels"] != IGNORE
            nll = F.cross_entropy(logits.transpose(1, 2), batch["labels"], ignore_index=IGNORE, reduction="none")
            logs = F.log_softmax(logits, -1) if split == "validation" else None
            yield {"split": split, "logs": logs, "nll": nll.sum(1), "known": known, "document": batch["document"]}


def interval(values: np.ndarray, tokens: np.ndarray) -> list[float]:
    """Mean of sums over tokens, and its 95 % interval over resampled documents, times 1000."""
    draws = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
    means = values[draws].sum(1) / tokens[draws].sum(1)
    return [1e3 * float(v) for v in (values.sum() / tokens.sum(), *np.quantile(means, [0.025, 0.975]))]


def by_document_sums(rows: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> tuple[np.ndarray, np.ndarray]:
    """Sums and tokens of each document that has any, from (value, tokens, document) of the windows of all batches."""
    values, tokens, document = (torch.cat(column).double().numpy() for column in zip(*rows, strict=True))
    index = document.astype(int)
    summed, counted = np.zeros(index.max() + 1), np.zeros(index.max() + 1)
    np.add.at(summed, index, values)
    np.add.at(counted, index, tokens)
    return summed[counted > 0], counted[counted > 0]


def by_document(rows: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> list[float]:
    return interval(*by_document_sums(rows))


def cell(model: torch.nn.Module, data: LanguageData, reference: list[dict], batches: list[dict], args: tuple) -> dict:
    """One method at one scheme on `model`, compared with what the float model answered."""
    scheme, method = args
    weight, inputs = SCHEMES[scheme]
    insert(model, uniform(weight, inputs, ignore=("*lm_head",)))

    def run() -> None:
        for batch in batches:
            with torch.no_grad(), token_mask(batch["attention_mask"]):
                model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)

    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    METHODS[method](model, run)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    set_stage(model, Stage.FROZEN)
    return {
        **compared(model, data, reference),
        "seconds": round(seconds, 2),
        "memory_mb": round((after - before) / 1024, 1),
    }


def compared(model: torch.nn.Module, data: LanguageData, reference: list[dict]) -> dict[str, list[float]]:
    """KL(reference || model) on the validation split and the loss above the reference's on the test split."""
    divergence, difference = [], []
    for ours, float_ in zip(measured(model, data), reference, strict=True):
        tokens = ours["known"].sum(1)
        if ours["split"] == "validation":
            kl = ((float_["logs"].exp() * (float_["logs"] - ours["logs"])).sum(-1) * ours["known"]).sum(1)
            divergence.append((kl, tokens, ours["document"]))
        else:
            difference.append((ours["nll"] - float_["nll"], tokens, ours["document"]))
    return {"kl": by_document(divergence), "loss": by_document(difference)}


def _child(queue, function: Callable[..., dict], threads: int, *arguments) -> None:
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    queue.put(function(*arguments))


def isolated(function: Callable[..., dict], threads: int, *arguments) -> dict:
    """`function` in a process of its own, since peak memory is a process's: a fork, with what is loaded."""
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=_child, args=(queue, function, threads, *arguments))
    process.start()
    while process.is_alive() and queue.empty():
        process.join(0.1)
    if queue.empty():
        raise SystemExit(f"{arguments[-1]}: its process ended with exit code {process.exitcode}")
    result = queue.get()
    process.join()
    return result


def tables(cells: dict[str, dict], arguments: argparse.Namespace) -> Iterator[Table]:
    for kind in arguments.models:
        table = Table(title=f"{kind}: KL / loss difference to float, millinats per token; mean over calibration seeds")
        table.add_column("method")
        for scheme in arguments.schemes:
            table.add_column(scheme, justify="right")
        table.add_column("seconds", justify="right")
        for method in arguments.methods:
            row, seconds = [], []
            for scheme in arguments.schemes:
                found = [cells[k] for s in arguments.seeds if (k := f"{kind} {scheme} {method} seed={s}") in cells]
                seconds += [c["seconds"] for c in found]
                row.append(_text(found))
            table.add_row(method, *row, f"{np.mean(seconds):.1f}" if seconds else "")
        yield table


def differs(scheme: str, method: str, first: bool) -> bool:
    """Whether a cell says anything that another one, perhaps of the `first` seed, does not."""
    static = SCHEMES[scheme][1] not in (None, INT8_INPUT)
    return static or (method not in INPUTS and (first or method not in WEIGHTS_ALONE))


def _text(found: list[dict]) -> str:
    """Means over seeds; the KL's deviation over seeds, or its interval where there is one seed only."""
    if not found:
        return ""
    kl, loss = (np.array([c[name] for c in found]) for name in ("kl", "loss"))
    spread = f"± {kl[:, 0].std(ddof=1):.2f}" if len(found) > 1 else f"[{kl[0, 1]:.2f}, {kl[0, 2]:.2f}]"
    return f"{kl[:, 0].mean():.2f} {spread} / {loss[:, 0].mean():+.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES), choices=list(SCHEMES))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/calibration.json"))
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of each cell")
    arguments = parser.parse_args()
    state = json.loads(arguments.json.read_text()) if arguments.json.exists() else {"cells": {}}
    console = Console()
    torch.set_num_threads(1)  # a fork inherits no threads: the parent must not have started any
    data = language()
    models = {kind: float_model(kind) for kind in arguments.models}
    references = {kind: list(measured(model, data)) for kind, model in models.items()}
    for seed in arguments.seeds:
        batches = calibration_batches(data, seed)
        for kind, scheme, method in itertools.product(arguments.models, arguments.schemes, arguments.methods):
            key = f"{kind} {scheme} {method} seed={seed}"
            if key in state["cells"] or not differs(scheme, method, seed == arguments.seeds[0]):
                continue
            found = isolated(cell, arguments.threads, models[kind], data, references[kind], batches, (scheme, method))
            state["cells"][key] = found | {"threads": arguments.threads}
            state["torch"] = torch.__version__
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            temporary = arguments.json.with_suffix(".tmp")
            temporary.write_text(json.dumps(state, indent=1) + "\n")
            os.replace(temporary, arguments.json)
            console.print(key, {k: v for k, v in state["cells"][key].items()})
    for table in tables(state["cells"], arguments):
        console.print(table)


if __name__ == "__main__":
    main()
