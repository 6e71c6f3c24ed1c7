"""The Hydra main: refuse a wrong command line, compose a config, run the stages of `qat.stages`."""

import logging
import os
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig

from qat.config import CONF, check_overrides, register_recipes
from qat.resume import alone

log = logging.getLogger("qat")

# Of Hydra's options: those that only show something, those that bring configs of the user's, and all that take a value.
_SHOWN = {"--help", "-h", "--hydra-help", "--version", "--shell-completion", "-sc", "--cfg", "-c", "--info", "-i"}
_ELSEWHERE = {"--config-dir", "-cd", "--config-path", "-cp", "--config-name", "-cn"}
_VALUED = {*_ELSEWHERE, "--package", "-p", "--experimental-rerun", "--cfg", "-c"}
_failed: list[str] = []  # jobs of the sweep under way, each with its error


def main() -> None:
    """`python train.py ...` and `qat train ...`: checks the command line first, then hands it to Hydra."""
    options = {w.partition("=")[0] for w in sys.argv[1:] if w.startswith("-")}
    words = [w for before, w in pairwise(sys.argv) if not w.startswith("-") and before not in _VALUED]
    try:
        register_recipes()
        if not _SHOWN & options:
            if not _ELSEWHERE & options:  # a folder of configs that only Hydra knows
                check_overrides(words)
            _check_folder(words)
    except ValueError as error:
        sys.exit(f"error: {error}")
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # ours are caught in _job; the rest are bugs and need their trace
    _failed.clear()
    try:
        _hydra_main()
    except Exception:
        if not _failed:
            raise
        sys.exit(f"error: {len(_failed)} of the sweep's jobs failed:\n  " + "\n  ".join(_failed))


def _check_folder(words: list[str]) -> None:
    """Refuse to start in a run folder that holds a run, or to resume one that is not there, before Hydra writes."""
    given = dict(w.split("=", 1) for w in words if "=" in w)
    folder = Path(given.get("hydra.run.dir", ""))
    if given.get("resume", "false").lower() == "true":
        if "hydra.run.dir" not in given:
            raise ValueError("resume=true needs hydra.run.dir=FOLDER: which run goes on")
        if not folder.is_dir():
            raise ValueError(f"resume=true: there is no run folder {folder}")
    elif "hydra.run.dir" in given and _holds_a_run(folder):
        raise ValueError(
            f"the run folder {folder} exists and holds a run: choose another hydra.run.dir, or go on with it by "
            "resume=true"
        )
    if "hydra.run.dir" in given and folder.is_dir():
        with alone(folder):
            pass


def _holds_a_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("summary.json", "checkpoints", "export"))


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def _hydra_main(cfg: DictConfig) -> None:
    now = HydraConfig.get()
    try:
        run(cfg, Path(now.runtime.output_dir))
        return
    except Exception as error:
        ours = isinstance(error, (ValueError, OSError, InstantiationException)) and not os.environ.get("QAT_TRACEBACK")
        cause = error.__cause__ if isinstance(error, InstantiationException) and error.__cause__ else error
        if now.mode != RunMode.MULTIRUN:
            if ours:
                sys.exit(f"error: {cause}")
            raise
        log.error("error: %s", cause, exc_info=not ours)
        _failed.append(f"{now.runtime.output_dir}: {cause if ours else repr(cause)}")
    # Hydra runs the later jobs, then raises the first job's error: one without the frames that hold a model.
    raise RuntimeError(_failed[-1])


def run(cfg: DictConfig, out: Path) -> dict[str, Any]:
    """Run all stages of a composed config.

    Args:
        cfg: as `conf/config.yaml` composes it.
        out: the run's folder.

    Returns:
        The summary, as it was written to out/summary.json.

    Raises:
        ValueError: bad input, before anything long starts wherever it can be known.
    """
    from qat.stages import Run  # torch and lightning: seconds, and not needed to refuse a config

    if _holds_a_run(out) and not cfg.resume:
        raise ValueError(f"the run folder {out} holds a run: choose another, or go on with it by resume=true")
    with alone(out):
        return Run(cfg, out).all()


if __name__ == "__main__":
    main()
