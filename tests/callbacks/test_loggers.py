"""Every job of a sweep has a W&B run of its own."""

import wandb

from qat.callbacks.loggers import wandb_logger


def test_two_loggers_of_one_process_are_two_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    runs = []
    for job in range(2):
        (tmp_path / str(job)).mkdir()
        logger = wandb_logger(project="test", save_dir=str(tmp_path / str(job)), name=f"job{job}")
        logger.log_metrics({"recovery/qat_loss": float(job)})
        runs.append(logger.experiment.id)
    wandb.finish()
    assert len(set(runs)) == 2
    for job, run in enumerate(runs):
        (file,) = (tmp_path / str(job) / "wandb").glob("offline-run-*/*.wandb")
        assert file.name == f"run-{run}.wandb" and file.stat().st_size > 0
