"""What an 8-bit cache of keys and values costs alone: loss of the embedded model with float weights.

    python benchmarks/kv_cache.py                  # embedded model, the validation windows; a minute
    python benchmarks/kv_cache.py --speed          # decoding with a cache of bytes against a float one, in turns

Differences are paired by window; the error is the standard error of their mean.  Losses are those of the exported and
loaded model; bytes are counted in the tensors that its cache holds after a window, a token's share of them.  Static
scales are calibrated by squared error on the calibration split.
"""

import argparse
import copy
import json
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F
from transformers import DynamicCache

from qat.calibration import RangeCalibration
from qat.data.documents import python_stdlib
from qat.data.language import LanguageData
from qat.data.windows import IGNORE
from qat.export import export, record
from qat.fake_quantizer import Stage, token_mask
from qat.inference import load_packed
from qat.inference.bench import speed
from qat.insertion import insert, remove, set_stage
from qat.scheme import QuantSpec, SchemeMap, uniform
from qat.tasks.models import load

NAMES = [f"{element}{where}" for element in ("int8", "fp8") for where in ("", "-head", "-token")]


def window_losses(model, batches: list[dict]) -> torch.Tensor:
    """Mean loss of each window that has a label, nats per token, float64."""
    rows = []
    for batch in batches:
        logits = model(input_ids=batch["input_ids"], use_cache=False).logits.float()
        labels = batch["labels"]  # of each position: the next token
        known = labels != IGNORE
        losses = F.cross_entropy(logits.transpose(1, 2), labels.masked_fill(~known, 0), reduction="none") * known
        rows.append((losses.sum(1) / known.sum(1).clamp(min=1))[known.any(1)])
    return torch.cat(rows).double()


def token_bytes(model, batch: dict) -> float:
    """Bytes that the cache of `model` holds of one token, in all layers."""
    cache = DynamicCache(config=model.config)
    model(input_ids=batch["input_ids"], past_key_values=cache, use_cache=True)
    held = sum(x.untyped_storage().nbytes() for layer in cache.layers for x in (layer.keys, layer.values))
    return held / batch["input_ids"].numel()


def packed(model, schemes: SchemeMap, run, batch: dict, folder: Path, backend: str = "reference"):
    """The model calibrated by `schemes`, exported with its proof, and loaded; itself it stays float."""
    insert(model, schemes)
    RangeCalibration("mse")(model, run)
    set_stage(model, Stage.FROZEN)
    with record(model) as recorded:
        model(input_ids=batch["input_ids"], use_cache=False)
    export(model, recorded, folder / schemes.name)
    remove(model)
    return load_packed(folder / schemes.name, backend)[0]


def compare_speeds(model, run, batch: dict, turns: int = 7) -> None:
    """One sequence, 128 tokens of prompt and 64 more, INT4 weights on the CPU kernels, one thread."""
    torch.set_num_threads(1)
    weight = QuantSpec(bits=4, granularity="group", group_size=128)
    with TemporaryDirectory() as folder:
        schemes = {name: uniform(weight, ignore=["*lm_head"], kv_cache=name) for name in (None, "int8", "fp8")}
        models = {name: packed(model, map, run, batch, Path(folder), "cpu") for name, map in schemes.items()}
    taken: dict = {name: [] for name in models}
    for _ in range(turns):
        for name, one in models.items():
            taken[name].append(speed(one, 1, 128, 64, rounds=1).decode)
    for name, rates in taken.items():
        rate, ratio = median(rates), median(rates) / median(taken[None])
        print(f"{name or 'float':6} {rate:7.0f} tokens/s, {ratio:.3f} of the float cache's")


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/kv_cache.json"))
    parser.add_argument("--speed", action="store_true")
    arguments = parser.parse_args()
    model, tokenizer = load("stdlib_llama")
    model.eval()
    data = LanguageData(python_stdlib, "python_stdlib")
    data.tokenizer = tokenizer
    batches = list(data.val_dataloader())

    def run() -> None:
        for batch in data.calibration_dataloader():
            with token_mask(batch["attention_mask"]):
                model(input_ids=batch["input_ids"], use_cache=False)

    if arguments.speed:
        return compare_speeds(model, run, batches[0])
    whole = window_losses(model, batches)
    title = f"{len(whole)} windows, float loss {whole.mean():.4f} nats/token"
    table, results = Table(title=title), {}
    for column in ("kv_cache", "above float, millinats", "bytes a token"):
        table.add_column(column, justify="left" if column == "kv_cache" else "right")
    half = copy.deepcopy(model).bfloat16()
    table.add_row("bfloat16", "0", f"{token_bytes(half, batches[0]):.0f}")
    with TemporaryDirectory() as folder:
        for name in NAMES:
            loaded = packed(model, uniform(None, kv_cache=name), run, batches[0], Path(folder))
            difference = 1e3 * (window_losses(loaded, batches) - whole)
            mean, error = float(difference.mean()), float(difference.std() / len(difference) ** 0.5)
            results[name] = {"millinats": mean, "error": error, "bytes": token_bytes(loaded, batches[0])}
            table.add_row(name, f"{mean:+.2f} ± {error:.2f}", f"{results[name]['bytes']:.0f}")
    Console().print(table)
    facts = {"torch": torch.__version__, "corpus_digest": data.corpus_digest, "windows": len(whole)}
    arguments.json.write_text(json.dumps({**facts, "kv_cache": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
