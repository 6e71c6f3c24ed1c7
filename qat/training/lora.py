"""Low-rank adapters that are quantized with the weight they are added to: fq(W + (alpha / r) B A), arXiv 2106.09685.

An adapter that is merged into a quantized weight has to be rounded again, and what was trained is lost.  Here the sum
is quantized in every forward, so the codes of the last one are the codes that are exported.  Configuration, target
patterns and files are peft's.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qat.attention import key_values
from qat.insertion import layers
from qat.nn import FakeQuantLayer
from qat.structure import owners
from qat.training.parameters import scale_parameters

CONFIG, WEIGHTS, SCALES = "adapter_config.json", "adapter_model.safetensors", "scales.safetensors"
_PREFIX = "base_model.model."  # of peft's names


def targeted(names: Iterable[str], targets: str | Sequence[str]) -> list[str]:
    """The layers that a peft target names.

    Args:
        names: dotted, of all quantized linear layers.
        targets: `all-linear`; or last parts of dotted names, such as [q_proj, v_proj]; or a regular expression that
            matches whole dotted names.

    Raises:
        ValueError: a target names no quantized linear layer.
    """
    names = list(names)
    if targets == "all-linear":
        return names
    if isinstance(targets, str):
        found = [n for n in names if re.fullmatch(targets, n)]
        missing = [] if found else [targets]
    else:
        found = [n for n in names if any(_ends(n, t) for t in targets)]
        missing = [t for t in targets if not any(_ends(n, t) for n in names)]
    if missing or not found:
        last = sorted({name.rsplit(".", 1)[-1] for name in names})
        raise ValueError(
            f"no quantized linear layer is called {', '.join(missing) or targets}: a LoRA target is one of "
            f"{', '.join(last)}, a regular expression for whole names such as {next(iter(names), '')}, or all-linear"
        )
    return found


def check_rank(r: int, shapes: Mapping[str, Sequence[int]]) -> None:
    """Raise ValueError if an adapter of rank `r` is nothing, or no smaller than a layer of `shapes` (out, in)."""
    if not shapes:
        raise ValueError("no linear layer is quantized, and adapters are quantized with one: trainable=all")
    smallest, name = min((min(shape), name) for name, shape in shapes.items())
    if not 0 < r <= smallest:
        raise ValueError(f"the rank of LoRA must be between 1 and {smallest}, the size of {name}; got r={r}")


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def linear_layers(model: nn.Module) -> dict[str, FakeQuantLayer]:
    """The quantized layers of `model` that can have an adapter, by dotted name: linear, and tied to no other."""
    found = {name: layer for name, layer in layers(model).items() if layer.kind == "linear"}
    return {name: layer for name, layer in found.items() if len(owners(model, layer.weight)) == 1}


def add_adapters(
    model: nn.Module, r: int, lora_alpha: float, target_modules: str | Sequence[str] = "all-linear"
) -> dict[str, FakeQuantLayer]:
    """Add adapters to quantized layers, and let nothing else of `model` learn but the scales.

    Args:
        model: with fake quantizers inserted.
        r: rank.
        lora_alpha: the adapter's product is multiplied by lora_alpha / r.
        target_modules: as of `targeted`.

    Returns:
        The layers with adapters, by dotted name.

    Raises:
        ValueError: as `check_rank` and `targeted`.
    """
    linear = linear_layers(model)
    chosen = {name: linear[name] for name in targeted(linear, target_modules)}
    check_rank(r, {name: layer.matrix.shape for name, layer in chosen.items()})
    scales = {id(p) for p in scale_parameters(model)}
    for parameter in model.parameters():
        if id(parameter) not in scales:
            parameter.requires_grad_(False)
    for layer in chosen.values():
        layer.adapt(r, lora_alpha / r)
    return chosen


def save_adapter(model: nn.Module, folder: Path, base: str) -> None:
    """Write adapters as peft does, and beside them the scales, without which they are half of what was trained.

    Args:
        model: with adapters.
        folder: existing, empty.
        base: name or path of the float model that they belong to.

    Raises:
        ValueError: no layer has an adapter.
    """
    found = {n: layer for n, layer in layers(model).items() if layer.lora_A is not None}
    if not found:
        raise ValueError("the model has no adapter to save: add_adapters first")
    first: Any = next(iter(found.values()))
    rank = len(first.lora_A)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": first.scaling * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(found),
        "inference_mode": True,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    parts = {f"{_PREFIX}{n}.{part}.weight": getattr(layer, part) for n, layer in found.items() for part in _PARTS}
    save_file(_plain(parts), folder / WEIGHTS, metadata={"format": "pt"})
    save_file(_plain(_scales(model)), folder / SCALES)


def load_adapter(model: nn.Module, folder: Path) -> None:
    """Read what `save_adapter` wrote into a model with the same base weights and the same schemes inserted.

    Args:
        model: with fake quantizers inserted and without adapters; its adapters and scales are set.
        folder: of the adapter.

    Raises:
        ValueError: the adapter is for other layers, shapes or schemes.
    """
    config = json.loads((folder / CONFIG).read_text())
    linear = linear_layers(model)
    chosen = {name: linear[name] for name in targeted(linear, config["target_modules"])}
    if not any(layer.lora_A is not None for layer in chosen.values()):
        add_adapters(model, config["r"], config["lora_alpha"], config["target_modules"])
    targets: dict[str, Tensor] = _scales(model)
    for name, layer in chosen.items():
        targets |= {f"{_PREFIX}{name}.{part}.weight": getattr(layer, part) for part in _PARTS}
    stored = load_file(folder / WEIGHTS) | load_file(folder / SCALES)
    for name in sorted({*stored, *targets}):
        ours, theirs = (tuple(d[name].shape) if name in d else None for d in (targets, stored))
        if ours != theirs:
            raise ValueError(f"{folder} does not fit the model: {name} is {theirs} there and {ours} here")
    for name, tensor in stored.items():
        targets[name].data.copy_(tensor)


_PARTS = ("lora_A", "lora_B")


def _scales(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, layer in layers(model).items():
        for kind, quantizer in (("weight", layer.weight_quantizer), ("input", layer.input_quantizer)):
            if quantizer is not None and quantizer.scale is not None:
                found[f"{name}.{kind}_scale"] = quantizer.scale
            if quantizer is not None and quantizer.offset is not None:
                found[f"{name}.{kind}_offset"] = quantizer.offset
    for name, kept in key_values(model).items():
        for kind, quantizer in (("key", kept.key_quantizer), ("value", kept.value_quantizer)):
            if quantizer.scale is not None:
                found[f"{name}.{kind}_scale"] = quantizer.scale
    return found


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    # Copies: layers that share a scale would share its memory, which the format refuses.
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
