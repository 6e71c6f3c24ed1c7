"""Where text comes from: documents with a name, split by a hash so that no split ever sees another's text.

A *document* is the unit of everything statistical here: splits are made of documents, and confidence
intervals resample documents.  Sources are plain functions that return a list of them:

* `python_stdlib`: the standard library's source, the corpus that every Python has.
* `installed_packages`: the source of the packages beside it, more text for pretraining.
* `text`: files, folders, or a dataset by name, read with `datasets`.
"""

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

Split = Literal["train", "calibration", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

# Cumulative shares of the four splits, in percent of the hash space.
_SHARES: dict[Split, int] = {"train": 76, "calibration": 80, "validation": 88, "test": 100}

# Tests, vendored bundles, tables and generated files: text that teaches nothing or repeats itself.
_STDLIB_SKIPPED = {
    "test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data", "site-packages", "dist-packages",
    "__pycache__", "ensurepip", "idle_test",
}  # fmt: skip


@dataclass(frozen=True)
class Document:
    """One text with the name its split is derived from (a path relative to the corpus, or a content hash)."""

    name: str
    text: str

    @property
    def split(self) -> Split:
        """The split this document belongs to: a hash of its name, so the answer never depends on other files."""
        bucket = int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:8], "big") % 100
        return next(split for split, bound in _SHARES.items() if bucket < bound)


def digest(documents: list[Document]) -> str:
    """SHA-256 (hex, 16 digits) over the names and texts of `documents`, independent of their order."""
    total = hashlib.sha256()
    for document in sorted(documents, key=lambda d: d.name):
        total.update(hashlib.sha256(document.name.encode()).digest())
        total.update(hashlib.sha256(document.text.encode()).digest())
    return total.hexdigest()[:16]


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):  # a latin-1 source file or a broken link: not worth a run
        return None


def python_stdlib() -> list[Document]:
    """The standard library's own source without its tests, one document a file, named by relative path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    documents = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if _STDLIB_SKIPPED.isdisjoint(name.parts) and (content := _read(path)):
            documents.append(Document(name.as_posix(), content))
    if not documents:
        raise ValueError(
            f"no Python source under {root}: this interpreter ships no standard-library source; "
            "use data=text data.path=FILE_OR_FOLDER"
        )
    return documents


def installed_packages(max_bytes: int) -> list[Document]:
    """Source files of installed packages, in hash order (a fair sample), up to `max_bytes` of text in all.

    For training only: a model may see them in addition to a corpus, no figure is measured on them.
    """
    root = Path(sysconfig.get_paths()["purelib"])
    paths = [p for p in root.rglob("*.py") if {"tests", "test", "__pycache__"}.isdisjoint(p.relative_to(root).parts)]
    paths.sort(key=lambda p: hashlib.sha256(p.relative_to(root).as_posix().encode()).digest())
    documents, size = [], 0
    for path in paths:
        if size >= max_bytes:
            break
        content = _read(path)
        if content and len(content) < 200_000:  # larger ones are generated tables
            documents.append(Document("site-packages/" + path.relative_to(root).as_posix(), content))
            size += len(content)
    return documents


def text(
    path: str | None = None, dataset: str | None = None, name: str | None = None, separator: str | None = None
) -> list[Document]:
    """Text files, a folder of them, or a dataset of the hub, as documents.

    Args:
        path: a `.txt`/`.md`/`.py` file (one document, or many where `separator` is given), a `.jsonl`,
            `.json` or `.parquet` file with a column `text`, or a folder of such files.
        dataset: a dataset's name on the hub with a column `text`, instead of `path`; `name` is its subset.
        separator: splits text files into documents, such as `<|endoftext|>`.

    Raises:
        ValueError: nothing to read, with the place that was looked at.
    """
    import datasets  # slow to import, and only needed here

    if (path is None) == (dataset is None):
        raise ValueError("data=text needs exactly one of data.source.path (local) and data.source.dataset (hub)")
    if dataset is not None:
        texts = _column(datasets.load_dataset(dataset, name, split="train"), dataset)
    else:
        texts = [t for file in text_files(Path(path)) for t in _texts(file, separator)]  # type: ignore[arg-type]
    unique = {t: None for t in (t.strip() for t in texts) if t}
    if not unique:
        raise ValueError(f"no text in {path or dataset}: every document is empty")
    return [Document(hashlib.sha256(t.encode()).hexdigest(), t) for t in unique]


def text_files(path: Path, suffixes: tuple[str, ...] = (".txt", ".md", ".py", ".json", ".jsonl", ".parquet")):
    """`path` itself if it is a file, else every file under it that ends in one of `suffixes`, sorted."""
    if path.is_file():
        return [path]
    files = sorted(p for p in path.rglob("*") if p.suffix in suffixes and p.is_file()) if path.is_dir() else []
    if not files:
        what = "no such file or folder" if not path.exists() else f"no file ending in {', '.join(suffixes)}"
        raise ValueError(f"data path {path}: {what}")
    return files


def _texts(file: Path, separator: str | None) -> list[str]:
    import datasets

    if file.suffix in (".json", ".jsonl", ".parquet"):
        kind = "parquet" if file.suffix == ".parquet" else "json"
        try:
            rows = datasets.load_dataset(kind, data_files=str(file), split="train")
        except Exception as error:  # of datasets, pyarrow or, for an empty file, StopIteration
            raise ValueError(f"{file} is not readable as {kind}: {type(error).__name__}: {error}") from error
        return _column(rows, str(file))
    content = file.read_text(encoding="utf-8", errors="replace")
    return content.split(separator) if separator else [content]


def _column(rows: Any, where: str) -> list[str]:
    """The column `text`; rows without one (null) are left out, as empty ones are."""
    if "text" not in rows.column_names:
        raise ValueError(f"{where} has columns {rows.column_names}, none of them 'text'")
    texts = [t for t in rows["text"] if t is not None]
    for value in texts:
        if not isinstance(value, str):
            raise ValueError(f"{where}: the column 'text' holds {type(value).__name__}, not text")
    return texts
