"""Choose the width of each layer for a LightningModule, once a run: a resumed one goes on with the first choice."""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from qat.calibration.method import described
from qat.callbacks.batches import muted
from qat.callbacks.quantization import QuantizationAwareTraining
from qat.diagnosis import WidthSearch, assign, frontier, measure
from qat.diagnosis.sensitivity import write_table
from qat.evaluation.losses import to_device
from qat.scheme import SchemeMap

log = logging.getLogger(__name__)


def search_widths(
    search: WidthSearch,
    pl_module: L.LightningModule,
    trainer: L.Trainer,
    quantization: QuantizationAwareTraining,
    path: Path,
    weights: str,
    keep: bool = False,
) -> tuple[SchemeMap, dict[str, Any]]:
    """Measure sensitivities on the calibration split, or read them, and assign widths, or read which were.

    Args:
        search: what is searched.
        pl_module: float; called with a batch, it returns logits (batch, tokens, classes).
        trainer: with data attached.
        quantization: knows which part of the module is quantized.
        path: of the table of sensitivities and the assignment, JSON.
        weights: digest of the module's weights.
        keep: an assignment that is there stands, whatever would be found now: its run has trained with it.

    Returns:
        The map, and the facts for the summary: `sensitivity`, `frontier`, `budget_bits` and `sensitivity_metric`.

    Raises:
        ValueError: as `search.groups` and `search.budget`.
    """
    trainer.precision_plugin.convert_module(pl_module)
    pl_module.to(trainer.strategy.root_device).eval()
    batches = list(trainer.datamodule.calibration_dataloader())  # type: ignore[attr-defined]

    def forward(batch: Any) -> Tensor:
        with trainer.precision_plugin.forward_context(), muted(pl_module):
            return pl_module(trainer.precision_plugin.convert_input(to_device(batch, pl_module)))

    model = quantization.quantized(pl_module)
    groups = search.groups(model)
    budget = search.budget(groups)
    table = json.loads(path.read_text()) if keep and path.is_file() else {}
    if "widths" not in table:
        table = measure(model, search, batches, forward, path, _key(search, batches, weights))
    costs: dict[str, dict[int, float]] = {group.name: {} for group in groups}
    for row in table["rows"]:
        costs[row["name"]][row["bits"]] = row[search.metric]
    sizes = {group.name: group.bytes for group in groups}
    asked = {"budget_bits": search.budget_bits, "metric": search.metric}
    if "widths" not in table or (table["asked"] != asked and not keep):
        chosen = assign(costs, sizes, budget)
        table |= {"asked": asked, "widths": {name: chosen[group.name] for group in groups for name in group.layers}}
        write_table(table, path)
    widths: dict[str, int] = table["widths"]
    chosen = {group.name: widths[group.layers[0]] for group in groups}
    total = sum(group.weights for group in groups)
    size = sum(group.bytes[chosen[group.name]] for group in groups)
    predicted = sum(costs[name][bits] for name, bits in chosen.items())
    log.info("%.4f bits a weight, scales included: %s", 8 * size / total, _counted(chosen))
    points = [("best", 8 * b / total, cost) for b, cost in frontier(costs, sizes)]
    points += [
        (f"{bits} bits", 8 * sum(s[bits] for s in sizes.values()) / total, sum(c[bits] for c in costs.values()))
        for bits in search.widths
    ]
    points.append(("chosen", 8 * size / total, predicted))
    facts = {
        "budget_bits": search.budget_bits,
        "sensitivity_metric": search.metric,
        "sensitivity": [{**row, "chosen_bits": chosen[row["name"]]} for row in table["rows"]],
        "frontier": [{"name": name, "bits": bits, "predicted": cost} for name, bits, cost in points],
    }
    return search.mixed(widths), facts


def _counted(chosen: dict[str, int]) -> str:
    counts = {bits: sum(b == bits for b in chosen.values()) for bits in sorted(set(chosen.values()))}
    return ", ".join(f"{count} groups at {bits}" for bits, count in counts.items())


def _key(search: WidthSearch, batches: list[Any], weights: str) -> str:
    """Identifies all that a measurement depends on; budget and metric only choose."""
    settings = {k: described(v) for k, v in vars(search).items() if k not in ("budget_bits", "metric")}
    total = hashlib.sha256(f"{sorted(settings.items())} {weights}".encode())
    for batch in batches:
        for name, tensor in sorted(batch.items()):
            total.update(f"{name} {tuple(tensor.shape)}".encode())
            total.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:16]
