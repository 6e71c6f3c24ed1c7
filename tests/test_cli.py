import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from qat.cli import _load, main
from qat.tasks.models import EMBEDDED

COMMANDS = ["train", "generate", "bench", "eval", "inspect", "compare"]
RUN = {"recipe": "r", "scheme": "w4", "seed": 0, "models": [{"name": "float", "loss": 2.0}], "qat_loss": 1.5}


def write_run(folder, **change):
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps(RUN | change))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_teaches_with_an_example(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0 and f"examples:\n  qat {command} " in text
    written = [line for line in text.splitlines() if not line.startswith("recipe: ")]  # Hydra's list of all of them
    assert max(map(len, written)) <= 120


def test_main_help_names_every_command_and_imports_nothing_heavy():
    code = "import sys; from qat.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'rich', 'matplotlib', 'hydra', 'transformers'} & set(sys.modules)"
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(f"    {command} " in done.stdout for command in COMMANDS) and "examples:" in done.stdout
    assert time.monotonic() - started < 5  # 0.1 s on an idle machine; the modules above take 5 s and more


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["compare", "nowhere"], "nowhere: no such folder"),
        (["generate", "nowhere", "hi"], "nowhere is no folder"),
        (["generate", ".", "hi", "--temperature", "-1"], "--temperature must not be negative"),
        (["generate", ".", "hi", "--max-new-tokens", "0"], "--max-new-tokens must be positive"),
        (["bench", "nowhere"], "nowhere is no folder"),
        (["bench", ".", "--threads", "0"], "--threads must be positive"),
        (["inspect", "nowhere"], "nowhere is not a packed model"),
        (["eval", ".", "--data", "nothing.txt"], "nothing.txt: no such file"),
        (
            ["eval", str(EMBEDDED["stdlib_llama"]), "--data", __file__, "--split", "all", "--seq-len", "99999"],
            "--seq-len=99999 is longer than the model's",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_input_is_one_line_and_exit_2(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and message in captured.err and "Traceback" not in captured.err


def test_traceback_flag_shows_where_it_came_from(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        main(["--traceback", "compare", str(tmp_path / "nowhere")])


def test_half_written_summary_is_an_error_not_a_traceback(tmp_path, capsys):
    write_run(tmp_path / "run")
    (tmp_path / "run" / "summary.json").write_text('{"recipe": "r", ')
    assert main(["compare", str(tmp_path)]) == 2
    assert "not complete JSON" in capsys.readouterr().err


def test_compare_prints_runs_and_their_mean(tmp_path, capsys):
    for seed in (0, 1):
        write_run(tmp_path / str(seed), seed=seed, qat_loss=1.5 + seed)
    assert main(["compare", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "1.5000" in text and "2.5000" in text and "mean of 2" in text and "2.0000" in text


def test_compare_json_is_machine_readable(tmp_path, capsys):
    write_run(tmp_path / "run")
    assert main(["compare", "--json", str(tmp_path)]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["qat_loss"] == 1.5 and row["run"] == str(tmp_path / "run")


def test_train_hands_everything_after_it_to_hydra(monkeypatch):
    seen = []
    monkeypatch.setitem(sys.modules, "qat.main", SimpleNamespace(main=lambda: seen.extend(sys.argv)))
    monkeypatch.setattr(sys, "argv", ["qat"])
    assert main(["train", "-m", "recipe=x", "seed=0,1", "--cfg", "job"]) == 0
    assert seen == ["qat train", "-m", "recipe=x", "seed=0,1", "--cfg", "job"]


def test_traceback_flag_reaches_training(monkeypatch):
    monkeypatch.setenv("QAT_TRACEBACK", "")
    monkeypatch.setattr(sys, "argv", ["qat"])
    monkeypatch.setitem(sys.modules, "qat.main", SimpleNamespace(main=lambda: None))
    assert main(["--traceback", "train", "recipe=x"]) == 0 and os.environ["QAT_TRACEBACK"] == "1"


def test_ctrl_c_is_quiet_and_exits_130(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["qat"])
    monkeypatch.setitem(sys.modules, "qat.main", SimpleNamespace(main=interrupted))
    assert main(["train"]) == 130 and capsys.readouterr().err == ""


def test_a_file_that_cannot_be_written_is_an_error_not_a_traceback(monkeypatch, capsys):
    def full():
        raise OSError(28, "No space left on device", "summary.json")

    monkeypatch.setattr(sys, "argv", ["qat"])
    monkeypatch.setitem(sys.modules, "qat.main", SimpleNamespace(main=full))
    assert main(["train"]) == 2 and "No space left on device: 'summary.json'" in capsys.readouterr().err


def test_a_closed_pipe_is_quiet(tmp_path):
    write_run(tmp_path / "run")
    command = f"{sys.executable} -m qat.cli compare --json {tmp_path} | true"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True)
    assert done.stderr == ""


def test_generate_streams_with_the_given_settings(tmp_path, monkeypatch, capsys):
    settings = {}

    def stream(model, tokenizer, prompt, **options):
        settings.update(options, prompt=prompt, model=model)
        yield from ["one ", "two"]

    inference = SimpleNamespace(
        stream=stream, load_packed=lambda directory, backend, device: (f"{backend} on {device}", "tok")
    )
    monkeypatch.setitem(sys.modules, "qat.inference", inference)
    (tmp_path / "config.json").write_text('{"quantization_config": {}}')
    assert main(["generate", str(tmp_path), "hello", "--max-new-tokens", "7", "--backend", "torch", "--chat"]) == 0
    assert capsys.readouterr().out == "one two\n"
    assert settings == {
        "prompt": "hello", "model": "torch on cpu", "max_new_tokens": 7, "temperature": 0.0, "chat": True,
    }  # fmt: skip


@pytest.mark.parametrize("command", [["bench"], ["generate", "hi"], ["eval", "--data", __file__, "--split", "all"]])
def test_a_float_model_is_never_run_elsewhere_than_asked_for(command, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    name, *rest = command
    assert main([name, str(EMBEDDED["stdlib_llama"]), *rest, "--backend", "cuda"]) == 2
    assert "--backend cuda: torch finds no GPU for the float model in" in capsys.readouterr().err


def test_a_float_model_goes_to_the_gpu_that_was_asked_for(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    moved = []
    model = SimpleNamespace(requires_grad_=lambda flag: None, to=moved.append)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("qat.tasks.models.load", lambda name: (model, None))
    for backend in ("cuda", "reference", "cpu"):
        _load(tmp_path, backend)
    assert moved == ["cuda", "cpu", "cpu"]
