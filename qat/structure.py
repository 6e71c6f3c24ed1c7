"""Changes of a model's structure that keep its function, made before insertion so that weights can be quantized."""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from transformers.integrations.moe import _default_apply_gate

from qat.fake_quantizer import real_tokens, token_mask

log = logging.getLogger(__name__)

# What checkpoints call an expert's gate, up and down projections.
_PROJECTIONS = {"mixtral": ("w1", "w3", "w2")}
_USUAL_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
# Layers of one parent that servers run as one, by the last parts of their names.
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@contextmanager
def keep_modes(module: nn.Module) -> Iterator[None]:
    """Within, parts of `module` may be set to train or evaluate; afterwards each does what it did before."""
    modes = [(part, part.training) for part in module.modules()]
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def fused(names: Iterable[str]) -> list[list[str]]:
    """The layers among `names` (dotted) that servers run as one, by groups, in the order of `names`."""
    found: dict[tuple[str, int], list[str]] = {}
    for name in names:
        parent, _, leaf = name.rpartition(".")
        for index, leaves in enumerate(_FUSED):
            if leaf in leaves:
                found.setdefault((parent, index), []).append(name)
    return list(found.values())


class LinearExperts(nn.Module):
    """The experts of a sparse layer, each of three linear layers, under the names that checkpoints give them.

    Args:
        fused: transformers' module, of `gate_up_proj` (experts, 2 * intermediate, hidden) and `down_proj`
            (experts, hidden, intermediate), whose memory the linear layers go on to use.
        names: of the gate, up and down projections.
    """

    def __init__(self, fused: Any, names: tuple[str, str, str]):
        super().__init__()
        self.names, self.act_fn = names, fused.act_fn
        self.count = len(fused.down_proj)
        for index, weights in enumerate(zip(fused.gate_up_proj.detach(), fused.down_proj.detach(), strict=True)):
            parts = zip(names, (*weights[0].chunk(2), weights[1]), strict=True)
            self.add_module(str(index), nn.ModuleDict({name: _linear(weight) for name, weight in parts}))
        self.train(fused.training)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """As the fused module computes, up to the order of sums.

        In training mode experts run that no token chose, too: their gradients are zero and not absent, and a record
        of what training used holds all of them.

        Args:
            hidden_states: (tokens, hidden).
            top_k_index: (tokens, chosen), the experts of each token.
            top_k_weights: (tokens, chosen).

        Returns:
            (tokens, hidden).
        """
        out, mask = torch.zeros_like(hidden_states), real_tokens()
        for index in range(self.count):
            token, place = torch.where(top_k_index == index)
            if not (len(token) or self.training):
                continue
            with token_mask(None if mask is None else mask.flatten().to(token.device)[token]):
                x = hidden_states[token]
                gate, up, down = (self.get_submodule(f"{index}.{name}") for name in self.names)
                y = down(self.act_fn(gate(x)) * up(x)) * top_k_weights[token, place, None]
            out.index_add_(0, token, y.to(out.dtype))
        return out


def fused_experts(model: nn.Module) -> dict[str, Any]:
    """The modules of `model` that keep the weights of all their experts in one parameter, by dotted name."""
    return {n: m for n, m in model.named_modules() if isinstance(getattr(m, "gate_up_proj", None), nn.Parameter)}


def expert_layers(model: nn.Module) -> dict[str, list[str]]:
    """The linear layers that `unfuse_experts` would make, by dotted name, of each module that it would replace."""
    names = _PROJECTIONS.get(_kind(model), _USUAL_PROJECTIONS)
    counts = {name: len(module.down_proj) for name, module in fused_experts(model).items()}
    return {name: [f"{name}.{i}.{leaf}" for i in range(count) for leaf in names] for name, count in counts.items()}


def unfuse_experts(model: nn.Module, where: Callable[[str], bool] = lambda name: True) -> None:
    """Give every expert linear layers of its own, which can be quantized; parameters are renamed, not copied.

    Args:
        model: a transformers model.
        where: by the dotted name of a module that keeps its experts fused, whether to replace it; all by default.

    Raises:
        ValueError: experts that are no gated pair of plain products; names them, before anything is changed.
    """
    found = {name: module for name, module in fused_experts(model).items() if where(name)}
    for name, module in found.items():
        plain = getattr(module, "has_gate", False) and module.is_concatenated
        if not plain or module.is_transposed or module.has_bias or type(module)._apply_gate is not _default_apply_gate:
            raise ValueError(
                f"{name}: experts of {type(module).__name__} are not down(act(gate(x)) * up(x)): leave them in float"
            )
    for name, module in found.items():
        model.set_submodule(name, LinearExperts(module, _PROJECTIONS.get(_kind(model), _USUAL_PROJECTIONS)))


