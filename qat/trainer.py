"""The trainer that every stage of a run uses: checkpoints, guards, and how a stopped run goes on."""

import shlex
import sys
from pathlib import Path
from typing import Any

import lightning as L
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import DictConfig

from qat.callbacks import NaNGuard, RandomState, SafeExit
from qat.config import CONF


def build_trainer(
    cfg: DictConfig, out: Path, checkpoints: Path, callbacks: list[L.Callback], **settings: Any
) -> L.Trainer:
    """The trainer of `cfg.trainer` with `callbacks` and, after them, the guards of every run.

    Args:
        cfg: composed.
        out: the run's folder.
        checkpoints: where its checkpoints go, the last one only.
        settings: arguments of `lightning.Trainer` that replace those of the config.
    """
    every = ModelCheckpoint(
        dirpath=checkpoints,
        filename="last",
        every_n_train_steps=cfg.checkpoint_every,
        save_top_k=1,
        enable_version_counter=False,
    )
    trainer = cfg.trainer
    # The data is endless; told where the run ends, the progress bar knows what is left.
    settings = {"limit_train_batches": trainer.max_steps * trainer.accumulate_grad_batches, **settings}
    guards = [RandomState(cfg.seed), NaNGuard(), SafeExit(checkpoints / "last.ckpt", resume_command(out)), every]
    # Partial: given as overrides, the objects would pass through OmegaConf, which takes a DummyLogger for a type.
    build = instantiate(trainer, _partial_=True)
    return build(callbacks=[*callbacks, *guards], default_root_dir=str(out), **settings)


def check_devices(trainer: DictConfig) -> None:
    """Refuse settings of `lightning.Trainer` that would start several processes.

    Raises:
        ValueError: names them, and what to do instead.
    """
    built = instantiate(trainer, logger=False, enable_checkpointing=False)
    processes = built.num_devices * built.num_nodes
    if processes > 1:
        raise ValueError(
            f"trainer.devices={trainer.devices} comes to {processes} processes, and a run is one: use "
            "trainer.devices=1, and trainer.accumulate_grad_batches for larger batches"
        )


def resume_command(out: Path) -> str:
    """What goes on with the run in `out`, for a shell; with the user's own folders of configs, by absolute paths."""
    now = HydraConfig.get()
    options = [f"--config-name={now.job.config_name}"] if now.job.config_name != "config" else []
    for source in now.runtime.config_sources:
        if source.provider == "main" and Path(source.path) != CONF:
            options.append(f"--config-path={source.path}")
        if source.provider == "command-line":
            options.append(f"--config-dir={source.path}")
    words = [w for w in now.overrides.task if not w.startswith("resume=")]
    program = ["qat", "train"] if sys.argv[0] == "qat train" else ["python", sys.argv[0]]
    return shlex.join([*program, *options, *words, f"hydra.run.dir={out}", "resume=true"])
