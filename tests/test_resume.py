import json

import pytest
from omegaconf import OmegaConf

from qat.resume import RECORD, check_resume, experiment

CONFIG = {
    "seed": 0,
    "optim": {"lr": 3e-4, "betas": [0.9, 0.95]},
    "trainer": {"max_steps": 8, "enable_progress_bar": True},
    "logger": {"save_dir": "a"},
    "resume": False,
}


def check(out, **changes) -> None:
    out.mkdir(exist_ok=True)
    config = OmegaConf.create(CONFIG)
    for key, value in changes.items():
        OmegaConf.update(config, key, value, force_add=True)
    check_resume(out, config, model="abc")


def test_the_same_run_goes_on(tmp_path):
    check(tmp_path)
    check(tmp_path, resume=True)


def test_what_no_weight_depends_on_may_change(tmp_path):
    check(tmp_path)
    check(tmp_path, **{"resume": True, "logger.save_dir": "b", "trainer.enable_progress_bar": False})


@pytest.mark.parametrize(
    ("key", "value"), [("optim.lr", 1e-4), ("trainer.max_steps", 16), ("seed", 1), ("optim.betas", [0.9, 0.99])]
)
def test_a_changed_key_is_refused_by_name_and_the_record_stays(tmp_path, key, value):
    check(tmp_path)
    before = (tmp_path / RECORD).read_text()
    with pytest.raises(ValueError, match=rf"was started with {key}=.*leave {key} as it was, or start a new run"):
        check(tmp_path, **{"resume": True, key: value})
    assert (tmp_path / RECORD).read_text() == before


def test_the_controls_rate_may_change_unless_training_starts_from_the_control(tmp_path):
    check(tmp_path / "float", control_lr=1e-4, start="float")
    check(tmp_path / "float", control_lr=1e-3, start="float", resume=True)
    check(tmp_path / "control", control_lr=1e-4, start="control")
    with pytest.raises(ValueError, match=r"was started with control_lr=0\.0001"):
        check(tmp_path / "control", control_lr=1e-3, start="control", resume=True)


def test_a_run_from_before_there_was_a_choice_of_start_goes_on(tmp_path):
    check(tmp_path)
    check(tmp_path, start="float", resume=True)
    with pytest.raises(ValueError, match="was started with start=float"):
        check(tmp_path, start="control", resume=True)


def test_another_model_of_the_same_name_is_refused(tmp_path):
    check(tmp_path)
    assert json.loads((tmp_path / RECORD).read_text())["digest of model"] == "abc"
    with pytest.raises(ValueError, match="digest of model=abc"):
        check_resume(tmp_path, OmegaConf.create({**CONFIG, "resume": True}), model="xyz")


def test_a_new_run_where_one_never_got_to_train_has_a_record_of_its_own(tmp_path):
    check(tmp_path)
    check(tmp_path, **{"optim.lr": 1e-4})
    check(tmp_path, **{"optim.lr": 1e-4, "resume": True})


def test_the_digest_of_a_config_is_that_of_the_experiment():
    def digest(**changes) -> str:
        config = OmegaConf.create({**CONFIG, "data": {"seed": "${seed}"}, "control_lr": None, "control_dir": "a"})
        for key, value in changes.items():
            OmegaConf.update(config, key, value)
        return experiment(config, [])["config_digest"]

    same = [{"seed": 1}, {"logger.save_dir": "b"}, {"trainer.enable_progress_bar": False}, {"control_dir": "b"}]
    others = [{"optim.lr": 1e-4}, {"trainer.max_steps": 16}, {"control_lr": 1e-4}]
    assert {digest(**change) for change in same} == {digest()}
    assert len({digest(), *(digest(**change) for change in others)}) == 4


def test_overrides_are_those_that_a_figure_depends_on():
    words = ["recipe=x", "+optim.lr=1e-4", "seed=1", "logger=csv", "logger.save_dir=b", "data.seed=3", "~data.extra"]
    assert experiment(OmegaConf.create(CONFIG), words)["overrides"] == ["+optim.lr=1e-4", "data.seed=3", "~data.extra"]
