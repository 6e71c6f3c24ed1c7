"""Walk a model and put fake quantizers into it, or take them out again."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from torch import nn

from qat.attention import FakeQuantKeyValues, attentions, kv_heads, quantize_key_values, release_key_values
from qat.estimators import LSQ, Estimator
from qat.fake_quantizer import FakeQuantizer, Stage
from qat.nn import LAYERS, FakeQuantLayer
from qat.scheme import QuantScheme, QuantSpec, SchemeMap, matches
from qat.structure import (
    expert_layers,
    fold_batch_norms,
    fused,
    keep_frequencies,
    owners,
    take_slow_paths,
    unfuse_experts,
)


def layers(model: nn.Module) -> dict[str, FakeQuantLayer]:
    """The quantized layers of `model` by dotted name, in its order; of those that share a table, the first."""
    found: dict[FakeQuantizer, tuple[str, FakeQuantLayer]] = {}
    for name, module in model.named_modules():
        if isinstance(module, FakeQuantLayer):
            found.setdefault(module.weight_quantizer, (name, module))
    return dict(found.values())


def quantizers(model: nn.Module) -> list[FakeQuantizer]:
    """All fake quantizers of `model`."""
    return [module for module in model.modules() if isinstance(module, FakeQuantizer)]


def set_stage(model: nn.Module, stage: Stage) -> None:
    """Move all fake quantizers of `model` to `stage`."""
    for quantizer in quantizers(model):
        quantizer.set_stage(stage)


def widths(model: nn.Module) -> tuple[int, ...]:
    """The nested widths that `model` can be quantized at, the widest first; empty where nothing is nested."""
    return nested_widths(layer.scheme for layer in layers(model).values())


def nested_widths(schemes: Iterable[QuantScheme]) -> tuple[int, ...]:
    """The widths that those of `schemes` nest which nest any; `plan` sees to it that they agree."""
    return next((scheme.weight.widths for scheme in schemes if scheme.weight.nested), ())


@contextmanager
def at_width(model: nn.Module, bits: int) -> Iterator[None]:
    """Within, weights with nested widths are quantized at `bits`, and all others as ever.

    Raises:
        ValueError: `bits` is none of `widths`.
    """
    nested = [quantizer for quantizer in quantizers(model) if quantizer.full.nested]
    if not nested:
        raise ValueError(f"no layer has nested widths, so none can be quantized at {bits} bits: QuantSpec(nested=...)")
    specs = [quantizer.full.at(bits) for quantizer in nested]
    before = [quantizer.spec for quantizer in nested]
    try:
        for quantizer, spec in zip(nested, specs, strict=True):
            quantizer.spec = spec
        yield
    finally:
        for quantizer, spec in zip(nested, before, strict=True):
            quantizer.spec = spec


def prepare(model: nn.Module, schemes: SchemeMap) -> None:
    """Change the structure of `model`, not its function, where `schemes` needs that.

    Experts get layers of their own, and convolutions the batch norms behind them; rotary frequencies keep their dtype
    where the model is converted to another.

    Raises:
        ValueError: experts that `schemes` quantizes are of a form that has no such layers.
    """
    keep_frequencies(model)
    experts = expert_layers(model)
    unfuse_experts(model, lambda name: any(schemes.scheme_of(layer) for layer in experts[name]))
    fold_batch_norms(model, lambda name: "conv" in schemes.kinds and schemes.scheme_of(name) is not None)


def plan(
    model: nn.Module, schemes: SchemeMap, estimator: Estimator | None = None, input_estimator: Estimator | None = None
) -> dict[str, QuantScheme]:
    """Which layers `insert` would quantize, and how; changes nothing.

    Raises:
        ValueError: a layer, or keys and values, cannot be quantized as the scheme says, or not by the estimator (all
            such layers are named), a rule's pattern matches none, or nothing would be quantized at all.
    """
    chosen = {}
    problems = [
        f"{name}: its experts share one parameter; give them layers of their own first with "
        "qat.unfuse_experts(model), or leave them in float (a rule with null)"
        for name, experts in expert_layers(model).items()
        if any(schemes.scheme_of(layer) for layer in experts)
    ]
    known = [name for name, module in model.named_modules() if type(module) in LAYERS]
    known += [name for fused, experts in expert_layers(model).items() for name in (fused, *experts)]
    for pattern in schemes.rules:
        if pattern != "*" and not any(matches(pattern, name) for name in known):
            problems.append(f"{pattern!r} matches no layer: they are called {', '.join(known[:4])}, ...")
    for name, module in model.named_modules():
        kind = LAYERS.get(type(module))
        scheme = schemes.scheme_of(name) if kind is not None and kind.kind in schemes.kinds else None
        if scheme is None or kind is None:
            continue
        try:
            scheme.weight.groups(kind.as_matrix(module.weight).shape[1])
        except ValueError as error:
            problems.append(f"{name}: {error}")
        chosen[name] = kind.fitted(scheme)
        # What has no input to quantize, an embedding, is not asked for one.
        of_inputs = input_estimator if scheme.input is None else input_estimator or estimator
        inputs = (scheme.input, of_inputs if kind.multiplies else None)
        for spec, chooses in ((scheme.weight, estimator), inputs):
            if chooses is not None and (why := _refusal(chooses, spec)) is not None:
                problems.append(f"{name}: {why}")
    problems += _settle_tied(model, chosen)
    problems += _cache_problems(model, schemes.kv_cache, input_estimator or estimator)
    if len(nests := {scheme.weight.widths for scheme in chosen.values() if scheme.weight.nested}) > 1:
        problems.append(f"its layers nest different widths, {sorted(nests)}: a model is quantized at one at a time")
    if problems:
        raise ValueError(f"scheme {schemes.name} does not fit the model:\n  " + "\n  ".join(problems))
    if not chosen and (any(schemes.rules.values()) or schemes.kv_cache is None):
        kinds = tuple(original for original, layer in LAYERS.items() if layer.kind in schemes.kinds)
        known = [n for n, m in model.named_modules() if isinstance(m, kinds)]
        raise ValueError(
            f"scheme {schemes.name} quantizes no layer: of {len(known)} {' and '.join(schemes.kinds)} layers"
            f"{' (' + ', '.join(known[:4]) + ', ...)' if known else ''} none matches a rule of "
            f"{list(schemes.rules)}"
        )
    return chosen


def _settle_tied(model: nn.Module, chosen: dict[str, QuantScheme]) -> list[str]:
    """Let an embedding and what is tied to it follow one scheme, for weights only; what cannot be settled."""
    problems = []
    for name, scheme in chosen.items():
        shared = owners(model, model.get_submodule(name).weight)  # type: ignore[arg-type]
        wanted = [chosen[owner].weight if owner in chosen else None for owner in shared]
        table = any(isinstance(model.get_submodule(owner), nn.Embedding) for owner in shared)
        if len(shared) > 1 and table and wanted == [scheme.weight] * len(shared):
            chosen[name] = replace(scheme, input=None)
        elif len(shared) > 1:
            problems.append(
                f"{name}: its weight is tied to {', '.join(o for o in shared if o != name)}, which would be quantized "
                "with it; leave it in float (a rule with null), quantize both alike as one table (kinds=[linear, "
                "embedding]), or untie it first with qat.untie(model)"
            )
    return problems


def _cache_problems(model: nn.Module, spec: QuantSpec | None, estimator: Estimator | None) -> list[str]:
    if spec is None:
        return []
    try:
        attentions(model)
    except ValueError as error:
        return [str(error)]
    why = estimator.refusal(spec) if estimator is not None else None
    return [] if why is None else [f"kv_cache: {why}"]


def _refusal(estimator: Estimator, spec: QuantSpec | None) -> str | None:
    if spec is None:
        return f"its input stays in float, so there is nothing for the input estimator {estimator} to do"
    return estimator.refusal(spec)


def insert(
    model: nn.Module, schemes: SchemeMap, estimator: Estimator | None = None, input_estimator: Estimator | None = None
) -> dict[str, FakeQuantLayer]:
    """Fake-quantize the layers that `schemes` names, and keys and values where it says so, in place.

    The model's function does not change until its quantizers leave `Stage.FLOAT`.  Parameters, their names,
    hooks and references stay; safe on the meta device.  Layers that servers run as one (`qat.structure.fused`) have one
    quantizer for static activations: a fused layer quantizes its input once.

    Args:
        model: any module.
        schemes: which layers, and how.
        estimator: the gradient; LSQ by default.
        input_estimator: that of activations, where it differs.

    Returns:
        The quantized layers by dotted name.

    Raises:
        ValueError: as `plan`, before anything is changed.
    """
    estimator = estimator if estimator is not None else LSQ()
    tables: dict[int, FakeQuantizer] = {}
    chosen = plan(model, schemes, estimator, input_estimator)
    take_slow_paths(model, chosen)
    leaders = {name: group[0] for group in fused(chosen) for name in group}
    for name, scheme in chosen.items():
        module = model.get_submodule(name)
        shared = tables.get(id(module.weight))
        layer = LAYERS[type(module)].adopt(module, scheme, estimator, input_estimator, shared)
        tables[id(module.weight)] = layer.weight_quantizer
        leader = leaders.get(name, name)
        if scheme.input is not None and not scheme.input.dynamic and scheme.input == chosen[leader].input:
            layer.input_quantizer = model.get_submodule(leader).input_quantizer  # type: ignore[assignment]
    if schemes.kv_cache is not None:
        for attention in attentions(model).values():
            heads, device = kv_heads(attention), attention.k_proj.weight.device  # type: ignore[union-attr]
            quantized = FakeQuantKeyValues(schemes.kv_cache, heads, input_estimator or estimator, device)
            quantize_key_values(attention, quantized)
    return layers(model)


def remove(model: nn.Module) -> None:
    """Take all fake quantizers out, in place, leaving float layers with the weights as they are now."""
    release_key_values(model)
    for layer in [module for module in model.modules() if isinstance(module, FakeQuantLayer)]:
        layer.release()
