"""The C++ kernels as a shared library: compiled at first use, kept on disk, found again by what it was made of."""

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "csrc" / "cpu"
# Without -march: the sources choose the instruction set at run time.  No fused multiply-add but where a kernel asks
# for it, or the portable path would round differently from one compiler to the next.
FLAGS = "-O3 -std=c++17 -fPIC -shared -fvisibility=hidden -w -fno-math-errno -fno-trapping-math -ffp-contract=off"


class BuildError(Exception):
    """The kernels could not be compiled or loaded; the message holds the command and the compiler's output."""


def compiler() -> list[str]:
    """The command of the C++ compiler: $CXX, else the first of c++, g++ and clang++ that is there.

    Raises:
        BuildError: there is none.
    """
    if asked := os.environ.get("CXX"):
        return shlex.split(asked)
    for name in ("c++", "g++", "clang++"):
        if found := shutil.which(name):
            return [found]
    raise BuildError("no C++ compiler: install g++ or clang++, or name one in CXX")


def cache_folder() -> Path:
    """Where compiled kernels are kept: $QAT_CACHE_DIR, else $XDG_CACHE_HOME/qat, else ~/.cache/qat."""
    if asked := os.environ.get("QAT_CACHE_DIR"):
        return Path(asked)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qat"


def load(extra_flags: tuple[str, ...] = ()) -> ctypes.CDLL:
    """The library, from the cache folder where it is there and whole, else compiled.

    A file is called KEY-DIGEST.so: the key is of the sources, compiler, flags and processor, the digest of the file
    itself, so that a damaged file is noticed before it is loaded.  It is written under another name and renamed:
    processes that compile at once each end with a whole file.

    Raises:
        BuildError: no compiler, or it failed, or its result cannot be loaded.
    """
    command = [*compiler(), *FLAGS.split(), *extra_flags]
    key = _key(command)
    folder = cache_folder()
    for path in sorted(_files(folder, key)):
        try:
            if _digest(path) == path.stem.partition("-")[2]:
                return ctypes.CDLL(str(path))
            log.warning("%s is damaged: compiling it again", path)
            path.unlink()
        except OSError as error:
            log.warning("%s cannot be used (%s): compiling it again", path, error)
    log.info("compiling the CPU kernels, once for this machine: some seconds")
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            built = _compile(command, Path(work))
            path = folder / f"{key}-{_digest(built)}.so"
            os.replace(built, path)
            return _open(path)
    except OSError as error:
        log.warning("%s cannot be written (%s): compiling in every process; set QAT_CACHE_DIR", folder, error)
    with tempfile.TemporaryDirectory() as work:
        return _open(_compile(command, Path(work)))


def _files(folder: Path, key: str) -> list[Path]:
    try:
        return list(folder.glob(f"{key}-*.so"))
    except OSError:
        return []


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:32]


def _key(command: list[str]) -> str:
    parts = [path.read_bytes() for path in sorted(SOURCES.iterdir()) if path.suffix in (".h", ".cpp")]
    parts += [" ".join(command).encode(), run([command[0], "--version"]).encode(), _processor().encode()]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:32]


@cache
def _processor() -> str:
    """The machine's architecture and, on Linux, its processor's features."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    features = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return f"{platform.system()} {platform.machine()} {features}"


def _compile(command: list[str], work: Path) -> Path:
    path = work / "kernels.so"
    output = run([*command, str(SOURCES / "library.cpp"), "-o", str(path)])
    log.debug("compiled %s: %s", SOURCES, output or "no output")
    return path


def run(command: list[str]) -> str:
    """What a command prints.

    Raises:
        BuildError: it cannot be started, or fails; holds what it printed.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{shlex.join(command)}: {error}") from error
    if done.returncode:
        raise BuildError(f"{shlex.join(command)} failed with {done.returncode}:\n{done.stderr[-4000:]}")
    return done.stdout + done.stderr


def _open(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"{path} was compiled but cannot be loaded: {error}") from error
