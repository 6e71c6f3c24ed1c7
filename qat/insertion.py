"""Walk a model and put fake quantizers into it, or take them out again."""

from torch import Tensor, nn

from qat.estimators import LSQ, Estimator
from qat.fake_quantizer import FakeQuantizer, Stage
from qat.nn import FakeQuantLinear
from qat.scheme import QuantScheme, QuantSpec, SchemeMap


def layers(model: nn.Module) -> dict[str, FakeQuantLinear]:
    """The quantized layers of `model` by dotted name, in the order of its modules."""
    return {name: m for name, m in model.named_modules() if isinstance(m, FakeQuantLinear)}


def quantizers(model: nn.Module) -> list[FakeQuantizer]:
    """All fake quantizers of `model`."""
    return [q for layer in layers(model).values() for q in layer.quantizers]


def set_stage(model: nn.Module, stage: Stage) -> None:
    """Move all fake quantizers of `model` to `stage`."""
    for quantizer in quantizers(model):
        quantizer.set_stage(stage)


def plan(
    model: nn.Module, schemes: SchemeMap, estimator: Estimator | None = None, input_estimator: Estimator | None = None
) -> dict[str, QuantScheme]:
    """Which layers `insert` would quantize, and how; changes nothing.

    Raises:
        ValueError: a layer cannot be quantized as its scheme says, or not by the estimator (all such layers are
            named), or no layer would be quantized at all.
    """
    chosen, problems = {}, []
    for name, module in model.named_modules():
        scheme = schemes.scheme_of(name) if type(module) is nn.Linear else None
        if scheme is None:
            continue
        try:
            scheme.weight.groups(module.in_features)
        except ValueError as error:
            problems.append(f"{name}: {error}")
        for spec, chooses in ((scheme.weight, estimator), (scheme.input, input_estimator)):
            if chooses is not None and (why := _refusal(chooses, spec)) is not None:
                problems.append(f"{name}: {why}")
        shared = _owners(model, module.weight)
        if len(shared) > 1:
            problems.append(
                f"{name}: its weight is tied to {', '.join(o for o in shared if o != name)}, which would be "
                "quantized with it; leave it in float (a rule with null), or untie it first with qat.untie(model)"
            )
        chosen[name] = scheme
    if problems:
        raise ValueError(f"scheme {schemes.name} does not fit the model:\n  " + "\n  ".join(problems))
    if not chosen:
        linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
        raise ValueError(
            f"scheme {schemes.name} quantizes no layer: of {len(linear)} linear layers"
            f"{' (' + ', '.join(linear[:4]) + ', ...)' if linear else ''} none matches a rule of "
            f"{list(schemes.rules)}"
        )
    return chosen


def _refusal(estimator: Estimator, spec: QuantSpec | None) -> str | None:
    if spec is None:
        return f"its input stays in float, so there is nothing for the input estimator {estimator} to do"
    return estimator.refusal(spec)


def insert(
    model: nn.Module, schemes: SchemeMap, estimator: Estimator | None = None, input_estimator: Estimator | None = None
) -> dict[str, FakeQuantLinear]:
    """Turn the linear layers that `schemes` names into fake-quantized ones, in place.

    The model's function does not change until its quantizers leave `Stage.FLOAT`.  Parameters, their names,
    hooks and references stay; safe on the meta device.

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
    for name, scheme in plan(model, schemes, estimator, input_estimator).items():
        module = model.get_submodule(name)
        assert isinstance(module, nn.Linear)
        FakeQuantLinear.adopt(module, scheme, estimator, input_estimator)
    return layers(model)


def remove(model: nn.Module) -> None:
    """Take all fake quantizers out, in place, leaving float layers with the weights as they are now."""
    for layer in layers(model).values():
        layer.release()


def untie(model: nn.Module) -> None:
    """Give the output layer of a transformers model a copy of the weight it shares with the embedding."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    if head is not None and len(_owners(model, head.weight)) > 1:
        head.weight = nn.Parameter(head.weight.detach().clone())
        model.config.tie_word_embeddings = False  # type: ignore[union-attr]


def _owners(model: nn.Module, weight: Tensor) -> list[str]:
    return [n for n, m in model.named_modules() if any(p is weight for p in m.parameters(recurse=False))]
