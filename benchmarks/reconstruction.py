"""Learning block by block against GPTQ, without training: one model, the same calibration batches, one evaluation.

    python benchmarks/reconstruction.py --threads 1

KL(float || quantized) over the validation windows, the loss above the float model's on the test documents, and that
loss minus GPTQ's, paired; millinats per token with 95 % intervals (bootstrap over documents).  Below 0 the method is
better than GPTQ.  Every finished row is kept in the JSON file, so an interrupted benchmark goes on where it was.
"""

import argparse
import copy
import itertools
import json
from pathlib import Path

import torch
from calibration import METHODS, SCHEMES, calibration_batches, cell, compared, float_model, language, measured
from calibration_peers import write
from rich.console import Console
from rich.table import Table

from qat.calibration.method import described

LEARNED = ("adaround", "block ap")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemes", nargs="+", default=["w4-channel", "w3-g128", "w2-g64"], choices=list(SCHEMES))
    parser.add_argument("--methods", nargs="+", default=list(LEARNED), choices=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the calibration samples")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/reconstruction.json"))
    arguments = parser.parse_args()
    torch.set_flush_denormal(True)
    torch.set_num_threads(arguments.threads)
    rows: dict[str, dict] = json.loads(arguments.json.read_text())["rows"] if arguments.json.exists() else {}
    data, model = language(), float_model("plain")
    reference = list(measured(model, data))
    for seed, scheme in itertools.product(arguments.seeds, arguments.schemes):
        batches, answers = calibration_batches(data, seed), None
        for method in ("gptq", *arguments.methods):
            key = f"{scheme} {method} seed={seed}"
            missing = [m for m in arguments.methods if f"{scheme} {m} seed={seed}" not in rows]
            if key in rows and not (method == "gptq" and missing):
                continue
            ours = copy.deepcopy(model)
            row = cell(ours, data, reference, batches, (scheme, method))
            if method == "gptq":
                answers = list(measured(ours, data))
            else:
                assert answers is not None
                row["against_gptq"] = compared(ours, data, answers)["loss"]
            rows[key] = row | {"settings": described(METHODS[method]), "threads": arguments.threads}
            write(arguments.json, {"torch": torch.__version__, "rows": rows})
    table = Table(title="millinats per token, 95 % intervals")
    for column in ("scheme", "method", "seed", "KL", "loss above float", "loss - GPTQ's", "seconds"):
        table.add_column(column, justify="left" if column in ("scheme", "method") else "right")
    for seed, scheme, method in itertools.product(arguments.seeds, arguments.schemes, ("gptq", *arguments.methods)):
        row = rows[f"{scheme} {method} seed={seed}"]
        figures = (row["kl"], row["loss"], row.get("against_gptq"))
        text = ["" if f is None else f"{f[0]:+.2f} [{f[1]:+.2f}, {f[2]:+.2f}]" for f in figures]
        table.add_row(scheme, method, str(seed), *text, f"{row['seconds']:.1f}")
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
