"""What training holds: weights, gradients and optimizer state, full fine-tuning against scales of held codes.

    python benchmarks/memory.py

A random Llama of the shape of Llama 3.2 1B (hidden 2048, intermediate 8192, 16 layers, 32 heads of which 8 are
key-value heads, vocabulary 128256, tied), bfloat16, AdamW, after one step with two tokens.  Bytes are those of the
tensors that are held, counted once by storage, which is exact; activations and what a step computes and drops are not
in them.  Full fine-tuning is measured with 2 and with 4 layers and extended linearly, since all layers are alike, to
stay below 10 GiB; scales are measured whole.
"""

import argparse
import gc
import json
import resource
from collections.abc import Iterable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from qat.calibration import RangeCalibration
from qat.fake_quantizer import Stage
from qat.insertion import insert, layers, set_stage
from qat.scheme import QuantSpec, uniform
from qat.training import scale_parameters

LAYERS, MEASURED = 16, (2, 4)
PARTS = ("weights", "gradients", "optimizer state")
LIMIT = 0.12


def llama(count: int) -> LlamaForCausalLM:
    """Random, bfloat16, of `count` layers."""
    config = LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=count, num_attention_heads=32,
        num_key_value_heads=8, tie_word_embeddings=True, torch_dtype="bfloat16",
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)


def held(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind `tensors`, each counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}
    return sum(storages.values())


def hold(model: nn.Module) -> list[nn.Parameter]:
    """Quantize, hold the codes, and return what learns: the scales."""
    schemes = uniform(
        QuantSpec(bits=4, granularity="group", group_size=128, scale_dtype="bfloat16"), ignore=("*lm_head",)
    )
    insert(model, schemes)
    # absmax: which codes are held makes no difference to their bytes
    RangeCalibration("absmax", weight="absmax")(model, lambda: None, None)
    set_stage(model, Stage.TRAIN)
    scales = scale_parameters(model)
    model.requires_grad_(False)
    for scale in scales:
        scale.requires_grad_(True)
    for layer in layers(model).values():
        layer.hold()
    return scales


def measure(count: int, scales: bool) -> dict[str, int]:
    """Bytes held by each of PARTS after one step of a model of `count` layers."""
    torch.manual_seed(0)
    model = llama(count)
    learning = hold(model) if scales else list(model.parameters())
    optimizer = torch.optim.AdamW(learning, lr=1e-4, foreach=False)
    tokens = torch.tensor([[1, 2]])
    model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    optimizer.step()
    parameters = list(model.parameters())
    gradients = [p.grad for p in parameters if p.grad is not None]
    state = [t for values in optimizer.state.values() for t in values.values() if isinstance(t, Tensor)]
    assert len(gradients) == len(optimizer.state) == len(learning)  # every one of them has learned
    found = held([*parameters, *model.buffers()]), held(gradients), held(state)
    del model, optimizer, learning, parameters, gradients, state
    gc.collect()
    return dict(zip(PARTS, found, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/memory.json"))
    arguments = parser.parse_args()
    ours = measure(LAYERS, scales=True)
    few, more = (measure(count, scales=False) for count in MEASURED)
    each = {part: (more[part] - few[part]) // (MEASURED[1] - MEASURED[0]) for part in PARTS}
    full = {part: few[part] + each[part] * (LAYERS - MEASURED[0]) for part in PARTS}
    ratio = sum(ours.values()) / sum(full.values())
    table = Table(title=f"a Llama of 1B's shape, {LAYERS} layers, MB (10^6 bytes) held after a step")
    for column in ("training", *PARTS, "in all", "ratio"):
        table.add_column(column, justify="left" if column == "training" else "right")
    rows = {"full fine-tuning, bf16 AdamW (from 2 and 4 layers)": full, "scales, int4 g128": ours}
    for name, found in rows.items():
        total = sum(found.values())
        cells = [f"{found[part] / 1e6:,.1f}" for part in PARTS]
        table.add_row(name, *cells, f"{total / 1e6:,.1f}", f"{total / sum(full.values()):.4f}")
    Console(width=120).print(table)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"ratio {ratio:.4f}, limit {LIMIT}; most resident memory of this process {peak / 1e9:.2f} GB")
    facts = {
        "torch": torch.__version__,
        "layers": LAYERS,
        "full_measured": {count: found for count, found in zip(MEASURED, (few, more), strict=True)},
        "full_extrapolated": full,
        "scales": ours,
        "ratio": ratio,
        "limit": LIMIT,
        "peak_resident": peak,
    }
    arguments.json.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
