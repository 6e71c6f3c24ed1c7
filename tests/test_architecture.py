"""The import direction of the design, read from the source: left never imports right."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "qat"
CORE = ["scheme", "functional", "estimators", "observers", "packing", "fake_quantizer"]
CORE += ["attention", "nn", "structure", "insertion"]
# What each part may import of qat, besides itself.
MAY = {
    "scheme": [],
    "functional": CORE[:1],
    **dict.fromkeys(["observers", "packing"], CORE[:2]),
    "estimators": [*CORE[:2], "observers"],
    "fake_quantizer": CORE[:5],
    "attention": CORE[:6],
    "nn": CORE[:6],
    "structure": CORE[:8],
    "insertion": CORE[:9],
    **dict.fromkeys(["calibration", "training"], CORE),
    "kernels": ["packing", "functional", "scheme"],
    "export": [*CORE, "kernels"],
    "inference": [*CORE, "kernels", "export"],
    "data": ["tasks", "evaluation"],
    "tasks": ["data", "evaluation"],
    "evaluation": [],
    "report": ["evaluation"],
    "diagnosis": [*CORE, "calibration", "training", "export"],
    "callbacks": [*CORE, "calibration", "training", "evaluation", "export", "diagnosis"],
    "config": [],
    "resume": [],
    "quiet": [],
    "__init__": [*CORE, "calibration", "training"],
    **dict.fromkeys(["checks", "stages", "trainer", "main", "cli"], None),  # anything
}
ONLY_IN = {
    "lightning": {"callbacks", "tasks", "data", "checks", "stages", "trainer", "main"},
    "hydra": {"config", "main", "checks", "stages", "trainer"},
    "omegaconf": {"config", "main", "resume", "checks", "stages", "trainer"},
    "wandb": {"callbacks", "report"},
}
FILES = sorted(PACKAGE.rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Dotted names of all modules that a file imports, at its top or inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert part in MAY, f"say in MAY what qat.{part} may import"
    names = imported(path)
    ours = {name.split(".")[1] for name in names if name.startswith("qat.")} - {part, "__version__"}
    assert MAY[part] is None or ours <= set(MAY[part]), f"{path} may not import {ours - set(MAY[part])}"
    for library, parts in ONLY_IN.items():
        assert part in parts or not any(n.split(".")[0] == library for n in names), f"{path} imports {library}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_file_is_short_enough_to_read(path):
    assert len(path.read_text().splitlines()) <= 400


def test_an_import_is_found_wherever_it_hides(tmp_path):
    source = "import a.b as c\ndef f():\n    from qat import nn\n    from qat.scheme import X\n"
    (tmp_path / "x.py").write_text(source)
    assert imported(tmp_path / "x.py") == {"a.b", "qat.nn", "qat.scheme.X"}