def _kind(model: nn.Module) -> str:
    return getattr(getattr(model, "config", None), "model_type", "")


def fold_batch_norms(model: nn.Module, where: Callable[[str], bool] = lambda name: True) -> None:
    """Move the batch norm behind a convolution into it: y = gamma (W x + b - mean) / sqrt(var + eps) + beta.

    A norm is behind a convolution where the forward of the module that has both gives it the convolution's output, and
    nothing else.  In evaluation mode the function stays, but for rounding (1e-5 of its size in float32); training goes
    on without batch statistics.

    Args:
        model: any module; a forward that cannot be traced keeps its norms, which a warning says.
        where: by the dotted name of a convolution, whether to fold into it; all by default.
    """
    for parent_name, parent in list(model.named_modules()):
        children = dict(parent.named_children())
        convolutions = [name for name, child in children.items() if isinstance(child, nn.Conv2d)]
        if not any(isinstance(child, nn.BatchNorm2d) for child in children.values()):
            continue
        if not any(where(f"{parent_name}.{name}".lstrip(".")) for name in convolutions):
            continue
        for name, norm_name in _norms_behind(parent_name, parent):
            conv: Any = children[name]
            norm: Any = children[norm_name]
            if not norm.track_running_stats or not where(f"{parent_name}.{name}".lstrip(".")):
                continue
            statistics = norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
            conv.weight, conv.bias = fuse_conv_bn_weights(conv.weight, conv.bias, *statistics)
            setattr(parent, norm_name, nn.Identity())


class _Children(fx.Tracer):
    """Sees a module's own forward alone: what its children compute is one call each."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _norms_behind(name: str, module: nn.Module) -> list[tuple[str, str]]:
    """The children of `module`, by name, that are (a convolution, the batch norm alone that takes its output)."""
    try:
        calls = [node for node in _Children().trace(module).nodes if node.op == "call_module"]
    except Exception as error:  # whatever a forward may do with what has no values yet
        log.warning("%s: batch norms stay, where their inputs come from cannot be traced: %s", name or "model", error)
        return []
    times = Counter(node.target for node in calls)
    found = []
    for node in calls:
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or source.op != "call_module":
            continue
        kinds = [type(module.get_submodule(str(n.target))) for n in (source, node)]
        alone = len(source.users) == times[source.target] == times[node.target] == 1
        if alone and issubclass(kinds[0], nn.Conv2d) and issubclass(kinds[1], nn.BatchNorm2d):
            found.append((str(source.target), str(node.target)))
    return found


def take_slow_paths(model: nn.Module, names: Iterable[str]) -> None:
    """Let torch's transformer encoders call their layers: in evaluation they read the weights of `names` past them."""
    owners = {name.rpartition(".")[0] for name in names}
    for name, module in model.named_modules():
        if isinstance(module, nn.TransformerEncoderLayer) and name in owners:
            module.activation_relu_or_gelu = 0  # what its forward asks for before it takes the other path
        inside = (owner for owner in owners if owner.startswith(f"{name}.layers."))
        if isinstance(module, nn.TransformerEncoder) and any(inside):
            module.use_nested_tensor = False


def keep_frequencies(model: nn.Module) -> None:
    """Let the rotary frequencies of a transformers model follow it to another device, never to another dtype.

    Rounded to bfloat16, Llama 3's turn what is 1,000 tokens away by up to 1.8 radians too much or too little; and a
    loaded model computes them anew, so that what was trained with rounded ones would not be what runs.
    """
    for module in model.modules():
        if "inv_freq" in module._buffers:
            module._apply = partial(_apply_but_frequencies, module)  # type: ignore[method-assign]


def _apply_but_frequencies(module: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    kept = {name: buffer for name, buffer in module._buffers.items() if name.endswith("inv_freq")}
    type(module)._apply(module, fn, recurse)
    for name, before in kept.items():
        moved = module._buffers[name]
        if before is not None and moved is not None and moved.dtype != before.dtype:
            module._buffers[name] = before.to(moved.device)
    return module


def untie(model: nn.Module) -> None:
    """Give the output layer of a transformers model a copy of the weight it shares with the embedding."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    if head is not None and len(owners(model, head.weight)) > 1:
        head.weight = nn.Parameter(head.weight.detach().clone())
        model.config.tie_word_embeddings = False  # type: ignore[union-attr]


def owners(model: nn.Module, weight: Tensor) -> list[str]:
    """The dotted names of the modules that have `weight`."""
    return [n for n, m in model.named_modules() if any(p is weight for p in m.parameters(recurse=False))]


def _linear(weight: Tensor) -> nn.Linear:
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight, requires_grad=True)
    return linear
