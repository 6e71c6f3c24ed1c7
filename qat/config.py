"""Hydra glue: the config folders, recipes (ours and the user's) as the config group `recipe`, and errors that name the
nearest key.

Hydra accepts a misspelt key in a recipe silently; `unknown_keys` compares a composed config with what the
chosen group files and the signatures of their `_target_`s know.
"""

import difflib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Transformer
from hydra.errors import HydraException, OverrideParseException
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

_PACKAGE = Path(__file__).resolve().parent
# In a wheel conf/ and recipes/ lie inside the package; in a checkout, beside it.
ROOT = _PACKAGE if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent
CONF, RECIPES = ROOT / "conf", ROOT / "recipes"

_HYDRA_KEYS = {"_target_", "_partial_", "_convert_", "_recursive_", "_args_"}


def recipe_files() -> dict[str, Path]:
    """Every recipe by name: those that qat comes with, and those in a folder recipes/ of the working directory.

    Raises:
        ValueError: one of the user's is called as another of ours.
    """
    files = {path.stem: path for path in sorted(RECIPES.glob("*.yaml"))}
    for path in sorted(Path("recipes").glob("*.yaml")):
        ours = files.setdefault(path.stem, path)
        if ours.read_bytes() != path.read_bytes():
            raise ValueError(f"{path} is called as a recipe that qat comes with, {ours}: give yours another name")
    return files


def register_recipes() -> None:
    """Register every recipe file as `recipe=<name>`.

    A Hydra search path maps a folder's own name to a group, so recipes/ on it could never answer
    to `recipe=`; and `-m 'recipe=glob(*)'` does not look into `hydra.searchpath` at all (1.3.8).
    """
    for name, path in recipe_files().items():
        ConfigStore.instance().store(
            group="recipe", name=name, node=OmegaConf.load(path), package="_global_", provider=str(path)
        )


def choices() -> dict[str, list[str]]:
    """What every config group offers: {"recipe": [...], "quant": [...], ...}."""
    folders = sorted(folder for folder in CONF.iterdir() if folder.is_dir())
    groups = {folder.name: sorted(p.stem for p in folder.glob("*.yaml")) for folder in folders}
    return {"recipe": sorted(recipe_files()), **groups}


def check_overrides(overrides: list[str]) -> None:
    """Compose what a command line asks for, once for each value of a sweep's choices, and check it.

    Args:
        overrides: `key=value` words; commas separate the values of a sweep.

    Raises:
        ValueError: an unknown group choice or key, on the command line or in a recipe, with the nearest name.
    """
    known = choices()
    jobs = list(_jobs(overrides, known))
    for key, choice in (word.partition("=")[::2] for job in jobs for word in job):
        if key in known and choice and choice[0] not in "[{" and choice not in known[key]:
            raise ValueError(f"no {key} is called {choice!r}{_nearest(choice, known[key], everything=True)}")
    for job in jobs:
        _check_job(job)


