"""Weights & Biases without surprises: online with an API key, offline without, never a prompt."""

import logging
import netrc
import os
from typing import Any

import wandb
from lightning.pytorch.loggers import WandbLogger

log = logging.getLogger(__name__)


def wandb_logger(**settings: Any) -> WandbLogger:
    """A WandbLogger; offline unless `WANDB_API_KEY` or ~/.netrc has a key, or WANDB_MODE says otherwise.

    Args:
        settings: of `lightning.pytorch.loggers.WandbLogger`.
    """
    if "WANDB_MODE" not in os.environ and not _has_key():
        settings["offline"] = True
        log.info("no W&B API key: logging offline to %s (later: wandb sync)", settings.get("save_dir", "."))
    os.environ.setdefault("WANDB_SILENT", "true")
    wandb.finish()  # the run of a sweep's job before this one, which Lightning would go on with
    return WandbLogger(**settings)


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False
