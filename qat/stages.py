"""The stages of a run, in order; `Run.all` reads as the table of contents."""

import logging
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from qat import __version__
from qat.calibration import CALIBRATIONS, Calibration
from qat.callbacks import Export, QuantizationAwareTraining, Recovery, Trainable
from qat.callbacks.control import (
    WEIGHTS,
    Control,
    control_folder,
    hold_control,
    keep_control,
    load_control,
    measure_control,
    train_control,
    weights_digest,
)
from qat.callbacks.coverage import layer_rows, measure_coverage
from qat.callbacks.history import TrainHistory
from qat.callbacks.measure import Measure, Measured
from qat.callbacks.recovery import measure_untrained
from qat.callbacks.widths import search_widths
from qat.checks import check, export_dtype
from qat.diagnosis import WidthSearch
from qat.export import write_float
from qat.fake_quantizer import Stage
from qat.inference import load_packed
from qat.insertion import prepare, set_stage
from qat.quiet import quiet
from qat.report.build import build_summary, versions, write_summary
from qat.report.html import write_report
from qat.report.summary import read_summary
from qat.report.table import run_table
from qat.resume import check_resume, experiment
from qat.scheme import SchemeMap
from qat.structure import keep_frequencies, untie
from qat.tasks.models import check_positions
from qat.trainer import build_trainer, check_devices, resume_command

log = logging.getLogger("qat")

START = "start.safetensors"  # in the folder of a run with start=control: what it starts from


