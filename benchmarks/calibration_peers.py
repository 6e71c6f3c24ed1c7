"""GPTQ, AWQ and MSE ranges here against llm-compressor's: one model, the same calibration samples, one evaluation.

    python -m venv /tmp/peer && /tmp/peer/bin/pip install torch==2.13.0 llmcompressor
    python benchmarks/calibration_peers.py --peer-python /tmp/peer/bin/python

llm-compressor runs in that environment, with its defaults, on the samples without padding; what it writes is loaded by
transformers here.  Losses above the float model's on the test documents, and ours minus theirs, paired, with 95 %
intervals (bootstrap over documents), in millinats per token.  Below 0 ours is better.  Every finished row is kept in
the JSON file, so an interrupted benchmark goes on where it was.
"""

import argparse
import copy
import itertools
import json
import os
import subprocess
import tempfile
from pathlib import Path

import torch
from calibration import (
    METHODS,
    SCHEMES,
    calibration_batches,
    cell,
    compared,
    float_model,
    language,
    measured,
)
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

PEER = Path(__file__).parent / "llm_compressor_oneshot.py"


def theirs(python: str, model: Path, tokens: Path, out: Path, scheme: str, method: str) -> float:
    """Let llm-compressor write `out`; returns its seconds."""
    weight = SCHEMES[scheme][0]
    group = ["--group-size", str(weight.group_size)] if weight.group_size else []
    words = [python, PEER, model, tokens, out, "--method", method, "--bits", str(weight.bits), *group]
    run = subprocess.run([str(w) for w in words], capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(f"llm-compressor failed:\n{run.stderr[-2000:]}")
    return json.loads(run.stdout.strip().splitlines()[-1])["seconds"]


def version_of(python: str) -> str:
    """Of the llm-compressor that `python` imports."""
    words = [python, "-c", "import importlib.metadata as m; print(m.version('llmcompressor'))"]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()


def write(path: Path, result: dict) -> None:
    """After every row, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(temporary, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", required=True, help="of an environment with llm-compressor")
    parser.add_argument("--schemes", nargs="+", default=["w4-channel", "w4-g128"], choices=list(SCHEMES))
    parser.add_argument("--methods", nargs="+", default=["mse", "gptq", "awq"], choices=["mse", "gptq", "awq"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the calibration samples")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/calibration_peers.json"))
    arguments = parser.parse_args()
    torch.set_flush_denormal(True)
    version = version_of(arguments.peer_python)
    kept = json.loads(arguments.json.read_text()) if arguments.json.exists() else {"llmcompressor": version, "rows": []}
    if kept["llmcompressor"] != version:
        parser.error(f"{arguments.json} holds rows of llm-compressor {kept['llmcompressor']}, this is {version}")
    rows = {(row["scheme"], row["method"], row["seed"]): row for row in kept["rows"]}
    data, model = language(), float_model("plain")
    reference = list(measured(model, data))
    table = Table(title="loss above float, millinats per token")
    for column in ("scheme", "method", "seed", "ours", "llm-compressor", "ours - theirs", "seconds, ours", "theirs"):
        table.add_column(column, justify="left" if column in ("scheme", "method") else "right")
    with tempfile.TemporaryDirectory() as folder:
        at = Path(folder)
        model.save_pretrained(at / "model")
        data.tokenizer.save_pretrained(at / "model")
        for seed in arguments.seeds:
            batches = calibration_batches(data, seed)
            samples = [
                ids[mask.bool()].tolist()
                for batch in batches
                for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
            ]
            (at / "tokens.json").write_text(json.dumps(samples))
            for scheme, method in itertools.product(arguments.schemes, arguments.methods):
                key = scheme, method, seed
                if key not in rows:
                    out = at / f"{scheme}-{method}-{seed}"
                    seconds = theirs(arguments.peer_python, at / "model", at / "tokens.json", out, scheme, method)
                    peer = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
                    ours = copy.deepcopy(model)
                    mine = cell(ours, data, reference, batches, (scheme, method))
                    answers = list(measured(peer, data))
                    rows[key] = {
                        "scheme": scheme, "method": method, "seed": seed, "settings": str(METHODS[method]),
                        "ours": mine["loss"], "theirs": compared(peer, data, reference)["loss"],
                        "difference": compared(ours, data, answers)["loss"],
                        "seconds": [mine["seconds"], seconds],
                    }  # fmt: skip
                    every = list(rows.values())
                    write(arguments.json, {"torch": torch.__version__, "llmcompressor": version, "rows": every})
                row = rows[key]
                text = [f"{v:+.2f} [{low:+.2f}, {high:+.2f}]" for v, low, high in
                        (row["ours"], row["theirs"], row["difference"])]  # fmt: skip
                table.add_row(scheme, method, str(seed), *text, *(f"{v:.1f}" for v in row["seconds"]))
                Console().print(scheme, method, seed, *text)
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
