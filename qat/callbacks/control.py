"""The float control: the same model fine-tuned for the same steps on the same batches, trained once and kept.

Without it a recovery means nothing: fine-tuning alone moves the loss by more than INT4 costs.  A control is
known by the hash of everything that its weights depend on, so that all jobs of a sweep share one.
"""

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from filelock import FileLock, Timeout
from safetensors.torch import load_file, save_file
from torch import nn

from qat.calibration import Calibration
from qat.callbacks.measure import Measure, Measured
from qat.callbacks.quantization import QuantizationAwareTraining
from qat.callbacks.recovery import Control

log = logging.getLogger(__name__)

WEIGHTS = "control.safetensors"
_SHOWN = ("enable_", "log_every", "num_sanity", "val_", "check_val")


def weights_digest(model: nn.Module) -> str:
    """SHA-256 (hex, 16 digits) of all parameters and buffers of `model`, names included."""
    total = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:16]


def control_folder(root: Path, trainer: Mapping[str, Any], **inputs: Any) -> Path:
    """Where the control that depends on `inputs` (plain values: digests, rates, steps) is kept under `root`.

    Args:
        trainer: arguments of `lightning.Trainer`; those that only show or measure do not count.
    """
    inputs["trainer"] = {k: v for k, v in trainer.items() if not k.startswith(_SHOWN)}
    return root / hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()[:16]


@contextmanager
def hold_control(folder: Path, cached: bool) -> Iterator[bool]:
    """Keep other processes from training the control of `folder`, which is created; waits for one that does.

    Args:
        cached: one that was trained before will do.

    Returns:
        Whether there is such a one, which nothing is held for.
    """
    weights = folder / WEIGHTS
    if cached and weights.exists():
        yield True
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        held = lock.acquire(timeout=0)
    except Timeout:
        log.info("waiting for another run, which trains the same control")
        held = lock.acquire()
    with held:
        yield cached and weights.exists()


def train_control(
    folder: Path, pl_module: L.LightningModule, data: L.LightningDataModule, trainer: Callable[..., L.Trainer]
) -> None:
    """Train `pl_module` in float and keep its weights in `folder`; goes on where a killed run left off.

    Args:
        folder: of this control; created.
        pl_module: the untrained module; it is trained in place.
        data: the batches that QAT will see.
        trainer: (checkpoint folder) -> Trainer with the settings of the QAT run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    checkpoints = folder / "checkpoints"
    last = checkpoints / "last.ckpt"
    trainer(checkpoints).fit(pl_module, data, ckpt_path=str(last) if last.exists() else None, weights_only=False)
    with tempfile.NamedTemporaryFile(dir=folder, delete=False) as temporary:
        pass
    shared = {n: t.detach().to("cpu", copy=True).contiguous() for n, t in pl_module.state_dict().items()}
    save_file(shared, temporary.name)
    os.replace(temporary.name, folder / WEIGHTS)
    for checkpoint in checkpoints.glob("*.ckpt"):
        checkpoint.unlink(missing_ok=True)  # another job of a sweep may have trained the same


def load_control(path: Path, pl_module: L.LightningModule) -> None:
    """Overwrite the weights of `pl_module` with the trained control's, of this file."""
    pl_module.load_state_dict(load_file(path))


def keep_control(folder: Path, path: Path) -> None:
    """Make `path` a file of the control's weights that lasts, whatever becomes of those in `folder`."""
    temporary = path.with_suffix(".tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(folder / WEIGHTS, temporary)
    except OSError:  # on another disk
        shutil.copyfile(folder / WEIGHTS, temporary)
    os.replace(temporary, path)


def measure_control(
    pl_module: L.LightningModule,
    trainer: L.Trainer,
    quantization: QuantizationAwareTraining,
    calibrations: list[Calibration],
) -> Control:
    """Losses of the control in float and after each calibration; the best one on the validation split stands.

    Args:
        pl_module: holding the control's weights; fake quantizers are inserted into it.
        trainer: with data attached.
        quantization: whose scheme is measured.
        calibrations: post-training quantizations to choose from.  One that changes weights and cannot treat these is
            left out, and the log says why: nobody asked for it, and the control took long to train.
    """
    measure = Measure.before_fit(trainer, pl_module, quantization)
    in_float = measure.in_float("control")
    tried: dict[str, Measured] = {}
    for calibration in calibrations:
        try:
            tried[calibration.name] = measure.post_training(f"control, {calibration.name}", calibration)
        except ValueError as error:
            if not calibration.changes_weights:
                raise
            log.warning("PTQ of the control: %s is left out: %s", calibration.name, error)
    best = min(tried, key=lambda name: tried[name]["validation"].loss)
    losses = ", ".join(f"{name} {measured['validation'].loss:.4f}" for name, measured in tried.items())
    log.info("PTQ of the control on the validation split: %s; %s stands", losses, best)
    return Control(in_float, tried[best], best)