def _check_job(overrides: list[str]) -> None:
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
            config = compose("config", overrides=overrides, return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(_explain(error, overrides)) from error
    chosen = dict(config.hydra.runtime.choices)
    with_hydra: Any = OmegaConf.to_container(config, resolve=False)
    with_hydra.pop("hydra")
    ours = OmegaConf.create(with_hydra)
    if missing := list(_missing(ours)):
        raise ValueError(f"{' and '.join(missing)} must be given: {missing[0]}=...")
    problems = list(unknown_keys(ours, chosen))
    if problems:
        raise ValueError("unknown configuration keys (in a recipe, or added with +):\n  " + "\n  ".join(problems))


def _jobs(overrides: list[str], known: dict[str, list[str]]) -> Iterator[list[str]]:
    """The command lines of a sweep that differ in what can be wrong: each choice of a group, one at a time."""
    words = [_values(w, known) for w in overrides if not w.startswith(("hydra", "+hydra", "~hydra"))]
    yield [values[0] for values in words]
    for index, values in enumerate(words):
        if values[0].partition("=")[0] in known:
            for value in values[1:]:
                yield [v[0] for v in words[:index]] + [value] + [v[0] for v in words[index + 1 :]]


def _values(word: str, known: dict[str, list[str]]) -> list[str]:
    """The single overrides that a sweep's word stands for: `seed=0,1`, `seed=range(2)`, `recipe=glob(*)`."""
    try:
        override = OverridesParser.create().parse_override(word)
    except HydraException:
        return [word]  # `compose` will say what is wrong with it
    if not override.is_sweep_override():
        return [word]
    key, swept = override.get_key_element(), override.value()
    if isinstance(swept, Glob):
        return [f"{key}={name}" for name in swept.filter(known.get(key, []))] or [word]
    return [f"{key}={value}" for value in override.sweep_iterator(transformer=Transformer.encode)]


def unknown_keys(config: DictConfig, chosen: dict[str, str]) -> Iterator[str]:
    """The keys of a composed `config` that no group file and no `_target_` knows, each with its nearest name."""
    base: Any = OmegaConf.load(CONF / "config.yaml")
    base.pop("defaults")
    for group, choice in chosen.items():
        file = CONF / group / f"{choice}.yaml"
        if file.is_file() and group != "sweep":
            base[group] = OmegaConf.load(file)
    yield from _unknown(config, base, "")


def _unknown(node: Any, base: Any, prefix: str) -> Iterator[str]:
    if not isinstance(node, DictConfig) or node._is_none() or node._is_missing():
        return
    known = set(base) if isinstance(base, DictConfig) and not base._is_none() else set()
    free = isinstance(base, DictConfig) and not known and bool(prefix)  # `{}` in a group file: names are the user's
    target = node.get("_target_")
    if target is not None:
        parameters = inspect.signature(get_object(target)).parameters
        free = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        known |= set(parameters) | _HYDRA_KEYS
    elif base is None and prefix:
        free = True
    key: Any  # strings; OmegaConf would allow more
    for key in node:
        if key not in known and not free:
            yield f"{prefix}{key}{_nearest(str(key), sorted(map(str, known - _HYDRA_KEYS)))}"
        elif not OmegaConf.is_interpolation(node, key):
            yield from _unknown(
                node._get_node(key), base.get(key) if isinstance(base, DictConfig) else None, f"{prefix}{key}."
            )


def _nearest(word: str, names: list[str], everything: bool = False) -> str:
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]}?" if close else ""
    return hint + (f" There are: {', '.join(names)}" if everything or not close else "")


def _explain(error: Exception, overrides: list[str]) -> str:
    """Hydra's message, with the nearest known key for each override that it cannot place."""
    if isinstance(error, OverrideParseException):
        return f"cannot read {error.override}: a value with special characters needs quotes, 'key=\"value\"'"
    lines = [str(error).splitlines()[0]]
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        groups = [w for w in overrides if w.partition("=")[0] in choices()]
        try:
            known = list(_dotted(compose("config", overrides=groups)))
        except (HydraException, OmegaConfBaseException):
            return lines[0]
    for word in overrides:
        key = word.partition("=")[0].lstrip("+~")
        if key not in known and key not in choices():
            lines.append(f"{key}{_nearest(key, known) if difflib.get_close_matches(key, known, cutoff=0.5) else ''}")
    return "; ".join(lines)


def _dotted(node: DictConfig, prefix: str = "") -> Iterator[str]:
    key: Any
    for key in node:
        yield f"{prefix}{key}"
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not child._is_none():
            yield from _dotted(child, f"{prefix}{key}.")


def _missing(node: DictConfig, prefix: str = "") -> Iterator[str]:
    """The dotted names of all keys that must be given; nothing is resolved on the way, and a key may hold dots."""
    key: Any
    for key in node:
        child = node._get_node(key)
        if OmegaConf.is_missing(node, key):
            yield f"{prefix}{key}"
        elif isinstance(child, DictConfig) and not child._is_none():
            yield from _missing(child, f"{prefix}{key}.")
