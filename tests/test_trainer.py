"""What a stopped run prints is composed again as it was."""

import shlex
import sys

import pytest
from omegaconf import OmegaConf

from qat import main as program
from qat.trainer import resume_command


@pytest.mark.parametrize(
    "options",
    [
        ["--config-dir", "{folder}", "model=mine"],
        ["-cd={folder}", "model=mine"],
        ["--config-dir={folder}", "--config-name", "own"],
        ["--config-path={folder}", "--config-name=alone"],
        [],
    ],
    ids=lambda options: " ".join(options) or "none",
)
def test_the_command_that_resumes_a_run_composes_its_config(options, tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("name: own model\n")
    (tmp_path / "own.yaml").write_text("defaults: [config, _self_]\nseed: 7\n")
    (tmp_path / "alone.yaml").write_text("seed: 7\nresume: false\n")
    seen = []

    def run(cfg, out):
        seen.append((OmegaConf.to_container(cfg), resume_command(out)))

    monkeypatch.setattr(program, "run", run)
    words = shlex.split(" ".join(options).format(folder=tmp_path))
    monkeypatch.setattr(sys, "argv", ["train.py", *words, "resume=false", f"hydra.run.dir={tmp_path}/a run"])
    program.main()
    ((first, command),) = seen
    monkeypatch.setattr(sys, "argv", shlex.split(command)[1:])
    program.main()
    again, _ = seen[1]
    assert again == first | {"resume": True}
