"""What a run refuses before anything long: choices that do not fit each other, the model or the steps."""

from typing import Any

import lightning as L
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from qat.callbacks import QuantizationAwareTraining, Trainable
from qat.diagnosis import WidthSearch
from qat.export import check_exportable
from qat.insertion import plan
from qat.scheme import SchemeMap


def check(
    cfg: DictConfig,
    task: L.LightningModule,
    schemes: SchemeMap,
    search: WidthSearch | None,
    quantization: QuantizationAwareTraining,
    trainable: Trainable,
) -> None:
    """Refuse what does not fit together.

    Args:
        cfg: composed.
        task: around the float model.
        schemes: of its layers; where widths are searched, the smallest that may be found.
        search: of widths, if there is one.
        quantization: how its layers are quantized.
        trainable: what learns.

    Raises:
        ValueError: names the setting and the remedy.
    """
    steps = cfg.trainer.max_steps
    _check_choices(cfg, schemes)
    _check_trainable(cfg, schemes, search, trainable)
    if schemes.quantizes:
        quantized = quantization.quantized(task)
        if search is not None:
            search.budget(search.groups(quantized))
        chosen = plan(quantized, schemes, quantization.estimator, quantization.input_estimator)
        half = {"bf16-true": torch.bfloat16, "16-true": torch.float16}.get(cfg.trainer.precision)
        model: Any = task.model
        check_exportable(schemes, chosen, export_dtype(cfg) or half or model.dtype, cfg.export_bits)
        quantization.calibration.check(quantized)
        if steps > 0:
            quantization.check_schedule(steps)
        trainable.check(quantized, chosen, quantization)
        instantiate(cfg.callbacks.nested).check(chosen)
        instantiate(cfg.callbacks.oscillation).check(quantization.estimator, trainable.weights_learn)
    instantiate(cfg.objective).check(task, quantization if schemes.quantizes else None, schemes.quantizes)


def export_dtype(cfg: DictConfig) -> torch.dtype | None:
    """Of what is not quantized; None as it is trained."""
    name = cfg.export_dtype
    if name not in (None, "bfloat16", "float16", "float32"):
        raise ValueError(f"export_dtype must be bfloat16, float16, float32 or null, got {name!r}")
    return getattr(torch, name) if name else None


def _check_choices(cfg: DictConfig, schemes: SchemeMap) -> None:
    steps = cfg.trainer.max_steps
    if steps == 0 and not schemes.quantizes:
        raise ValueError("trainer.max_steps=0 quantizes without training, and quant=none quantizes nothing")
    if cfg.control not in ("run", "cached", "none"):
        raise ValueError(f"control must be run, cached or none, got {cfg.control!r}")
    if cfg.start not in ("float", "control"):
        raise ValueError(f"start must be float or control, got {cfg.start!r}")
    if cfg.start == "control" and (cfg.control == "none" or not schemes.quantizes or steps == 0):
        raise ValueError(
            "start=control quantizes the float control and trains on: it needs a scheme, steps and control=cached"
        )


def _check_trainable(cfg: DictConfig, schemes: SchemeMap, search: WidthSearch | None, trainable: Trainable) -> None:
    steps, learn = cfg.trainer.max_steps, trainable.weights_learn
    if not schemes.quantizes and not learn:
        raise ValueError("quant=none trains no adapter (peft does, of a float model) and no scale: trainable=all")
    if steps == 0 and not learn:
        raise ValueError("trainer.max_steps=0 trains nothing, so trainable=all is all there is to say of it")
    if cfg.repeat_search and (search is None or steps == 0 or not learn):
        raise ValueError("repeat_search needs quant=auto, and steps in which weights learn: set it false")
