"""The whole job through its front door, on a tiny model: `train.py`, sweeps, resume, and bad input."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qat import stages
from qat.calibration import GPTQ, Reconstruction
from qat.callbacks import Distillation, ScalesOnly
from qat.cli import main as qat_command
from qat.config import RECIPES
from qat.data.documents import python_stdlib
from qat.main import main
from qat.report import read_summary
from qat.stages import Run
from qat.tasks.models import load, new_llama

ROOT = Path(__file__).parents[1]

PROMISED = {
    "recipe", "scheme", "model", "data", "corpus_digest", "seed", "steps", "tokens", "float_loss", "ptq_loss",
    "ptq_mse_loss", "qat_loss", "control_loss", "control_ptq_loss", "packed_loss", "qat_minus_control_ptq",
    "qat_minus_control_ptq_interval", "recovery", "recovery_interval", "recovery_over_control",
    "recovery_over_control_interval", "float_bytes", "packed_bytes", "model_float_bytes", "model_packed_bytes",
    "export_dir", "seconds", "versions", "config_digest", "overrides",
}  # fmt: skip


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A folder with a tiny model and a small text, and the words of a job that uses them."""
    folder = tmp_path_factory.mktemp("job")
    documents = sorted(python_stdlib(), key=lambda d: len(d.text))[60:180]
    (folder / "text.txt").write_text("<|split|>".join(d.text for d in documents))
    model, tokenizer = new_llama(
        "tiny", documents, 300, hidden_size=128, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    words = f"""recipe=llama_int4_qat model=hf model.name={folder}/model data=text data.source.path={folder}/text.txt
        data.source.separator='<|split|>' data.seq_len=32 data.batch_size=4 data.windows_per_document=2
        trainer.max_steps=8 trainer.val_check_interval=4 trainer.enable_progress_bar=false logger=csv
        optim.lr=1e-3 checkpoint_every=3 control_dir={folder}/controls""".split()
    return folder, words


def train(monkeypatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    main()


def test_the_main_job_ends_with_everything_it_promises(job, monkeypatch, tmp_path, capsys):
    folder, words = job
    out = tmp_path / "run"
    train(monkeypatch, *words, f"hydra.run.dir={out}")
    raw = json.loads((out / "summary.json").read_text())
    assert raw.keys() >= PROMISED
    assert raw["packed_loss"] == pytest.approx(raw["qat_loss"], abs=1e-6)  # the same float32 products, summed alike
    assert raw["steps"] == 8 and raw["tokens"] == 8 * 4 * 32
    assert raw["packed_bytes"] / raw["float_bytes"] == pytest.approx((128 / 2 + 2) / 256)  # a row of 128: codes, scale
    assert raw["model_float_bytes"] == 2 * AutoModelForCausalLM.from_pretrained(folder / "model").num_parameters()
    assert raw["model_packed_bytes"] > raw["packed_bytes"]
    assert [row["step"] for row in raw["history"]] == [4, 8]
    assert {(row["tokens"], row["dead_inputs"]) for row in raw["layers"]} == {(128 * 32, 0)}
    assert raw["control_loss"] < raw["float_loss"]  # it was trained
    assert "PTQ(control)" in capsys.readouterr().out  # the table
    assert (out / "report.html").stat().st_size > 10_000
    assert "recovery/qat_loss" in (out / "metrics" / "version_0" / "metrics.csv").read_text()
    AutoModelForCausalLM.from_pretrained(out / "export")


def test_a_sweep_trains_the_control_once_for_each_seed(job, monkeypatch, tmp_path):
    _, words = job
    controls = tmp_path / "controls"
    words = [w for w in words if not w.startswith("control_dir")] + [f"control_dir={controls}"]
    train(monkeypatch, "-m", *words, "quant=w8a8,w4a8", "seed=0,1", f"hydra.sweep.dir={tmp_path}/sweep")
    summaries = [read_summary(tmp_path / "sweep" / str(job)) for job in range(4)]
    assert {(s["scheme"], s["seed"]) for s in summaries} == {
        ("w8a8-channel", 0), ("w8a8-channel", 1), ("w4a8-g128", 0), ("w4a8-g128", 1)
    }  # fmt: skip
    assert len(list(controls.iterdir())) == 2
    by_seed = {s["seed"]: s["control_loss"] for s in summaries}
    assert all(s["control_loss"] == by_seed[s["seed"]] for s in summaries)
    for summary in summaries:
        assert summary["packed_loss"] == pytest.approx(summary["qat_loss"], abs=1e-6)


@pytest.mark.parametrize("error", [ValueError("bad"), TypeError("bug")], ids=str)
def test_a_failed_job_of_a_sweep_stops_no_later_one_and_is_named_at_the_end(error, job, monkeypatch, tmp_path):
    def run(cfg, out):
        seeds.append(cfg.seed)
        if cfg.seed in (0, 2):
            raise error

    seeds: list[int] = []
    monkeypatch.setattr("qat.main.run", run)
    sweep = ["-m", *job[1], "seed=0,1,2,3", f"hydra.sweep.dir={tmp_path}/sweep"]
    with pytest.raises(SystemExit) as stopped:
        train(monkeypatch, *sweep)
    assert seeds == [0, 1, 2, 3]
    first, *named = str(stopped.value.code).splitlines()
    assert first == "error: 2 of the sweep's jobs failed:"
    what = "bad" if isinstance(error, ValueError) else "TypeError('bug')"
    assert named == [f"  {tmp_path}/sweep/{n}: {what}" for n in (0, 2)]
    assert ("Traceback" in next((tmp_path / "sweep" / "2").glob("*.log")).read_text()) == isinstance(error, TypeError)


@pytest.mark.parametrize("ending", [KeyboardInterrupt, SystemExit])  # Lightning makes the latter of the former
def test_ctrl_c_stops_a_sweep(ending, job, monkeypatch, tmp_path):
    def run(cfg, out):
        seeds.append(cfg.seed)
        raise ending

    seeds: list[int] = []
    monkeypatch.setattr("qat.main.run", run)
    with pytest.raises(ending):
        train(monkeypatch, "-m", *job[1], "seed=0,1", f"hydra.sweep.dir={tmp_path}/sweep")
    assert seeds == [0]


def test_beside_a_mixture_the_control_has_the_teacher_too(job, monkeypatch, tmp_path):
    _, words = job
    words = [*(w for w in words if not w.startswith("control_dir")), f"control_dir={tmp_path}/controls"]
    objectives, trained = [], stages.train_control
    monkeypatch.setattr(
        stages, "train_control", lambda *a: (objectives.append(a[3](tmp_path).callbacks), trained(*a))[1]
    )
    losses = []
    for mixture in (["objective.weight=1"], ["objective.weight=0.5", "objective.hidden=0.1"]):
        out = tmp_path / f"run{len(mixture)}"
        train(monkeypatch, *words, *mixture, f"hydra.run.dir={out}")
        losses.append(read_summary(out)["control_loss"])
    assert losses[0] != losses[1]
    teachers = [[(c.weight, c.hidden) for c in callbacks if isinstance(c, Distillation)] for callbacks in objectives]
    assert teachers == [[], [(0.5, 0.0)]]  # a float model has nothing to learn from itself alone
    assert len(list((tmp_path / "controls").iterdir())) == 2


def test_without_quantization_the_job_is_plain_training_with_a_float_export(job, monkeypatch, tmp_path):
    _, words = job
    train(
        monkeypatch,
        *words,
        "quant=none",
        "objective=next_token",
        "export_dtype=bfloat16",
        f"hydra.run.dir={tmp_path}/run",
    )
    weights = load_file(tmp_path / "run" / "export" / "model.safetensors")
    assert {t.dtype for t in weights.values()} == {torch.bfloat16}
    assert read_summary(tmp_path / "run")["recovery"] is None


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_runs_to_its_export(path, job, monkeypatch, tmp_path):
    recipe = OmegaConf.load(path)
    words = ["logger=none", "trainer.enable_progress_bar=false", f"control_dir={tmp_path}/controls"]
    if "digits" not in path.stem:
        _, tiny = job
        words += [w for w in tiny if w.startswith(("model", "data", "optim.lr"))]
    if "extra" in recipe.get("data", {}):
        words += ["data.extra=null", "data.extra_share=0"]
    if recipe.get("trainer", {}).get("max_steps") != 0:
        words += ["trainer.max_steps=4", "trainer.val_check_interval=2"]
    if path.stem.startswith("llama_mixed"):
        words += ["quant.widths=[3,4,5]", "quant.windows=4"]
    train(monkeypatch, f"recipe={path.stem}", *words, f"hydra.run.dir={tmp_path}/run")
    summary = read_summary(tmp_path / "run")
    assert list(Path(summary["export_dir"]).glob("*.safetensors"))
    if summary["scheme"] != "none":
        final = "qat_loss" if summary["steps"] else "calibrated_loss"
        assert summary["packed_loss"] == pytest.approx(summary[final], abs=1e-6)


@pytest.mark.parametrize("recipe", ["llama_int4_gptq", "llama_w4a8_rotated"])
def test_a_recipe_without_steps_ends_with_a_proven_export_and_no_control(recipe, job, monkeypatch, tmp_path, capsys):
    _, words = job
    words = [w for w in words if not w.startswith(("recipe=", "trainer.max_steps", "control_dir"))]
    out = tmp_path / "run"
    train(monkeypatch, f"recipe={recipe}", *words, f"control_dir={tmp_path}/controls", f"hydra.run.dir={out}")
    summary = read_summary(out)
    assert [row["name"] for row in summary["models"]] == ["float", "ptq", "ptq_mse", "calibrated", "packed"]
    assert summary["steps"] == 0 and summary["qat_loss"] is None
    assert summary["recovery_over_control_reason"] == "nothing was trained (trainer.max_steps=0)"
    assert summary["packed_loss"] == pytest.approx(summary["calibrated_loss"], abs=1e-6)
    assert f"PTQ ({summary['calibration']})" in capsys.readouterr().out
    assert not (tmp_path / "controls").exists() and not (out / "checkpoints").exists()
    assert "recovery/calibrated_loss" in (out / "metrics" / "version_0" / "metrics.csv").read_text()
    AutoModelForCausalLM.from_pretrained(out / "export")


@pytest.mark.parametrize("quant", [["quant.kv_cache=int8-head"], ["quant=none", "quant.kv_cache=fp8-token"]], ids=str)
def test_quantized_keys_and_values_go_through_the_program(quant, job, monkeypatch, tmp_path, capsys):
    out = tmp_path / "run"
    train(monkeypatch, *job[1], *quant, "control=none", f"hydra.run.dir={out}")
    summary = read_summary(out)
    assert summary["packed_loss"] == pytest.approx(summary["qat_loss"], abs=1e-6)
    assert summary["scheme"].endswith(f"kv-{quant[-1].partition('=')[2]}")
    layers = 0 if "quant=none" in quant else len(summary["layers"])
    assert f"proven bit-exact for {layers} layers and keys and values of 1 attentions" in capsys.readouterr().out
    assert json.loads((out / "export" / "qat.json").read_text())["kv_cache"]["bits"] == 8
    AutoModelForCausalLM.from_pretrained(out / "export")
    assert qat_command(["inspect", str(out / "export")]) == 0
    assert f"keys and values {quant[-1].partition('=')[2]}" in capsys.readouterr().out


def test_a_convolutional_network_goes_through_the_same_program(monkeypatch, tmp_path, capsys):
    words = ["logger=none", "trainer.enable_progress_bar=false", "trainer.val_check_interval=4", "trainer.max_steps=8"]
    train(monkeypatch, "recipe=pretrain_digits_cnn", *words, f"hydra.run.dir={tmp_path}/float")
    mine = f"model.name={tmp_path}/float/export"
    train(
        monkeypatch, "recipe=digits_int8_qat", mine, *words, f"control_dir={tmp_path}/c", f"hydra.run.dir={tmp_path}/q"
    )
    summary = read_summary(tmp_path / "q")
    models = {row["name"]: row for row in summary["models"]}
    assert set(models) == {"float", "ptq", "ptq_mse", "qat", "control", "control_ptq", "packed"}
    assert models["packed"]["loss"] == pytest.approx(models["qat"]["loss"], abs=1e-6)
    assert models["packed"]["accuracy"] == models["qat"]["accuracy"]
    assert {len(row["shape"]) for row in summary["layers"]} == {2} and len(summary["layers"]) == 7
    assert "millinats/image" in capsys.readouterr().out
    report = (tmp_path / "q" / "report.html").read_text()
    assert "nats per image" in report and "bootstrap over images" in report and "documents" not in report
    float_folder = str(tmp_path / "float" / "export")  # with the batch norms that its convolutions have taken in since
    assert qat_command(["inspect", str(tmp_path / "q" / "export"), "--against", float_folder]) == 0
    assert "7 packed layers" in capsys.readouterr().out


AUTO = ["quant=auto", "quant.widths=[2,4,8]", "quant.windows=8"]


def bits_of(out: Path) -> dict[str, int]:
    """The width of each exported layer, by its name."""
    side = json.loads((out / "export" / "qat.json").read_text())
    return {name: layer["scheme"]["weight"]["bits"] for name, layer in side["layers"].items()}


def test_widths_that_were_searched_are_exported_within_the_budget(job, monkeypatch, tmp_path):
    words = [w for w in job[1] if not w.startswith(("recipe=", "trainer.max_steps"))]
    out = tmp_path / "run"
    train(monkeypatch, "recipe=llama_mixed_ptq", *words, *AUTO, "quant.budget_bits=3.6", f"hydra.run.dir={out}")
    summary, widths = read_summary(out), bits_of(out)
    assert summary["packed_loss"] == pytest.approx(summary["calibrated_loss"], abs=1e-6)
    assert 2 <= len(set(widths.values()))
    for fused in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
        assert len({bits for name, bits in widths.items() if name.endswith(fused)}) == 1
    weights = summary["float_bytes"] / 2
    assert 8 * summary["packed_bytes"] / weights <= 3.6
    (chosen,) = [row for row in summary["frontier"] if row["name"] == "chosen"]
    assert chosen["bits"] == 8 * summary["packed_bytes"] / weights  # bytes counted are bytes exported
    table = json.loads((out / "sensitivity.json").read_text())
    assert table["widths"] == widths and len(table["rows"]) == 3 * 4  # widths, groups
    AutoModelForCausalLM.from_pretrained(out / "export")
    report = (out / "report.html").read_text()
    assert 'id="plot-sensitivity"' in report and 'id="plot-frontier"' in report


@pytest.mark.parametrize("second", [8, 2, None], ids=["better", "worse", "the same"])
def test_a_search_repeated_with_trained_weights_keeps_the_better_model(second, job, monkeypatch, tmp_path):
    searched, weights = [], []
    search = stages.search_widths

    def found(widths, task, *rest):
        weights.append({n: p.detach().clone() for n, p in task.named_parameters()})
        schemes, facts = search(widths, task, *rest)
        if len(weights) == 2:
            names = [n for n, scheme in schemes.rules.items() if scheme]
            schemes = searched[0] if second is None else widths.mixed(dict.fromkeys(names, second))
        searched.append(schemes)
        return schemes, facts

    monkeypatch.setattr(stages, "search_widths", found)
    out = tmp_path / "run"
    words = [*job[1], "calibration=mse", *AUTO, "repeat_search=true", f"hydra.run.dir={out}"]
    train(monkeypatch, *words)
    assert any(not torch.equal(weights[0][n], weights[1][n]) for n in weights[0])  # the trained ones
    summary = read_summary(out)
    assert ("train again" in summary["stages"]) == (second is not None)
    assert Path(summary["export_dir"]).name == ("export-2" if second == 8 else "export")
    kept = {n: searched[second == 8].scheme_of(n).weight.bits for n in bits_of(out)}
    side = json.loads((Path(summary["export_dir"]) / "qat.json").read_text())
    assert {n: layer["scheme"]["weight"]["bits"] for n, layer in side["layers"].items()} == kept
    assert summary["packed_loss"] == pytest.approx(summary["qat_loss"], abs=1e-6) and summary["steps"] == 8
    assert (out / "checkpoints-2").exists() == (second is not None)


def test_a_resumed_run_trains_with_the_widths_it_chose_and_so_is_its_control_measured(job, monkeypatch, tmp_path):
    out, kept = tmp_path / "run", Run._measure_control
    words = [*job[1], "calibration=mse", *AUTO, f"hydra.run.dir={out}"]

    def kill(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "_measure_control", kill)
    with pytest.raises(KeyboardInterrupt):
        train(monkeypatch, *words)
    monkeypatch.setattr(Run, "_measure_control", kept)
    assert not list(out.glob("calibration/width-*"))  # the blocks of every width are a model each
    # Another choice than a search would make: only who reads it can end with it.
    table = json.loads((out / "sensitivity.json").read_text())
    table["widths"] = {name: 8 if "self_attn" in name else 2 for name in table["widths"]}
    (out / "sensitivity.json").write_text(json.dumps(table))
    maps, measured = [], stages.measure_control
    monkeypatch.setattr(stages, "measure_control", lambda *a: (maps.append(a[2].schemes), measured(*a))[1])
    train(monkeypatch, *words, "resume=true")
    assert bits_of(out) == table["widths"]
    assert [{n: m.scheme_of(n).weight.bits for n in table["widths"]} for m in maps] == [table["widths"]]
    summary = read_summary(out)
    assert summary["packed_loss"] == pytest.approx(summary["qat_loss"], abs=1e-6) and summary["steps"] == 8


@pytest.mark.parametrize(
    "words",
    [["quant=w8a8_asymmetric", "estimator=lsq_plus", "calibration=mse"],
     ["quant=w8a8", "quant.input.granularity=tensor", "quant.input.dynamic=false", "calibration=gptq"]],
    ids=["asymmetric", "symmetric, finished blocks kept"],
)  # fmt: skip
def test_static_inputs_that_fused_layers_share_go_the_whole_way(words, job, monkeypatch, tmp_path):
    train(monkeypatch, *job[1], *words, f"hydra.run.dir={tmp_path}/run")
    summary = read_summary(tmp_path / "run")
    assert summary["packed_loss"] == pytest.approx(summary["qat_loss"], abs=1e-6)
    assert summary["control_ptq_loss"] is not None


def test_training_starts_from_a_calibration_that_changes_weights(job, monkeypatch, tmp_path):
    _, words = job
    train(monkeypatch, *words, "calibration=mse", f"hydra.run.dir={tmp_path}/plain")
    treat, treated = GPTQ._treat, []
    monkeypatch.setattr(GPTQ, "_treat", lambda *args: (treated.append(1), treat(*args)))
    train(monkeypatch, *words, "calibration=gptq", f"hydra.run.dir={tmp_path}/gptq")
    plain, gptq = read_summary(tmp_path / "plain"), read_summary(tmp_path / "gptq")
    for name in ("float_loss", "ptq_loss", "ptq_mse_loss"):  # measured around it, the weights put back
        assert plain[name] == gptq[name]
    assert gptq["calibrated_loss"] is not None and plain["calibrated_loss"] is None
    assert gptq["qat_loss"] != plain["qat_loss"]
    assert gptq["packed_loss"] == pytest.approx(gptq["qat_loss"], abs=1e-6)
    assert len(treated) == 2  # its only block: of the control, and measured as PTQ; training takes that from its file
    assert not (tmp_path / "gptq" / "calibration").exists()


def test_a_calibration_that_cannot_treat_the_control_is_left_out_with_its_reason(job, monkeypatch, tmp_path, capsys):
    def refuse(*_):
        raise ValueError("its Hessian cannot be factorized")

    monkeypatch.setattr(GPTQ, "_treat", refuse)
    train(monkeypatch, *job[1], "calibration=mse", f"hydra.run.dir={tmp_path}/run")
    assert re.search(r"gptq is left out: .*its Hessian cannot be factorized", capsys.readouterr().out)
    summary = read_summary(tmp_path / "run")
    assert summary["control_ptq_calibration"] in ("absmax", "mse", "weighted_mse")
    assert summary["packed_loss"] == pytest.approx(summary["qat_loss"], abs=1e-6)


def test_a_calibration_stopped_by_hand_says_how_it_goes_on(job, monkeypatch, tmp_path):
    def stop(*_):
        raise KeyboardInterrupt

    _, words = job
    words = [*words, "calibration=gptq", "trainer.max_steps=0", f"hydra.run.dir={tmp_path}/run"]
    with monkeypatch.context() as stopped:
        stopped.setattr("qat.calibration.gptq.GPTQ._treat", stop)
        with pytest.raises(SystemExit, match=r"finished blocks are kept(.|\n)*resume=true"):
            train(monkeypatch, *words)
    train(monkeypatch, *words, "resume=true")
    assert read_summary(tmp_path / "run")["packed_loss"] is not None


def test_a_nested_run_exports_and_measures_each_width_and_goes_on_to_export_one(job, monkeypatch, tmp_path):
    _, words = job
    words = [*words, "quant=nested", "calibration=absmax", "control=none", f"hydra.run.dir={tmp_path}/run"]
    train(monkeypatch, *words)
    summary, out = read_summary(tmp_path / "run"), tmp_path / "run"
    assert sorted(p.name for p in (out / "export").iterdir()) == ["int2", "int4", "int8"]
    assert summary["export_dir"] == str(out / "export" / "int8")
    for at in ("", "_int4", "_int2"):
        assert summary[f"packed{at}_loss"] == pytest.approx(summary[f"qat{at}_loss"], abs=1e-6)
    assert summary["qat_int2_loss"] < summary["sliced_int2_loss"]
    assert all(row.keys() >= {"qat_loss", "qat_int4_loss", "qat_int2_loss"} for row in summary["history"])
    assert "QAT, INT2" in (out / "report.html").read_text()
    train(monkeypatch, *words, "resume=true", "export_bits=2")
    assert [p.name for p in (out / "export-2").iterdir()] == ["int2"]
    once, again = (load_file(out / name / "int2" / "model.safetensors") for name in ("export", "export-2"))
    assert all(torch.equal(once[name], again[name]) for name in once | again)


def command(words, *more) -> list[str]:
    return [sys.executable, str(ROOT / "train.py"), *words, *more]


def test_a_killed_and_resumed_run_exports_the_same_bytes(job, monkeypatch, tmp_path):
    _, words = job
    train(
        monkeypatch, *words, "trainer.max_steps=30", "trainer.val_check_interval=10", f"hydra.run.dir={tmp_path}/whole"
    )
    words = [*words, "trainer.max_steps=30", "trainer.val_check_interval=10", f"hydra.run.dir={tmp_path}/cut"]
    process = subprocess.Popen(command(words), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 240
    while not (tmp_path / "cut" / "checkpoints" / "last.ckpt").exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=240)
    if not (tmp_path / "cut" / "summary.json").exists():  # it may have finished before the signal came
        assert process.returncode != 0 and "resume=true" in output, output
        train(monkeypatch, *words, "resume=true")
    whole, cut = (load_file(tmp_path / name / "export" / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole | cut)
    whole, cut = (read_summary(tmp_path / name) for name in ("whole", "cut"))
    assert all(whole[name] == cut[name] for name in ("float_loss", "tokens", "steps"))


def test_a_run_that_starts_from_its_control_quantizes_that_and_still_tells_what_the_float_model_lost(
    job, monkeypatch, tmp_path
):
    _, words = job
    train(monkeypatch, *words, f"hydra.run.dir={tmp_path}/float")
    started, kept = [], Run._train

    def note(self, task, *rest):
        started.append({name: tensor.clone() for name, tensor in task.state_dict().items()})
        kept(self, task, *rest)
        teacher = next(c for c in self.trainer.callbacks if isinstance(c, Distillation)).teacher
        assert all(torch.equal(tensor, started[-1][f"model.{name}"]) for name, tensor in teacher.state_dict().items())

    def stop(self, trainer, *_):
        if trainer.global_step == 5:
            raise KeyboardInterrupt

    def never(*_):
        raise AssertionError("the teacher would change")

    monkeypatch.setattr(Run, "_train", note)
    words = [*words, "start=control"]
    train(monkeypatch, *words, f"hydra.run.dir={tmp_path}/whole")
    with monkeypatch.context() as stopped, pytest.raises(SystemExit):
        stopped.setattr(Distillation, "on_train_batch_end", stop)
        train(monkeypatch, *words, f"hydra.run.dir={tmp_path}/cut")
    with monkeypatch.context() as resumed:
        resumed.setattr(stages, "train_control", never)
        train(monkeypatch, *words, "control=run", "resume=true", f"hydra.run.dir={tmp_path}/cut")
    assert not (tmp_path / "cut" / stages.START).exists()  # of no use any more
    (tmp_path / "new").mkdir()
    save_file(
        {name: torch.zeros(1) for name in started[0]}, tmp_path / "new" / stages.START
    )  # of a run that was killed
    train(monkeypatch, *words, f"hydra.run.dir={tmp_path}/new")
    assert all(torch.equal(started[0][n], started[-1][n]) for n in started[0])
    assert len(started) == 4 and all(torch.equal(started[0][n], s[n]) for s in started for n in started[0])
    summaries = {name: read_summary(tmp_path / name) for name in ("float", "whole", "cut")}
    controls = [load_file(path) for path in (job[0] / "controls").glob("*/control.safetensors")]
    assert any(all(torch.equal(control[name], started[0][name]) for name in control) for control in controls)
    for name in ("float_loss", "ptq_loss", "ptq_mse_loss", "calibrated_loss", "control_loss", "control_ptq_loss"):
        assert len({summary[name] for summary in summaries.values()}) == 1
    assert summaries["whole"]["qat_loss"] < summaries["float"]["qat_loss"]
    assert [summaries[name]["start"] for name in ("float", "whole")] == ["float", "control"]
    whole, cut = (load_file(tmp_path / name / "export" / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole | cut)


def test_blocks_then_scales_are_one_run_that_goes_on_in_the_phase_where_it_was(job, monkeypatch, tmp_path):
    words = [w for w in job[1] if not w.startswith("recipe=")]
    words = ["recipe=llama_int4_blockwise", *words, "calibration.steps=4", "control=none"]
    train(monkeypatch, *words, f"hydra.run.dir={tmp_path}/whole")

    def stop(self, trainer, *_):
        if not isinstance(self, ScalesOnly) or trainer.global_step == 5:
            raise KeyboardInterrupt

    words = [*words, f"hydra.run.dir={tmp_path}/cut"]
    for place, resumed in (
        ((Reconstruction, "reconstruct"), []),
        ((ScalesOnly, "on_before_zero_grad"), ["resume=true"]),
    ):
        with monkeypatch.context() as stopped:
            stopped.setattr(*place, stop)
            with pytest.raises(SystemExit):
                train(monkeypatch, *words, *resumed)
    monkeypatch.setattr(Reconstruction, "reconstruct", None)  # the block is not learned again
    train(monkeypatch, *words, "resume=true")
    whole, cut = (load_file(tmp_path / name / "export" / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole | cut)


SCALES = ["trainable=scales", "callbacks.quantization.freeze_share=0"]
BAD = {
    "unknown recipe": (["recipe=llama_int4_qta"], "no recipe is called 'llama_int4_qta'; did you mean llama_int4_qat?"),
    "unknown scheme": (["quant=w4a61"], "did you mean w4a16?"),
    "unknown key": (["optim.lrr=1"], "did you mean optim.lr?"),
    "unknown added key": (["+trainer.max_step=1"], "did you mean max_steps?"),
    "group size": (["quant.weight.group_size=100"], "layers.0.self_attn.q_proj: group_size 100 does not divide 128"),
    "nonsense scheme": (["quant.weight.granularity=channel"], "group_size goes with granularity='group'"),
    "missing model": (["model.name=./nowhere"], "./nowhere: no such folder"),
    "missing data": (["data.source.path=nowhere.txt"], "nowhere.txt: no such file or folder"),
    "short corpus": (["data.source.path={folder}/short.txt"], "split of data text has no usable token"),
    "long windows": (["data.seq_len=128"], "longer than the model's 64 positions"),
    "bad control": (["control=maybe"], "control must be run, cached or none"),
    "bad start": (["start=ptq"], "start must be float or control"),
    "a start from no control": (["start=control", "control=none"], "needs a scheme, steps and control=cached"),
    "a start from a control without steps": (
        ["start=control", "trainer.max_steps=0"],
        "needs a scheme, steps and control=cached",
    ),
    "unknown export dtype": (["export_dtype=bfloat17"], "export_dtype must be bfloat16, float16, float32 or null"),
    "scales that the export cannot hold": (["export_dtype=float16"], "bfloat16 scales in a float16 model"),
    "scales of keys and values that the export cannot hold": (
        ["export_dtype=float16", "quant=none", "quant.kv_cache=fp8-head"],
        "kv_cache=fp8-head: bfloat16 scales in a float16 model",
    ),
    "an unknown cache": (["quant.kv_cache=int4"], "kv_cache='int4': it is int8 or fp8"),
    "a budget below the smallest widths": (["quant=auto", "quant.budget_bits=2"], "quant.budget_bits=2.125"),
    "an ignored pattern of no layer": (["quant=auto", "quant.ignore=['*lm_haed']"], "matches no layer"),
    "a rule of no layer": (["quant.ignore=['*lm_haed']"], "matches no layer"),
    "a width that the export cannot hold": (["quant=w8a8", "quant.input.bits=4"], "4-bit activations"),
    "a group size that does not divide an untied layer": (
        ["callbacks.quantization.untie=true", "quant.weight.group_size=100"],
        "group_size 100 does not divide 128",
    ),
    "a rotation of tied embeddings": (["calibration=rotation"], "untie it: callbacks.quantization.untie=true"),
    "no steps and no scheme": (["trainer.max_steps=0", "quant=none"], "quant=none quantizes nothing"),
    "no steps and an adapter": (["trainer.max_steps=0", "trainable=lora"], "max_steps=0 trains nothing"),
    "nothing to distill": (["quant=none"], "objective=next_token trains it plainly"),
    "no such LoRA target": (
        ["trainable=lora", "trainable.target_modules=[foo]"],
        "no quantized linear layer is called foo",
    ),
    "damping under LoRA": (
        ["trainable=lora", "callbacks.oscillation.damping=1.0"],
        "damping and freezing move weights, and under LoRA",
    ),
    "scales that freeze while nothing else learns": (["trainable=scales"], "callbacks.quantization.freeze_share=0"),
    "a start after the last step": (["callbacks.quantization.start_step=8"], "start_step=8 leaves no step that trains"),
    "a start in the frozen share": (
        ["callbacks.quantization.start_step=4", "callbacks.quantization.freeze_share=0.5"],
        "of 8 steps the first 4 come before the scales freeze (freeze_share=0.5)",
    ),
    "several devices, before the model is looked for": (
        ["trainer.accelerator=cpu", "trainer.devices=2", "model.name=./nowhere"],
        "trainer.devices=2 comes to 2 processes, and a run is one: use trainer.devices=1",
    ),
    "scales only, from a float start": ([*SCALES, "callbacks.quantization.start_step=2"], "quantization.start_step=0"),
    "scales only, of an estimator that learns none": ([*SCALES, "estimator=ste"], "use estimator=lsq or lsq_log"),
    "scales only, nothing quantized": ([*SCALES, "quant=none"], "quant=none trains no adapter"),
    "scales only, of a table": (
        [*SCALES, "calibration=mse", "quant.kinds=[linear,embedding]", "quant.ignore=[]"],
        "such as model.embed_tokens (Embedding): leave them in float",
    ),
    "scales only, with a rank": ([*SCALES, "+trainable.r=8"], "trainable.r"),
    "damping under scales only": (
        [*SCALES, "callbacks.oscillation.damping=1.0"],
        "damping and freezing move weights, and under LoRA or scales-only",
    ),
    "freezing under scales that follow": (
        ["estimator=ste_mse", "callbacks.oscillation.freezing=0.02"],
        "freezing holds codes under a scale",
    ),
    "a nested width that is not below": (["quant=nested", "quant.weight.nested=[8]"], "integer widths from 2 to 7"),
    "weights of widths that are not nested": (["callbacks.nested.weights={{4:1.0}}"], "no layer has nested widths"),
    "an export at a width that is not nested": (["quant=nested", "export_bits=3"], "which are [8, 4, 2]"),
    "a second search without a first": (["repeat_search=true"], "needs quant=auto, and steps"),
    "a second search after no training": (
        ["quant=auto", "trainer.max_steps=0", "repeat_search=true"],
        "needs quant=auto, and steps",
    ),
    "NaN weights": (["model.name={folder}/nan"], "lm_head"),
}


@pytest.mark.parametrize("words,message", BAD.values(), ids=BAD.keys())
def test_bad_input_is_refused_before_anything_long(words, message, job, monkeypatch, tmp_path, capsys):
    folder, base = job
    (folder / "short.txt").write_text("x = 1")
    if not (folder / "nan").exists():
        (folder / "nan").mkdir()
        for file in (folder / "model").iterdir():
            (folder / "nan" / file.name).write_bytes(file.read_bytes())
        weights = load_file(folder / "model" / "model.safetensors")
        weights["model.norm.weight"][5] = torch.nan
        save_file(weights, folder / "nan" / "model.safetensors", metadata={"format": "pt"})
    message = message if message != "lm_head" else "parameter model.norm.weight holds 1 NaN"
    changed = [w.format(folder=folder) for w in words]
    keys = {w.split("=")[0] for w in changed}
    base = [w for w in base if w.split("=")[0] not in keys]
    with pytest.raises(SystemExit) as stopped:
        train(monkeypatch, *base, *changed, f"hydra.run.dir={tmp_path}/run")
    assert message in str(stopped.value)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_hidden_states_of_a_model_without_blocks_are_refused_before_the_control_is_trained(monkeypatch, tmp_path):
    words = ["recipe=digits_int8_qat", "objective=distillation", "objective.hidden=1", "logger=none"]
    with pytest.raises(SystemExit, match="no chain of blocks"):
        train(monkeypatch, *words, f"control_dir={tmp_path}/controls", f"hydra.run.dir={tmp_path}/run")
    assert not (tmp_path / "controls").exists()


def test_a_tied_head_is_untied_for_the_control_too(job, monkeypatch, tmp_path):
    _, words = job
    train(monkeypatch, *words, "callbacks.quantization.untie=true", "quant.ignore=[]", f"hydra.run.dir={tmp_path}/run")
    assert "lm_head.weight_packed" in load_file(tmp_path / "run" / "export" / "model.safetensors")
    summary = read_summary(tmp_path / "run")
    assert summary["packed_loss"] == pytest.approx(summary["qat_loss"], abs=1e-6)


def test_resume_says_which_run_and_goes_on_with_what_it_started_with(job, monkeypatch, tmp_path):
    _, words = job
    with pytest.raises(SystemExit, match=r"resume=true needs hydra\.run\.dir"):
        train(monkeypatch, *words, "resume=true")
    with pytest.raises(SystemExit, match="there is no run folder"):
        train(monkeypatch, *words, "resume=true", f"hydra.run.dir={tmp_path}/nowhere")
    train(monkeypatch, *words, f"hydra.run.dir={tmp_path}/run")
    with pytest.raises(SystemExit, match=r"was started with optim\.lr=0\.001, and resume=true goes on with that"):
        train(monkeypatch, *words, "optim.lr=1e-4", "resume=true", f"hydra.run.dir={tmp_path}/run")


def test_a_misspelt_key_inside_a_recipe_is_named(job, monkeypatch, tmp_path):
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    node = OmegaConf.create({"trainer": {"max_stepz": 3}})
    ConfigStore.instance().store(group="recipe", name="misspelt", node=node, package="_global_")
    monkeypatch.setattr("qat.config.choices", lambda: {"recipe": ["misspelt"]})
    with pytest.raises(SystemExit, match=r"trainer\.max_stepz; did you mean max_steps\?"):
        train(monkeypatch, "recipe=misspelt", f"hydra.run.dir={tmp_path}/run")


def test_a_folder_that_holds_a_run_is_not_written_into(job, monkeypatch, tmp_path):
    _, words = job
    out = tmp_path / "run"
    (out / "checkpoints").mkdir(parents=True)
    before = sorted(out.rglob("*"))
    with pytest.raises(
        SystemExit, match=r"holds a run: choose another hydra\.run\.dir, or go on with it by resume=true"
    ):
        train(monkeypatch, *words, f"hydra.run.dir={out}")
    assert sorted(out.rglob("*")) == before


def test_a_folder_in_which_another_process_runs_is_refused_until_that_ends(job, monkeypatch, tmp_path):
    out = tmp_path / "run"
    words = [*job[1], "control=none", f"hydra.run.dir={out}"]
    held = "from filelock import FileLock; lock = FileLock(r'%s').acquire(); print('held', flush=True); input()"
    out.mkdir()
    other = subprocess.Popen([sys.executable, "-c", held % (out / ".lock")], stdin=-1, stdout=-1, text=True)
    assert other.stdout.readline() == "held\n"
    with pytest.raises(SystemExit, match=r"another process runs in .*/run: wait until it has ended"):
        train(monkeypatch, *words)
    assert [path.name for path in out.iterdir()] == [".lock"]  # Hydra wrote nothing over the other's files
    other.kill()
    other.communicate()
    train(monkeypatch, *words)
    assert read_summary(out)["qat_loss"] is not None


def test_two_runs_at_once_train_their_control_once(job, tmp_path):
    words = [w for w in job[1] if not w.startswith("control_dir")] + [f"control_dir={tmp_path}/controls"]
    runs = [
        subprocess.Popen(command([*words, f"hydra.run.dir={tmp_path}/{name}"]), stdout=-1, stderr=-2, text=True)
        for name in "ab"
    ]
    shown = [run.communicate(timeout=240)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], shown
    assert sum("training the float control" in output for output in shown) == 1
    assert sum("control trained before" in output for output in shown) == 1
    losses = [read_summary(tmp_path / name)["control_loss"] for name in "ab"]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    "words,warned",
    [(["quant=w4a8"], True), (["quant=w4a16"], False), (["quant=w4a8", "calibration=smoothquant"], False)],
    ids=["w4a8", "weights alone", "smoothquant"],
)
def test_outliers_that_nothing_is_done_about_are_named_with_the_remedy(
    words, warned, job, monkeypatch, tmp_path, capsys
):
    model, tokenizer = load(str(job[0] / "model"))
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[3] *= 1000
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    words = [*job[1], *words, f"model.name={tmp_path}/model", "trainer.max_steps=0"]
    train(monkeypatch, *words, f"hydra.run.dir={tmp_path}/run")
    said = (
        r"input channels in \d layers are over 10 times as large as the median one.*calibration=rotation spreads them"
    )
    assert bool(re.search(said, capsys.readouterr().out)) is warned
    outliers = {row["name"]: row["outlier_inputs"] for row in read_summary(tmp_path / "run")["layers"]}
    assert outliers["model.layers.0.self_attn.q_proj"] == 1 and outliers["model.layers.0.mlp.up_proj"] == 0


def test_rotary_frequencies_of_a_float_run_keep_their_dtype(job, monkeypatch, tmp_path):
    tasks = []
    monkeypatch.setattr(Run, "_train", lambda self, task, *_: (tasks.append(task), sys.exit())[1])
    with pytest.raises(SystemExit):
        train(monkeypatch, *job[1], "quant=none", "objective=next_token", f"hydra.run.dir={tmp_path}/run")
    frequencies = [b for n, b in tasks[0].to(torch.bfloat16).named_buffers() if n.endswith("inv_freq")]
    assert frequencies and all(buffer.dtype == torch.float32 for buffer in frequencies)


def test_hydras_own_config_dir_brings_choices_of_the_users(job, monkeypatch, tmp_path):
    (tmp_path / "mine" / "quant").mkdir(parents=True)
    own = OmegaConf.load(ROOT / "conf" / "quant" / "w4a16.yaml")
    own.weight.group_size = 32
    OmegaConf.save(own, tmp_path / "mine" / "quant" / "own.yaml")
    words = ["--config-dir", f"{tmp_path}/mine", *job[1], "quant=own", "trainer.max_steps=0"]
    train(monkeypatch, *words, f"hydra.run.dir={tmp_path}/run")
    assert {row["scheme"] for row in read_summary(tmp_path / "run")["layers"]} == {"w4a16-g32"}
    with pytest.raises(SystemExit, match="holds a run"):  # no option hides the folder
        train(monkeypatch, *words, f"hydra.run.dir={tmp_path}/run")


def test_help_teaches():
    environment = {**os.environ, "COLUMNS": "100"}
    shown = subprocess.run(command(["--help"]), capture_output=True, text=True, env=environment).stdout
    assert "qat train recipe=llama_int4_qat" in shown and "control:" in shown and "w4a8" in shown


def test_a_full_disk_at_export_loses_nothing(job, monkeypatch, tmp_path):
    _folder, words = job
    words = [*words, f"hydra.run.dir={tmp_path}/run"]
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as full:
        full.setattr("qat.export.directory.shutil.disk_usage", lambda path: usage(10**9, 10**9, 0))
        with pytest.raises(SystemExit, match=r"error: .*could not write .*run/export.*0 free"):
            train(monkeypatch, *words)
    assert not (tmp_path / "run" / "export").exists()
    train(monkeypatch, *words, "resume=true")  # nothing is left to train
    train(monkeypatch, *words[:-1], f"hydra.run.dir={tmp_path}/whole")
    whole, late = (load_file(tmp_path / name / "export" / "model.safetensors") for name in ("whole", "run"))
    assert all(torch.equal(whole[name], late[name]) for name in whole | late)
    assert read_summary(tmp_path / "run")["qat_loss"] == read_summary(tmp_path / "whole")["qat_loss"]
