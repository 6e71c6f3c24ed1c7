"""Write a directory so that its final name either does not exist or holds all of it."""

import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

import qat

SIDE_FILE = "qat.json"
SIDE_VERSION = 1
WEIGHTS = "model.safetensors"
# Of what only qat can read: others would find a familiar name, and fill what they do not know with random values.
OWN_WEIGHTS = "qat.safetensors"


@contextmanager
def atomic_directory(
    target: str | Path, bytes_needed: int, refusal: tuple[type[Exception], ...] = ()
) -> Iterator[Path]:
    """A new directory beside `target` that takes its name when the block ends, or is removed if it fails.

    Args:
        target: must not exist.
        bytes_needed: what will be written, roughly; refused before the start if the disk has less.
        refusal: errors that say that all was written, but is not right: they leave it in `<target>.refused-...`.

    Yields:
        The directory to write into.

    Raises:
        ValueError: `target` exists.
        OSError: the disk is full, or writing failed; says where, how much is needed and how much is free.
    """
    target = Path(os.path.abspath(target))
    if target.exists():
        raise ValueError(f"{target} exists already; exports never overwrite: remove it or choose another name")
    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    if free < bytes_needed:
        raise OSError(errno.ENOSPC, _space(target, bytes_needed, free))
    partial = target.parent / f".{target.name}.partial-{secrets.token_hex(4)}"
    partial.mkdir()
    try:
        yield partial
        for path in partial.iterdir():
            _sync(path)
        _sync(partial)
        os.rename(partial, target)
        _sync(target.parent)
    except (OSError, SafetensorError) as error:
        # safetensors reports a full disk by its own exception
        free = shutil.disk_usage(target.parent).free
        number = getattr(error, "errno", None) or errno.EIO
        raise OSError(number, f"{_space(target, bytes_needed, free)}: {error}") from error
    except refusal as error:
        kept = partial.rename(target.parent / partial.name.removeprefix(".").replace(".partial-", ".refused-"))
        raise type(error)(
            f"{error}\nWhat was written is kept, to be looked at and not to be served, in {kept}"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def weights_file(directory: Path) -> Path:
    """Where the weights of an exported directory are."""
    return directory / (OWN_WEIGHTS if (directory / OWN_WEIGHTS).is_file() else WEIGHTS)


def write_weights(
    directory: Path,
    tensors: dict[str, Tensor],
    layers: Mapping[str, Any],
    provenance: Any,
    name: str = WEIGHTS,
    kv_cache: Mapping[str, Any] | None = None,
) -> None:
    """Write the weights, and the side file by which a reader knows that the directory is whole.

    Args:
        directory: existing, with all other files in it.
        tensors: by name; contiguous, none shared.
        layers: of the side file: the scheme, shape and trained dtype of each quantized layer.
        provenance: of the side file: where the model comes from; plain values.
        name: of the file of weights.
        kv_cache: of the side file: the spec of keys and values; None for float.
    """
    save_file(tensors, directory / name, metadata={"format": "pt"})
    files = sorted(path for path in directory.iterdir() if path.is_file())
    side = {
        "format_version": SIDE_VERSION,
        "qat_version": qat.__version__,
        "files": {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in files},
        "layers": dict(layers),
        "kv_cache": kv_cache,
        "provenance": provenance,
    }
    (directory / SIDE_FILE).write_text(json.dumps(side, indent=1) + "\n")
    # safetensors lets only the owner read its files; a server often runs as somebody else.
    shutil.copymode(directory / SIDE_FILE, directory / name)


def sha256(path: Path) -> str:
    """The hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _space(target: Path, needed: int, free: int) -> str:
    return f"could not write {target}: about {needed:,} bytes needed, {free:,} free in {target.parent}"


def _sync(path: Path) -> None:
    """Wait until `path`, a file or a directory, is on the disk: a rename must not overtake its contents."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
