"""llm-compressor's post-training quantization of one model, for `calibration_peers.py`, in an environment of its own.

    python llm_compressor_oneshot.py MODEL TOKENS.json OUT --method gptq --group-size 128 --bits 4

TOKENS.json is a list of calibration samples, each a list of token ids without padding.  OUT becomes a
compressed-tensors folder.
"""

import argparse
import json
import time

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from transformers import AutoModelForCausalLM


def recipe(method: str, bits: int, group_size: int | None) -> list:
    strategy = {"strategy": "group", "group_size": group_size} if group_size else {"strategy": "channel"}
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "dynamic": False, **strategy}
    if method != "gptq":
        weights["observer"] = "mse" if method == "mse" else "memoryless_minmax"
    scheme = {"group_0": {"targets": ["Linear"], "weights": weights}}
    if method == "gptq":
        return [GPTQModifier(config_groups=scheme, ignore=["lm_head"])]
    quantize = QuantizationModifier(config_groups=scheme, ignore=["lm_head"])
    return [AWQModifier(), quantize] if method == "awq" else [quantize]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("tokens")
    parser.add_argument("out")
    parser.add_argument("--method", choices=("gptq", "awq", "mse"), required=True)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int)
    arguments = parser.parse_args()
    if not torch.accelerator.is_available():
        torch.Tensor.pin_memory = lambda self, *_: self  # its AWQ pins memory always, which fails on a CPU alone
    with open(arguments.tokens) as file:
        samples = json.load(file)
    data = Dataset.from_list([{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in samples])
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="float32")
    start = time.perf_counter()
    oneshot(
        model=model, dataset=data, recipe=recipe(arguments.method, arguments.bits, arguments.group_size),
        max_seq_length=max(map(len, samples)), num_calibration_samples=len(samples), shuffle_calibration_samples=False,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    model.save_pretrained(arguments.out, save_compressed=True)
    print(json.dumps({"seconds": round(seconds, 1)}))


if __name__ == "__main__":
    main()
