"""A run goes on with what it started with: a resumed one that was told otherwise is refused before anything is lost."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf

RECORD = "run.json"

# What may differ between a run and its continuation: nothing that a weight or a figure depends on.
_FREE = (
    "resume", "logger", "checkpoint_every", "control", "control_lr", "control_dir", "export_dtype", "export_bits",
    "recipe", "sweep", "callbacks.health",
    "trainer.accelerator", "trainer.devices", "trainer.log_every_n_steps", "trainer.enable_model_summary",
    "trainer.enable_progress_bar",
)  # fmt: skip

# Of these, what a figure does depend on.
_MEASURED = ("control", "control_lr", "export_dtype", "export_bits", "trainer.accelerator")


def experiment(cfg: DictConfig, overrides: Iterable[str]) -> dict[str, Any]:
    """What a summary says of its run's config, so that repetitions are known and other runs told apart.

    Args:
        cfg: as composed.
        overrides: those that it was composed with, as `optim.lr=1e-4`.

    Returns:
        `config_digest`, equal for runs that differ in their seed and in what no figure depends on; and `overrides`,
        without those.
    """
    silent = tuple(name for name in _FREE if name not in _MEASURED)
    plain: Any = OmegaConf.to_container(OmegaConf.merge(cfg, {"seed": 0}), resolve=True)  # and what is set to the seed
    settings = json.dumps(dict(_flat(plain, free=silent)), sort_keys=True, default=str)
    named = {word: word.lstrip("+~").partition("=")[0] for word in overrides}
    free = ("seed", *silent)
    told = [w for w, key in named.items() if not any(key == name or key.startswith(f"{name}.") for name in free)]
    return {"config_digest": hashlib.sha256(settings.encode()).hexdigest()[:16], "overrides": told}


def check_resume(out: Path, cfg: DictConfig, **digests: str) -> None:
    """Write the record of a run that starts in `out`; compare one that is resumed with its record.

    Args:
        out: the run's folder.
        cfg: as composed.
        digests: of what the config only names, such as the model's weights.

    Raises:
        ValueError: something that the trained weights depend on has changed; names the key and both values.
    """
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    named = {f"digest of {name}": value for name, value in digests.items()}
    # What training starts from depends on it, if that is the control.
    free = tuple(name for name in _FREE if name != "control_lr" or cfg.get("start") != "control")
    now = json.loads(json.dumps(dict(_flat({**plain, **named}, free=free)), default=str))  # as it will be read back
    path = out / RECORD
    if not cfg.resume or not path.exists():  # what was refused or killed before its first step left a record too
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(now, indent=1) + "\n")
        os.replace(temporary, path)
        return
    before = {"start": "float", **json.loads(path.read_text())}  # of runs that had no choice
    now = {"start": "float", **now}
    for key in [*now, *before]:
        if now.get(key) != before.get(key):
            raise ValueError(
                f"{out} was started with {key}={before.get(key)}, and resume=true goes on with that, not with "
                f"{now.get(key)}: leave {key} as it was, or start a new run in another hydra.run.dir"
            )


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a run's folder, which is created, against other processes; a kill lets it go.

    Raises:
        ValueError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        held = FileLock(folder / ".lock").acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"another process runs in {folder}: wait until it has ended, or choose another hydra.run.dir"
        ) from None
    with held:
        yield


def _flat(node: Any, prefix: str = "", free: tuple[str, ...] = _FREE) -> Iterator[tuple[str, Any]]:
    """(dotted key, plain value) of every leaf but those of `free`: which a continuation may not change."""
    for key, value in node.items():
        name = f"{prefix}{key}"
        if name in free or name.startswith("hydra"):
            continue
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{name}.", free)
        else:
            yield name, value
