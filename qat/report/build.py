"""summary.json: every figure of a run, from what was measured."""

import json
import math
import os
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from qat import __version__
from qat.evaluation import DocumentLosses, Estimate, difference, loss_interval

FIGURES = ("recovery", "recovery_over_control", "qat_minus_control_ptq")
LOSSES = ("float", "ptq", "ptq_mse", "calibrated", "qat", "control", "control_ptq", "packed")


def build_summary(
    facts: Mapping[str, Any], losses: Mapping[str, DocumentLosses], figures: Mapping[str, Estimate]
) -> dict[str, Any]:
    """The summary of a run.

    Args:
        facts: what the run was and made (recipe, scheme, seed, bytes, seconds, versions, ...), plain values.
        losses: of each model on the test split, by the names in `LOSSES`, or those with a nested width (`qat_int4`).
        figures: estimates by the names in `FIGURES`; each adds `<name>`, `<name>_interval` and `<name>_reason`.
    """
    summary = dict(facts)
    names = [*LOSSES, *(name for name in losses if name not in LOSSES)]  # the others: nested widths
    summary |= {f"{name}_loss": losses[name].loss if name in losses else None for name in names}
    for name in FIGURES:
        figure = figures.get(name, Estimate(None, reason="nothing is quantized"))
        summary |= {name: figure.value, f"{name}_interval": figure.interval, f"{name}_reason": figure.reason}
    summary["models"] = [_model(name, losses[name], losses["float"]) for name in names if name in losses]
    return _finite(summary)


def versions() -> dict[str, str]:
    """Of Python and of the packages whose numbers could move a figure."""
    packages = {name: metadata.version(name) for name in ("torch", "transformers", "lightning")}
    return {"python": platform.python_version(), "qat": __version__, **packages}


def _model(name: str, losses: DocumentLosses, base: DocumentLosses) -> dict[str, Any]:
    gap, interval = difference(losses, base), loss_interval(losses)
    return {
        "name": name,
        "loss": losses.loss,
        "interval": None if interval is None else list(interval),
        "perplexity": losses.perplexity,
        "accuracy": losses.accuracy,
        "difference_to_float": gap.value,
        "difference_interval": gap.interval,
    }


def _finite(value: Any) -> Any:
    """NaN has no place in JSON: null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, (list, tuple)) else value


def write_summary(summary: Mapping[str, Any], path: Path) -> None:
    """Write `summary` as JSON, atomically."""
    temporary = path.with_suffix(".json.tmp")
    temporary.write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n")
    os.replace(temporary, path)
