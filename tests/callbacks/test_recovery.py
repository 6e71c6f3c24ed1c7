"""What Recovery measures is what one would measure by hand, and it is put back as it was."""

import json

import lightning as L
import pytest
import torch
from digits import Classifier, digits, int4, trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import CombinedLoader
from torch.nn import functional as F
from torch.utils.data import DataLoader

from qat.calibration import RangeCalibration
from qat.callbacks import QuantizationAwareTraining, Recovery
from qat.callbacks.batches import step_losses
from qat.callbacks.control import WEIGHTS, control_folder, load_control, train_control, weights_digest
from qat.callbacks.recovery import Control
from qat.fake_quantizer import Stage
from qat.insertion import insert, set_stage
from qat.scheme import QuantSpec, uniform

LOADERS = digits()


class Data(L.LightningDataModule):
    def train_dataloader(self):
        return LOADERS[0]

    def val_dataloader(self):
        return LOADERS[1]


def loss_by_hand(module, batches: int = 5) -> float:
    images, labels = (field[: 64 * batches] for field in LOADERS[1].dataset.tensors)
    with torch.no_grad():
        return float(F.cross_entropy(module(images), labels))


def fitted(recovery, **settings):
    module = Classifier()
    run = trainer(int4(), recovery, limit_val_batches=None, val_check_interval=4, **settings)
    run.fit(module, *LOADERS)
    return module, run


def test_float_and_ptq_losses_are_those_of_the_untrained_model():
    recovery = Recovery()
    fitted(recovery)
    module = Classifier()
    assert recovery.models["float"]["validation"].loss == pytest.approx(loss_by_hand(module), rel=1e-6)
    insert(module, int4().schemes)
    RangeCalibration("absmax", weight="absmax")(module, lambda: None)
    set_stage(module, Stage.FROZEN)
    assert recovery.models["ptq"]["validation"].loss == pytest.approx(loss_by_hand(module), rel=1e-6)


@pytest.mark.parametrize("with_data", [False, True], ids=["loaders", "datamodule"])
@pytest.mark.parametrize(("limit", "batches"), [(1, 1), (2, 2), (0.5, 2), (9, 5), (1.0, 5)], ids=str)
def test_a_limit_of_validation_batches_is_that_of_every_measurement(limit, batches, with_data):
    recovery, module = Recovery(), Classifier()
    run = trainer(int4(), recovery, steps=2, limit_val_batches=limit, val_check_interval=2)
    run.fit(module, *([Data()] if with_data else LOADERS))
    assert recovery.models["float"]["validation"].loss == pytest.approx(loss_by_hand(Classifier(), batches), rel=1e-6)
    assert recovery.models["qat"]["validation"].loss == pytest.approx(loss_by_hand(module, batches), rel=1e-6)
    assert recovery.history[0]["qat_loss"] == recovery.models["qat"]["validation"].loss


def test_no_validation_while_training_measures_before_and_after_it():
    recovery = Recovery()
    trainer(int4(), recovery, limit_val_batches=0, steps=2).fit(Classifier(), Data())
    assert recovery.models["float"]["validation"].loss == pytest.approx(loss_by_hand(Classifier()), rel=1e-6)
    assert not recovery.history
    with pytest.raises(ValueError, match=r"give fit one, and limit_val_batches \(it is 0\) above 0"):
        trainer(int4(), Recovery(), limit_val_batches=0).fit(Classifier(), *LOADERS)


def test_a_share_that_comes_to_no_batch_is_refused():
    with pytest.raises(ValueError, match=r"limit_val_batches=0.1 of 5 batches is none"):
        trainer(int4(), Recovery(), limit_val_batches=0.1).fit(Classifier(), Data())


@pytest.mark.parametrize("kind", [list, tuple, lambda loaders: dict(enumerate(loaders)), CombinedLoader])
def test_several_validation_loaders_are_refused_with_the_remedy(kind):
    class Several(Classifier):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            return super().validation_step(batch, batch_idx)

    with pytest.raises(ValueError, match=r"val_dataloader gives several loaders.*ConcatDataset"):
        trainer(int4(), Recovery(), limit_val_batches=2).fit(Several(), LOADERS[0], kind([LOADERS[1], LOADERS[1]]))


def test_a_validation_loader_that_shuffles_is_refused():
    loader = DataLoader(LOADERS[1].dataset, batch_size=2, shuffle=True)
    with pytest.raises(ValueError, match=r"val_dataloader shuffles.*shuffle=False"):
        trainer(int4(), Recovery(), limit_val_batches=None).fit(Classifier(), LOADERS[0], loader)


def test_a_list_of_one_loader_is_that_loader():
    recovery = Recovery()
    trainer(int4(), recovery, steps=1, limit_val_batches=None).fit(Classifier(), LOADERS[0], [LOADERS[1]])
    assert recovery.models["float"]["validation"].loss == pytest.approx(loss_by_hand(Classifier()), rel=1e-6)


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        ({"text": ["a b", "c d"], "input_ids": torch.zeros(2, 4)}, 2),
        ({"epoch": 7, "x": [torch.tensor(1.0), torch.zeros(3)]}, 3),
        ([torch.zeros(5, 2), torch.zeros(4)], 5),
    ],
)
def test_a_batch_weighs_what_its_first_tensor_is_long(batch, size):
    assert step_losses(torch.tensor(2.0), batch, 0).tokens.tolist() == [size]