class Run:
    """One run: its config, its folder, and what the stages hand on.

    Args:
        cfg: composed.
        out: the run's folder; created.
    """

    def __init__(self, cfg: DictConfig, out: Path):
        self.cfg, self.out, self._trainer = cfg, out, partial(build_trainer, cfg, out)
        self.stages: dict[str, float] = {}
        self.started = time.monotonic()
        self._post_training = cfg.trainer.max_steps == 0  # the model is quantized as it is: no optimizer, no control
        self._calibration_folder = out / "calibration"  # keeps finished blocks until the run is
        self.control: Control | None = None
        self.untrained: dict[str, Measured] | None = None
        self.search: WidthSearch | None = None
        self.searched: dict[str, Any] = {}

    def all(self) -> dict[str, Any]:
        """Every stage; returns the summary."""
        self.out.mkdir(parents=True, exist_ok=True)
        torch.set_flush_denormal(True)
        quiet()
        check_devices(self.cfg.trainer)
        with self._stage("load"):
            self.data = instantiate(self.cfg.data)
            self.schemes = self._schemes()
            task = self._task()
            self._check(task)
        if self.schemes.quantizes:
            with self._stage("coverage"):
                self._measure_coverage(task)
        del task  # large, and not needed before the control is there
        controlled = self.schemes.quantizes and self.cfg.control != "none" and not self._post_training
        if controlled:
            with self._stage("control"):
                self._train_control()
        if self.search is not None:
            with self._stage("search widths"):
                task = self._start()
                self._search_widths(self.search, task, "sensitivity.json", weights_digest(task))
                del task
        if controlled:
            with self._stage("measure control"):
                self._measure_control()
        with self._stage("calibrate" if self._post_training else "train"):
            task = self._start()
            (self._calibrate if self._post_training else self._train)(task)
        if self.search is not None and self.cfg.repeat_search:
            task = self._repeat(self.search, task)
        if self.schemes.quantizes:
            with self._stage("measure packed"):
                self._measure_packed(task)
        summary = self._report()
        shutil.rmtree(self._calibration_folder, ignore_errors=True)  # of use to an unfinished run only, as is the start
        (self.out / START).unlink(missing_ok=True)
        return summary

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        log.info("== %s", name)
        start = time.monotonic()
        yield
        self.stages[name] = round(time.monotonic() - start, 1)

    # -- load ---------------------------------------------------------------------------------------

    def _schemes(self) -> SchemeMap:
        """The map; where widths are searched, the smallest until they are found: what it refuses, all of them do."""
        chosen = instantiate(self.cfg.quant)
        if not isinstance(chosen, WidthSearch):
            return chosen
        self.search = chosen
        return chosen.uniform(min(chosen.widths))

    def _task(self, **optim: Any) -> L.LightningModule:
        """A fresh LightningModule around the float model; equal every time it is called with equal settings."""
        L.seed_everything(self.cfg.seed, verbose=False)
        model, tokenizer = instantiate(self.cfg.model)
        self.float_bytes = 2 * sum(p.numel() for p in model.parameters())  # in 16 bits, as it is served
        keep_frequencies(model)
        if self.schemes.quantizes:  # here, so that the control is trained as QAT is
            prepare(model, self.schemes)
            if self.cfg.callbacks.quantization.untie:
                untie(model)
        self.data.tokenizer = self.tokenizer = tokenizer
        return instantiate(self.cfg.task, model=model, **{**self.cfg.optim, **optim})

    def _start(self) -> L.LightningModule:
        """`_task`, with the weights that quantization starts from."""
        task = self._task()
        if self.cfg.start == "control":
            load_control(self.control_weights, task)
        return task

    def _check(self, task: L.LightningModule) -> None:
        """Whatever can be refused is refused here, before anything long."""
        self.data.setup()
        check(self.cfg, task, self.schemes, self.search, self._quantization(), self._trainable())
        model: Any = task.model
        check_positions(model, self.data.seq_len, "data.seq_len")
        self.digest, self.architecture = weights_digest(task), model.config.to_dict()
        check_resume(self.out, self.cfg, model=self.digest, batches=self.data.digest)

    def _idle_trainer(self) -> L.Trainer:
        """To measure with, outside of fit."""
        trainer = self._trainer(self.out / "checkpoints", [], logger=False)
        trainer.datamodule = self.data  # type: ignore[attr-defined]
        return trainer

    # -- callbacks ----------------------------------------------------------------------------------

    def _quantization(self) -> QuantizationAwareTraining:
        build = instantiate(self.cfg.callbacks.quantization, _partial_=True)
        return build(schemes=self.schemes, calibration_folder=self._calibration_folder)

    def _trainable(self) -> Trainable:
        trainable, folder = instantiate(self.cfg.trainable), self.out / "adapter"
        if self.cfg.start == "float" and not folder.exists():  # others have that model, and not the control
            trainable.folder, trainable.base = folder, self.cfg.model.name
        return trainable

    # -- widths -------------------------------------------------------------------------------------

    def _search_widths(self, search: WidthSearch, task: L.LightningModule, name: str, digest: str) -> None:
        at = self.out / name
        try:
            found = search_widths(search, task, self._idle_trainer(), self._quantization(), at, digest, self.cfg.resume)
            self.schemes, self.searched = found
        except KeyboardInterrupt:
            sys.exit(f"stopped; finished widths are kept. It goes on with:\n  {resume_command(self.out)}")

    def _repeat(self, search: WidthSearch, task: L.LightningModule) -> L.LightningModule:
        """Search widths with the trained weights; where others come out, train those too. The better one stands."""
        first = dict(vars(self))
        with self._stage("search again"):
            trained, weights = self._task(), task.state_dict()
            trained.load_state_dict({name: weights[name] for name in trained.state_dict()})
            self._search_widths(search, trained, "sensitivity-2.json", weights_digest(trained))
        if self.schemes.rules == first["schemes"].rules:
            log.info("the trained weights ask for the widths that they were trained at")
            vars(self).update(first)
            return task
        if self.control is not None:
            with self._stage("measure control again"):
                self._measure_control()
        with self._stage("train again"):
            self.trainer.strategy.optimizers, self.trainer.callbacks = [], []  # type: ignore[attr-defined]  # memory
            again = self._start()
            self._train(again, "checkpoints-2")
        before, now = (r.models["qat"]["validation"].loss for r in (first["recovery"], self.recovery))
        log.info("validation loss %.5f, %.5f with the widths found after training: the better stands", before, now)
        if before <= now:
            vars(self).update(first)
        return task if before <= now else again

    # -- calibration data ---------------------------------------------------------------------------

    def _measure_coverage(self, task: L.LightningModule) -> None:
        trainer, quantization = self._idle_trainer(), self._quantization()
        quantization.setup(trainer, task, "validate")
        instantiate(self.cfg.objective).check(task, quantization)
        self.reached = measure_coverage(task, trainer, quantization)

    # -- control ------------------------------------------------------------------------------------

    def _train_control(self) -> None:
        lr = self.cfg.optim.lr if self.cfg.control_lr is None else self.cfg.control_lr
        trainer: Any = OmegaConf.to_container(self.cfg.trainer, resolve=True)
        # A teacher keeps fine-tuning from overfitting: a control without one would flatter a mixture that has it.
        mixed = {"objective": {**self.cfg.objective, "hidden": 0.0}} if 0 < self.cfg.objective.weight < 1 else {}
        start = self.out / START
        if self.cfg.resume and start.exists():  # the teacher of before, whatever has become of the shared control
            self.control_weights = start
            return
        control_at = control_folder(
            Path(self.cfg.control_dir),
            model=self.digest,
            architecture=self.architecture,
            batches=self.data.digest,
            task=OmegaConf.to_container(self.cfg.task, resolve=True),
            optim={**self.cfg.optim, "lr": lr},
            trainer=trainer,
            seed=self.cfg.seed,
            versions=[__version__, torch.__version__],
            **mixed,
        )
        self.control_weights = control_at / WEIGHTS
        with hold_control(control_at, self.cfg.control == "cached") as trained:
            if trained:
                log.info("control trained before: %s", control_at)
            else:
                log.info("training the float control (kept in %s)", control_at)
                callbacks = [instantiate(objective) for objective in mixed.values()]
                trainer_of = partial(self._trainer, callbacks=callbacks, logger=False, limit_val_batches=0)
                train_control(control_at, self._task(lr=lr), self.data, trainer_of)
            if self.cfg.start == "control":
                keep_control(control_at, start)

    def _measure_control(self) -> None:
        trainer, quantization = self._idle_trainer(), self._quantization()
        if self.cfg.start == "control":  # the float model, which training does not see
            measure = Measure.before_fit(trainer, self._task(), quantization)
            self.untrained = measure_untrained(measure, self._compared(quantization))
            del measure
        task = self._task()
        load_control(self.control_weights, task)
        choices = {**CALIBRATIONS, quantization.calibration.name: quantization.calibration}
        self.control = measure_control(task, trainer, quantization, list(choices.values()))

    # -- train, export ------------------------------------------------------------------------------

    def _train(self, task: L.LightningModule, folder: str = "checkpoints") -> None:
        last = self.out / folder / "last.ckpt"
        self.history = TrainHistory(self.started)
        callbacks: list[L.Callback] = [self.history, instantiate(self.cfg.objective)]
        if self.schemes.quantizes:
            callbacks += self._quantizing()
        logger = instantiate(self.cfg.logger)
        self.trainer = self._trainer(last.parent, callbacks, logger=logger)
        L.seed_everything(self.cfg.seed, verbose=False)
        self.trainer.fit(task, self.data, ckpt_path=str(last) if last.exists() else None, weights_only=False)
        if not self.schemes.quantizes:
            self.exported_to = self._export_folder()
            assert isinstance(task.model, torch.nn.Module)
            write_float(task.model, self.exported_to, tokenizer=self.tokenizer, dtype=export_dtype(self.cfg))
            return
        if self.export.exported is None:  # resumed after the last step: Lightning had nothing left to run
            for callback in callbacks:
                callback.on_train_end(self.trainer, task)
        assert self.export.exported is not None
        self.exported_to = self.export.exported.directory

    def _quantizing(self) -> list[L.Callback]:
        """The callbacks that quantize, measure and export, in the order in which they must be."""
        quantization = self._quantization()
        self.recovery = Recovery(self._compared(quantization), self.control, self.untrained)
        self.export = Export(self._export_folder(), self.tokenizer, self.cfg.export_dtype, self.cfg.export_bits)
        self.health, oscillation = instantiate(self.cfg.callbacks.health), instantiate(self.cfg.callbacks.oscillation)
        learns = [self._trainable(), instantiate(self.cfg.callbacks.nested)]
        return [quantization, *learns, oscillation, self.health, self.recovery, self.export]

    def _compared(self, quantization: QuantizationAwareTraining) -> dict[str, Calibration]:
        """Post-training quantizations that QAT is compared with."""
        ptq: dict[str, Calibration] = {"ptq": CALIBRATIONS["absmax"], "ptq_mse": CALIBRATIONS["mse"]}
        if quantization.calibration.changes_weights and not self._post_training:
            ptq["calibrated"] = quantization.calibration
        return ptq

    def _calibrate(self, task: L.LightningModule) -> None:
        """Instead of training: quantize the model as it is, measure, export."""
        self.history, callbacks = TrainHistory(self.started), self._quantizing()
        quantization: Any = callbacks[0]
        trainer = self.trainer = self._trainer(
            self.out / "checkpoints", callbacks, logger=instantiate(self.cfg.logger), limit_train_batches=1
        )
        trainer.datamodule = self.data  # type: ignore[attr-defined]
        trainer.precision_plugin.convert_module(task)
        task.to(trainer.strategy.root_device)
        quantization.setup(trainer, task, "validate")
        try:
            self.recovery.on_fit_start(trainer, task)
            quantization.calibrate(trainer, task)
        except KeyboardInterrupt:
            sys.exit(f"stopped; finished blocks are kept. It goes on with:\n  {resume_command(self.out)}")
        set_stage(task, Stage.FROZEN)
        self.recovery.measure_calibrated(trainer, task)
        self.export.on_train_end(trainer, task)
        assert self.export.exported is not None
        self.exported_to = self.export.exported.directory

    def _export_folder(self) -> Path:
        """`export`, or the next free `export-N`: a resumed run keeps what was exported before."""
        folders = [self.out / "export", *(self.out / f"export-{n}" for n in range(2, 100))]
        return next(f for f in folders if not f.exists())

    def _measure_packed(self, task: L.LightningModule) -> None:
        """Losses of the artifacts, run from their integers by the reference."""
        trained = task.model
        for name, artifact in self.export.artifacts.items():
            packed, _ = load_packed(artifact.directory, device=self.trainer.strategy.root_device)
            task.model = packed
            try:
                self.recovery.models[name] = Measure(self.trainer, task, self._quantization())(name, ("test",))
            finally:
                task.model = trained

    # -- report -------------------------------------------------------------------------------------

    def _report(self) -> dict[str, Any]:
        losses, figures, facts = {}, {}, self._facts()
        if self.schemes.quantizes:
            losses = {name: measured["test"] for name, measured in self.recovery.models.items()}
            figures = self.recovery.figures("test", losses.get("qat"))
            facts |= self._artifact_facts()
        summary = build_summary(facts, losses, figures)
        write_summary(summary, self.out / "summary.json")
        read = read_summary(self.out)  # with None for what this run does not have
        write_report(read, self.out / "report.html")
        Console().print(run_table(read))
        log.info("summary  %s\nreport   %s", self.out / "summary.json", self.out / "report.html")
        return summary

    def _facts(self) -> dict[str, Any]:
        choices = HydraConfig.get().runtime.choices
        return {
            "recipe": choices["recipe"] or "none",
            "scheme": self.schemes.name,
            "model": self.cfg.model.name,
            "data": self.data.name,
            "unit": self.data.unit,
            "corpus_digest": self.data.corpus_digest,
            "seed": self.cfg.seed,
            "calibration": self.cfg.calibration.name if self.schemes.quantizes else None,
            "objective": choices["objective"],
            "start": self.cfg.start,
            "steps": self.trainer.global_step,
            "tokens": self.history.seen,
            "export_dir": str(self.exported_to),
            "seconds": round(self.history.seconds, 1),
            "stages": self.stages,
            "versions": versions(),
            "train_history": self.history.rows,
            **experiment(self.cfg, HydraConfig.get().overrides.task),
            **self.searched,
        }

    def _artifact_facts(self) -> dict[str, Any]:
        artifact = self.export.exported
        assert artifact is not None
        return {
            "model_float_bytes": self.float_bytes,
            **artifact.sizes,
            "layers": layer_rows(artifact, self.reached),
            "history": self.recovery.history,
            "health": self.health.rows,
            "control_ptq_calibration": self.control.calibration if self.control else None,
        }
