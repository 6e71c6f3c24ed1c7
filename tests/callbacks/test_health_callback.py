"""The health of training, watched on somebody else's module."""

import logging

import lightning as L
import pytest
import torch
from digits import Classifier, digits, int4, trainer
from lightning.pytorch.loggers import CSVLogger

from qat.callbacks import LoRA, TrainingHealth
from qat.diagnosis.health import FIGURES, LIMITS
from qat.estimators import STE


def fit(*callbacks, module=None, path=None, **settings):
    module = module or Classifier()
    run = trainer(*callbacks, max_epochs=-1, **settings)
    run.fit(module, digits(batch_size=1500)[0], ckpt_path=path, weights_only=False)  # one batch an epoch
    return module, run


def test_watching_changes_no_bit_of_what_is_trained():
    watched, plain = fit(int4(), TrainingHealth(every=2))[0], fit(int4())[0]
    for (name, value), other in zip(plain.state_dict().items(), watched.state_dict().values(), strict=True):
        assert torch.equal(value, other), name


def test_a_look_every_few_steps_from_the_start_of_quantization():
    health = TrainingHealth(every=3)
    fit(int4(start_step=4, freeze_share=0.25), health)
    assert [row["step"] for row in health.rows] == [6, 9, 12]
    assert set(health.rows[0]) == {"step", *FIGURES}
    trained, last = health.rows[0], health.rows[-1]
    assert trained["gradient_ratio"] > 0 and last["gradient_ratio"] is None  # the scales are frozen by then
    assert 0 < trained["changed"] < 1 and trained["scale_drift"] > 0


def test_scales_that_do_not_learn_have_no_gradient_ratio_and_no_drift():
    health = TrainingHealth(every=4)
    fit(int4(estimator=STE(), freeze_share=0.0), health)
    assert {(row["gradient_ratio"], row["scale_drift"]) for row in health.rows} == {(None, 0.0)}


def test_under_lora_codes_change_though_weights_do_not_and_there_is_no_gradient_ratio():
    health = TrainingHealth(every=4)
    module, _ = fit(int4(), LoRA(r=4), health)
    assert torch.equal(module.network[0].weight, Classifier().network[0].weight)
    assert all(row["changed"] > 0 and row["gradient_ratio"] is None for row in health.rows[:2])


@pytest.mark.parametrize("stop", [2, 3, 5, 9])
def test_a_resumed_run_tells_the_same_story(stop, tmp_path):
    whole, first, second = (TrainingHealth(every=3) for _ in range(3))
    settings = {"start_step": 2, "freeze_share": 0.25}
    fit(int4(**settings), whole)
    # The schedule of stages hangs on the whole run's length: stopped, not shortened.
    stopped = trainer(int4(**settings), first, _StopAt(stop, tmp_path / "x.ckpt"), max_epochs=-1)
    stopped.fit(Classifier(), digits(batch_size=1500)[0])
    fit(int4(**settings), second, path=tmp_path / "x.ckpt")
    assert len(first.rows) < len(whole.rows)
    assert second.rows == whole.rows


class _StopAt(L.Callback):
    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


def test_figures_go_to_the_logger(tmp_path):
    health = TrainingHealth(every=6)
    fit(int4(), health, logger=CSVLogger(tmp_path, name="", version=""))
    header = (tmp_path / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {f"health/{name}" for name in FIGURES} <= set(header)


def test_an_unusual_figure_is_warned_about_once_with_its_remedy(monkeypatch, caplog):
    monkeypatch.setitem(LIMITS, "changed", (0.0, 1e-6, "do something"))
    with caplog.at_level(logging.WARNING, logger="qat.callbacks.health"):
        health = TrainingHealth(every=2)
        fit(int4(), health)
    changed = [r.message for r in caplog.records if "changed" in r.message]
    assert len(health.rows) == 6 and len(changed) == 1
    assert changed[0].startswith("step 2: changed is ") and changed[0].endswith("do something")


def test_no_step_between_looks_is_refused():
    with pytest.raises(ValueError, match="at least 1, got every=0"):
        TrainingHealth(every=0)
