"""Load an exported directory for inference, its quantized weights still packed."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoTokenizer,
    GenerationConfig,
)
from transformers.initialization import no_init_weights

from qat.export.directory import SIDE_FILE, SIDE_VERSION, WEIGHTS, sha256, weights_file
from qat.inference.cpu_backend import use_cpu_kernels
from qat.inference.cuda_backend import require_cuda, use_cuda_kernels
from qat.inference.foreign import foreign_cache, foreign_schemes
from qat.inference.key_values import pack_key_values
from qat.inference.packed_layers import packed_layer
from qat.inference.torch_backend import use_torch_operators
from qat.kernels.build import BuildError
from qat.kernels.pages import ask_for_huge_pages
from qat.packing import pack
from qat.scheme import QuantScheme, QuantSpec
from qat.structure import fold_batch_norms, owners, unfuse_experts

log = logging.getLogger(__name__)

Backend = Literal["reference", "torch", "cpu", "cuda", "auto"]


def load_packed(
    directory: str | Path,
    backend: Backend = "reference",
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> tuple[nn.Module, Any]:
    """The model in an exported directory, with its quantized layers packed, and its tokenizer.

    Where keys and values were quantized, any cache of the model holds them as bytes (`qat.inference.key_values`).

    Args:
        directory: what `qat.export.export` or `write_float` wrote; or a compressed-tensors directory of another
            tool, with symmetric integer weights, in one file or in the shards that its index names.
        backend: `reference` computes what training computed; `cpu` uses qat's own kernels for CPUs, compiled at
            first use; `torch` uses torch's integer operators for CPUs; `cuda` uses qat's kernels for NVIDIA GPUs,
            which have not run on one yet; each where it fits a layer's scheme, and logs where.  `auto` is `cpu` on
            a CPU, `torch` where its kernels cannot be compiled, and `reference` on other devices.
        dtype: of activations and float tensors; what the directory says by default.  Scales keep theirs.
        device: where the model goes.

    Returns:
        The model, in evaluation mode, and the tokenizer (None where the directory has none).

    Raises:
        ValueError: a file is missing, damaged, changed since the export, or of a newer format; says which.  Or
            `cpu` was asked for and its kernels cannot be compiled; holds the compiler's output.
    """
    directory = Path(directory)
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be one of {', '.join(get_args(Backend))}, got {backend!r}")
    if backend in ("torch", "cpu") and torch.device(device).type != "cpu":
        raise ValueError(f"backend {backend} runs on the CPU, not on {device}: use backend=reference")
    if backend == "cuda":
        require_cuda(torch.device(device))
    schemes, cache = _schemes(directory)
    model = empty_model(directory, schemes, dtype, cache)
    _fill(model, _weights(directory), schemes)
    if torch.device(device).type == "cpu":
        _use(backend, model)
    _move(model.eval().requires_grad_(False), device)
    if backend == "cuda":
        use_cuda_kernels(model, model.config.dtype)
    return model, _tokenizer(directory)


def _move(model: nn.Module, device: torch.device | str) -> None:
    """`model.to(device)`, in which layers that share a table go on to: torch moves a shared buffer once for each."""
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                holders.setdefault(id(buffer), []).append((module, name))
    model.to(device)
    for (first, name), *others in holders.values():
        for module, its_name in others:
            module._buffers[its_name] = first._buffers[name]


def _use(backend: Backend, model: Any) -> None:
    """Put the packed layers of a model on the CPU on what `backend` says."""
    if backend in ("cpu", "auto"):
        try:
            return use_cpu_kernels(model, model.config.dtype)
        except BuildError as error:
            if backend == "cpu":
                raise ValueError(f"backend cpu: {error}\nuse backend=torch or backend=reference") from error
            log.warning("no CPU kernels (%s): using torch's slower operators", str(error).splitlines()[0])
            log.debug("%s", error)
    if backend != "reference":
        use_torch_operators(model, model.config.dtype)


def _weights(directory: Path) -> list[Path]:
    """The files of weights: one, or the shards of a large model that another tool wrote."""
    one, index = weights_file(directory), directory / f"{WEIGHTS}.index.json"
    if one.is_file() or not index.is_file():
        return [one]
    return [directory / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]


def _schemes(directory: Path) -> tuple[dict[str, QuantScheme], QuantSpec | None]:
    """Of each quantized layer, and of keys and values, once the weights are known to be those that were exported."""
    for path in (directory / "config.json", *(weights := _weights(directory))):
        if not path.is_file():
            raise ValueError(f"{path} is missing: not a directory that qat exported, or a partial copy")
    if not (directory / SIDE_FILE).is_file():
        log.warning("%s has no %s: not written by qat, so that damage goes unnoticed", directory, SIDE_FILE)
        settings = json.loads((directory / "config.json").read_text()).get("quantization_config", {"config_groups": {}})
        return foreign_schemes(weights, settings), foreign_cache(weights, settings.get("kv_cache_scheme"))
    try:
        side = json.loads((directory / SIDE_FILE).read_text())
    except ValueError as error:
        raise ValueError(f"{directory / SIDE_FILE} is damaged ({error}): copy the directory again") from error
    if side["format_version"] > SIDE_VERSION:
        raise ValueError(
            f"{directory / SIDE_FILE}: format {side['format_version']} is newer than this qat reads ({SIDE_VERSION}): "
            f"upgrade qat to {side['qat_version']} or later"
        )
    for name, written in side["files"].items():
        _check_whole(directory / name, written)
    cache = side.get("kv_cache")  # absent from what was exported before keys and values could be
    schemes = {name: QuantScheme.from_dict(layer["scheme"]) for name, layer in side["layers"].items()}
    return schemes, None if cache is None else QuantSpec(**cache)


def _check_whole(path: Path, written: Mapping[str, Any]) -> None:
    if not path.is_file():
        raise ValueError(f"{path} is missing: a partial copy; copy the directory again")
    if path.stat().st_size != written["bytes"]:
        raise ValueError(f"{path}: {path.stat().st_size} bytes of {written['bytes']}: truncated; copy it again")
    if sha256(path) != written["sha256"]:
        raise ValueError(f"{path}: its SHA-256 is not the one in {SIDE_FILE}: changed since the export; copy it again")


def empty_model(
    directory: Path, schemes: Mapping[str, QuantScheme], dtype: torch.dtype | None, cache: QuantSpec | None = None
) -> Any:
    """The architecture in a directory's config.json, with packed layers where `schemes` names them.

    Keys and values are as `cache` says; in float where it is None.

    Parameters and packed tensors are allocated but not written; other buffers are computed.
    """
    config = AutoConfig.from_pretrained(directory)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # else transformers would dequantize
    # On the CPU and not on the meta device, because rotary frequencies and the like are computed in __init__
    # and stored nowhere; memory that nothing writes to is never paged in.
    kind = AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModelForImageClassification
    with no_init_weights():
        model = kind.from_config(config, dtype=dtype or config.dtype)
    model.config.dtype = model.dtype  # which it takes from a parameter, and there may soon be none left
    model.tie_weights()
    unfuse_experts(model, lambda experts: any(name.startswith(f"{experts}.") for name in schemes))
    fold_batch_norms(model, schemes.__contains__)
    for name, scheme in schemes.items():
        shared: dict[str, Tensor] = {}
        for owner in owners(model, model.get_submodule(name).weight):  # type: ignore[arg-type]
            packed = packed_layer(model.get_submodule(owner), scheme, model.config.dtype)
            packed._buffers |= shared  # a table that embedding and output layer share
            shared = {"packed": packed.packed, "scale": packed.scale}
            model.set_submodule(owner, packed)
    if cache is not None:
        pack_key_values(model, cache)
    if (directory / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(directory)
    return model


@torch.no_grad()
def _fill(model: Any, files: Sequence[Path], schemes: Mapping[str, QuantScheme]) -> None:
    """Copy the tensors of the files into `model`, each to its place, and account for all of both."""
    wanted = dict(model.state_dict(keep_vars=True))
    for tensor in wanted.values():
        ask_for_huge_pages(tensor)
    filled = set()
    for path in files:
        with safe_open(path, "pt") as file:
            for name in file.keys():
                if name.endswith(".weight_shape"):
                    continue
                place, value = _placed(name, file.get_tensor(name), schemes)
                if place not in wanted or wanted[place].shape != value.shape:
                    have = tuple(wanted[place].shape) if place in wanted else "no such tensor"
                    raise ValueError(
                        f"{path}: {name} is {tuple(value.shape)}, the model has {have}: config.json differs"
                    )
                wanted[place].copy_(value)
                filled.add(id(wanted[place]))
    if missing := [name for name, tensor in wanted.items() if id(tensor) not in filled]:
        names = ", ".join(missing[:3])
        raise ValueError(f"{', '.join(map(str, files))}: {len(missing)} tensors are missing ({names}); export again")


def _placed(name: str, value: Tensor, schemes: Mapping[str, QuantScheme]) -> tuple[str, Tensor]:
    """The name and value in our model of a stored tensor."""
    layer, _, kind = name.rpartition(".")
    if kind in ("k_scale", "v_scale"):
        return f"{layer}.kv_cache.{kind}", value
    if layer not in schemes:
        return name, value
    if kind == "weight":  # int-quantized: int8 codes
        return f"{layer}.packed", pack(value, schemes[layer].weight.bits)
    return f"{layer}.{ {'weight_packed': 'packed', 'weight_scale': 'scale'}.get(kind, kind) }", value


def _tokenizer(directory: Path) -> Any:
    has_one = any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    return AutoTokenizer.from_pretrained(directory) if has_one else None
