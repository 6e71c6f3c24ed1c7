"""What a group of layers costs when it alone is quantized, at each width.

    kl      KL(float || quantized) of the next token's distribution: never negative, and free of the luck of the labels
    loss    rise of the loss on the labels, which also moves to first order where the model is not at its optimum
    fisher  1/2 * (Tr F / n) * ||Q(W) - W||^2, summed over the layers: HAWQ-V2's metric (arXiv 1911.03852: the mean
            of the Hessian's diagonal times the squared error) with the Fisher information for the Hessian, and the
            factor 1/2 of its Taylor series

All in nats per token, on the calibration split.  For each width the whole model is calibrated once; then the quantized
weights of one group at a time take the place of the float ones.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn import functional as F

from qat.diagnosis.fisher import IGNORE, fisher_traces
from qat.diagnosis.widths import Group, WidthSearch
from qat.estimators import LSQPlus
from qat.fake_quantizer import Stage, token_mask
from qat.functional import fake_quantize
from qat.insertion import insert, layers, remove

log = logging.getLogger(__name__)

_CHUNK = 1 << 22  # logits compared at a time, in float64: bounds the memory to a few times 32 MB

Forward = Callable[[Any], Tensor]
"""Batch -> logits (batch, tokens, classes)."""


def measure(
    model: nn.Module,
    search: WidthSearch,
    batches: Sequence[Any],
    forward: Forward,
    path: Path | None = None,
    key: str = "",
) -> dict[str, Any]:
    """The sensitivity of every group of `model` at every width.

    Costs two copies of the quantized layers' weights; `model` is put back bit for bit.

    Args:
        model: float, in evaluation mode.
        search: which layers, widths and calibration.
        batches: of the calibration split, mappings with `labels` (batch, tokens) and, where there is padding,
            `attention_mask`; all of them calibrate, the first `search.windows` windows are measured.
        forward: runs a batch through the whole of what `model` is a part of.
        path: a JSON file that is written, atomically, after every width, so that a killed measurement goes on.
        key: identifies what the measurement depends on; a file with another key is measured anew.

    Returns:
        Plain values: `key`, `traces` by layer, and `rows`: one mapping for each group and width with `name`, `bits`,
        `bytes`, `kl`, `loss` and `fisher`.

    Raises:
        ValueError: from `search.groups` or its calibration.
    """
    groups, measured = search.groups(model), _first(batches, search.windows)
    table = read_table(path, key) if path is not None else None
    if table is None:
        table = {"key": key, "traces": None, "rows": []}
    weights = {n: model.get_submodule(n).weight for group in groups for n in group.layers}
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("sensitivity", total=len(search.widths) * (len(groups) + 1) * len(measured))
        if table["traces"] is None:
            table["traces"] = fisher_traces(weights, measured, forward)  # type: ignore[arg-type]
        for bits in search.widths:
            steps = (len(groups) + 1) * len(measured)
            if all(row["bits"] != bits for row in table["rows"]):
                progress.update(task, description=f"sensitivity, {bits} bits")
                inserted = _Inserted(model, search, bits)
                with inserted.calibrated(batches, forward, path):
                    found = inserted.costs(groups, measured, forward, lambda: progress.advance(task))
                    errors = inserted.errors()
                table["rows"] += [_row(g, bits, found[g.name], errors, table["traces"], weights) for g in groups]
                if path is not None:
                    write_table(table, path)
                    shutil.rmtree(path.parent / "calibration" / f"width-{bits}", ignore_errors=True)  # a model's size
            else:
                progress.advance(task, steps)
    return table


def _row(group: Group, bits: int, found: dict[str, float], errors: Any, traces: Any, weights: Any) -> dict[str, Any]:
    fisher = sum(0.5 * traces[n] / weights[n].numel() * errors[n] for n in group.layers)
    return {"name": group.name, "bits": bits, "bytes": group.bytes[bits], **found, "fisher": fisher}


class _Inserted:
    """`model` with all its layers `bits` wide while `calibrated` lasts, but computing in float where not told else."""

    def __init__(self, model: nn.Module, search: WidthSearch, bits: int):
        self.model, self.search, self.bits = model, search, bits

    @contextmanager
    def calibrated(self, batches: Sequence[Any], forward: Forward, path: Path | None) -> Iterator[None]:
        """Within, the quantized weights of all layers are known, and the model holds the float ones."""

        @torch.no_grad()
        def run() -> None:
            for batch in batches:
                with token_mask(batch.get("attention_mask")):
                    forward(batch)

        insert(self.model, self.search.uniform(self.bits), LSQPlus())  # nothing is trained; it refuses no zero point
        self.layers = layers(self.model)
        self.float = {name: layer.weight.detach().clone() for name, layer in self.layers.items()}
        try:
            folder = None if path is None else path.parent / "calibration" / f"width-{self.bits}"
            self.search.calibration(self.model, run, folder)
            self.quantized = {name: layer.weight.detach().clone() for name, layer in self.layers.items()}
            self._put(self.float)
            yield
        finally:
            self._put(self.float)
            remove(self.model)

    @torch.no_grad()
    def _put(self, weights: dict[str, Tensor]) -> None:
        for name, weight in weights.items():
            self.layers[name].weight.copy_(weight)

    @contextmanager
    def _only(self, group: Group) -> Iterator[None]:
        """Within, the layers of `group` are quantized, and no others."""
        self._put({name: self.quantized[name] for name in group.layers})
        self._set(group, Stage.FROZEN)
        try:
            yield
        finally:
            self._set(group, Stage.FLOAT)
            self._put({name: self.float[name] for name in group.layers})

    def _set(self, group: Group, stage: Stage) -> None:
        for name in group.layers:
            for quantizer in self.layers[name].quantizers:
                quantizer.set_stage(stage)

    @torch.no_grad()
    def costs(
        self, groups: Sequence[Group], batches: Sequence[Any], forward: Forward, advance: Callable[[], None]
    ) -> dict[str, dict[str, float]]:
        """`kl` and `loss` of each group, nats per token."""
        sums = {group.name: torch.zeros(2, dtype=torch.float64) for group in groups}
        tokens = 0
        for batch in batches:
            base = forward(batch)
            labels = batch["labels"].to(base.device)
            known = labels != IGNORE
            tokens += int(known.sum())
            advance()
            for group in groups:
                with self._only(group):
                    sums[group.name] += _compared(base[known], forward(batch)[known], labels[known])
                advance()
        return {
            name: {"kl": float(total[0]) / tokens, "loss": float(total[1]) / tokens} for name, total in sums.items()
        }

    @torch.no_grad()
    def errors(self) -> dict[str, float]:
        """||Q(W) - W||^2 of each layer."""
        found = {}
        for name, layer in self.layers.items():
            matrix, original = layer.as_matrix(self.quantized[name]), layer.as_matrix(self.float[name])
            scale = layer.weight_quantizer.weight_scale(matrix).expand(len(matrix), -1)
            quantized = fake_quantize(matrix, scale, layer.scheme.weight)
            found[name] = float((quantized.float() - original.float()).square().sum())
        return found


def _compared(base: Tensor, ours: Tensor, labels: Tensor) -> Tensor:
    """Sums of KL(base || ours) and of the rise of the loss, (2,), float64, on the CPU, of logits (tokens, classes)."""
    total = torch.zeros(2, dtype=torch.float64)
    rows = max(1, _CHUNK // base.shape[-1])
    for b, o, y in zip(base.split(rows), ours.split(rows), labels.split(rows), strict=True):
        b, o = F.log_softmax(b.double(), -1), F.log_softmax(o.double(), -1)
        difference = b - o
        total += torch.stack([(b.exp() * difference).sum(), difference.gather(1, y[:, None]).sum()]).cpu()
    return total


def _first(batches: Sequence[Any], windows: int) -> list[Any]:
    """The first `windows` windows of `batches`."""
    kept: list[Any] = []
    for batch in batches:
        if windows > 0:
            kept.append({name: tensor[:windows] for name, tensor in batch.items()})
            windows -= len(batch["labels"])
    return kept


def read_table(path: Path, key: str) -> dict[str, Any] | None:
    """What `measure` wrote to `path`, or None where there is no file of this `key`."""
    if not path.is_file():
        return None
    table = json.loads(path.read_text())
    if table["key"] != key:
        log.warning("%s was measured on another model, data or settings: measured anew", path)
        return None
    return table


def write_table(table: dict[str, Any], path: Path) -> None:
    """Write `table` as JSON, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".json.tmp")
    temporary.write_text(json.dumps(table, indent=1, allow_nan=False) + "\n")
    os.replace(temporary, path)