@pytest.mark.parametrize("batch", ["a b", 7, ["a", "b"], {"loss": torch.tensor(1.0)}, []], ids=str)
def test_a_batch_without_a_size_is_refused(batch):
    with pytest.raises(ValueError, match=r"holds no tensor whose length.*return qat\.evaluation\.Losses"):
        step_losses(torch.tensor(1.0), batch, 0)


def test_measuring_changes_nothing_in_the_training():
    with_recovery, _ = fitted(Recovery())
    without = Classifier()
    trainer(int4()).fit(without, LOADERS[0])
    for (name, value), other in zip(with_recovery.state_dict().items(), without.state_dict().values(), strict=True):
        assert torch.equal(value, other), name


def test_the_final_qat_loss_is_that_of_the_trained_module():
    recovery = Recovery()
    module, _ = fitted(recovery)
    assert recovery.models["qat"]["validation"].loss == pytest.approx(loss_by_hand(module), rel=1e-6)


def test_every_validation_is_in_the_history_and_in_the_logger(tmp_path):
    recovery = Recovery()
    logger = CSVLogger(tmp_path, name=None, version="m")
    fitted(recovery, logger=logger)
    assert [row["step"] for row in recovery.history] == [4, 8, 12]
    logger.save()
    assert "recovery/qat_loss" in (tmp_path / "m" / "metrics.csv").read_text()


def test_recovery_over_control_uses_the_control():
    first = Recovery()
    fitted(first)
    control = Control(first.models["qat"], first.models["ptq"], "absmax")
    recovery = Recovery(control=control)
    fitted(recovery)
    figures = recovery.figures("validation", recovery.models["qat"]["validation"])
    assert figures["qat_minus_control_ptq"].value == pytest.approx(
        recovery.models["qat"]["validation"].loss - first.models["ptq"]["validation"].loss
    )
    without = first.figures("validation", first.models["qat"]["validation"])
    assert without["recovery_over_control"].value is None
    assert "control=none" in without["recovery_over_control"].reason


def test_the_state_survives_a_checkpoint_as_plain_tensors(tmp_path):
    recovery = Recovery()
    fitted(recovery)
    torch.save(recovery.state_dict(), tmp_path / "state.pt")
    restored = Recovery()
    restored.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert restored.models["ptq"]["validation"].loss == recovery.models["ptq"]["validation"].loss
    assert json.dumps(restored.history) == json.dumps(recovery.history)


def test_a_validation_step_without_a_loss_is_refused_with_the_remedy():
    class Silent(Classifier):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)

    with pytest.raises(ValueError, match="it must return the batch's mean loss"):
        trainer(int4(), Recovery(), limit_val_batches=None).fit(Silent(), *LOADERS)


def test_recovery_needs_the_quantization_callback():
    with pytest.raises(ValueError, match="Recovery needs a QuantizationAwareTraining callback"):
        trainer(Recovery(), limit_val_batches=None).fit(Classifier(), *LOADERS)


def test_a_schedule_that_trains_nothing_is_refused_before_anything_is_measured():
    recovery = Recovery()
    with pytest.raises(ValueError, match="start_step=6 leaves no step that trains through"):
        trainer(int4(start_step=6), recovery, steps=6, limit_val_batches=None).fit(Classifier(), *LOADERS)
    assert not recovery.models


def test_the_control_is_trained_once_and_equals_plain_training(tmp_path):
    folder = control_folder(tmp_path, {"max_steps": 6}, model=weights_digest(Classifier()))
    train_control(folder, Classifier(), Data(), lambda checkpoints: trainer(steps=6))
    plain, loaded = Classifier(), Classifier()
    trainer(steps=6).fit(plain, LOADERS[0])
    load_control(folder / WEIGHTS, loaded)
    for (name, value), other in zip(plain.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(value, other), name


def test_a_control_is_known_by_everything_it_depends_on(tmp_path):
    base = {"model": "a", "batches": "b", "seed": 0}
    trainer = {"max_steps": 6, "log_every_n_steps": 10}
    folder = control_folder(tmp_path, trainer, **base)
    assert folder == control_folder(tmp_path, {**trainer, "log_every_n_steps": 1}, **dict(reversed(base.items())))
    assert folder != control_folder(tmp_path, {**trainer, "max_steps": 7}, **base)
    assert all(folder != control_folder(tmp_path, trainer, **{**base, key: "other"}) for key in base)


def test_a_weights_digest_sees_one_changed_bit():
    module, other = Classifier(), Classifier()
    assert weights_digest(module) == weights_digest(other)
    with torch.no_grad():
        other.network[0].weight[0, 0] = torch.nextafter(other.network[0].weight[0, 0], torch.tensor(1.0))
    assert weights_digest(module) != weights_digest(other)


def test_a_model_all_in_bfloat16_is_measured_and_calibrated_on_images_that_are_not():
    schemes = uniform(QuantSpec(bits=8, granularity="channel"), QuantSpec(bits=8, granularity="tensor"))
    quantization = QuantizationAwareTraining(schemes, submodule="network", calibration_loader=LOADERS[0])
    recovery = Recovery()
    trainer(quantization, recovery, precision="bf16-true", limit_val_batches=None).fit(Classifier(), *LOADERS)
    assert recovery.models["qat"]["validation"].loss < recovery.models["float"]["validation"].loss
