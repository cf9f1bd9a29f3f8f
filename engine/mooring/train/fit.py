"""A whole run: epochs, validation, the best epoch, one test, the export. Whatever ends it, the folder is valid."""

from __future__ import annotations

import errno
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mooring.config.load import to_toml
from mooring.errors import MooringError, RunFolderError
from mooring.models.encoder import Encoder
from mooring.models.export import export
from mooring.report.environment import write_environment
from mooring.report.metrics_log import MetricsLog
from mooring.report.plots import draw_run
from mooring.report.progress import make_progress
from mooring.report.run_folder import RunFolder, default_run_name, open_run_folder
from mooring.state.tree import load_tree, save_tree
from mooring.train.checkpoint import resumable_state
from mooring.train.evaluate import EvalResult
from mooring.train.results import RunResult
from mooring.train.running_mean import RunningMetrics

if TYPE_CHECKING:
    from mooring.train.engine import Engine


class Fit:
    """The loop around ``engine.step``.

    Args:
        engine: freshly built, or resumed.
        folder: where the run is recorded.
        resumed: the folder holds the first part of this run.
    """

    def __init__(self, engine: Engine, folder: RunFolder, *, resumed: bool) -> None:
        self.engine = engine
        self.folder = folder
        report = engine.config.report
        self.log = MetricsLog(
            folder.path, tensorboard=report.tensorboard, resume_step=engine.global_step if resumed else None
        )
        self.progress = make_progress(report.progress)
        self.seconds_training = 0.0
        self.images = 0
        self.last_val: EvalResult | None = None

    def run(self) -> RunResult:
        engine, started = self.engine, time.perf_counter()
        interrupted = False
        try:
            with self.progress:
                self.progress.start(engine.plan(), engine.config.train.epochs)
                try:
                    self._epochs()
                except KeyboardInterrupt:
                    interrupted = True
                    self._keep_interrupted()
                val, test = self._finish(interrupted)
            result = RunResult(
                run=self.folder.path,
                best_epoch=engine.best.epoch,
                val=val,
                test=test,
                images_per_second=self.images / self.seconds_training if self.seconds_training else 0.0,
                seconds=time.perf_counter() - started,
                interrupted=interrupted,
            )
            self._record(result)
            return result
        finally:
            self.log.close()
            engine.close()

    # ---------------------------------------------------------------- epochs

    def _epochs(self) -> None:
        engine = self.engine
        engine.prepare()
        while engine.global_step < engine.total_steps:
            epoch = engine.global_step // engine.steps_per_epoch
            self._train_epoch(epoch)
            val = engine.evaluate(engine.val_source)
            self._log_eval("val", epoch, val)
            if engine.best.offer(epoch, val):
                self._keep_best(val)
            engine.save(self.folder.path / "state")

    def _train_epoch(self, epoch: int) -> None:
        engine, running, since = self.engine, RunningMetrics(), time.perf_counter()
        rows_since = 0
        for group in engine.epoch_groups():
            result = engine.step(group)
            running.add(result.metrics)
            rows_since += sum(b.labels.shape[0] for b in group)
            last = engine.global_step % engine.steps_per_epoch == 0
            if engine.global_step % engine.config.report.log_every and not last:
                self.progress.advance(engine.global_step, None)
                continue
            means = running.drain()  # waits for the device: the clock below is honest
            now = time.perf_counter()
            self.seconds_training += now - since
            self.images += rows_since
            means |= {"lr": result.lr, "images_per_second": rows_since / (now - since)}
            since, rows_since = now, 0
            self.log.write("train", step=engine.global_step, epoch=epoch, values=means)
            if not means["loss"] < float("inf"):  # also catches NaN
                raise MooringError(
                    f"the training loss became {means['loss']} near step {engine.global_step}: lower optimizer.lr "
                    f"(now {result.lr:.2g}) or set train.clip_grad_norm=1; "
                    f"the best epoch so far is kept in {self.folder.path}"
                )
            self.progress.advance(engine.global_step, means)

    def _log_eval(self, kind: Literal["val", "test"], epoch: int, result: EvalResult) -> None:
        values = result.scalars()
        self.log.write(kind, step=self.engine.global_step, epoch=epoch, values=values)
        self.progress.evaluated(kind, epoch, values)

    # ---------------------------------------------------------------- what is kept

    def _keep_best(self, val: EvalResult) -> None:
        """Weights of the best epoch and their export, each replaced as a whole."""
        engine = self.engine
        averaged = nullcontext() if engine.ema is None else engine.ema.applied_to(engine.method)
        with averaged:
            self._export()
            best = {
                "epoch": engine.best.epoch,
                "method": dict(engine.method.state_dict()),
                "val": {"scalars": val.scalars(), "n": val.n, "confusion": val.confusion},
            }
            save_tree(self.folder.path / "best", best, replace=True)

    def _export(self) -> None:
        encoder, head = self.engine.method.exported()
        assert isinstance(encoder, Encoder)  # the engine builds no other
        size = self.engine.parts.eval_size
        export(
            encoder,
            head,
            self.folder.path / "model",
            self.engine.parts.classes,
            data_config={"input_size": (3, size, size)},
            extra={"method": self.engine.method.name},
        )

    def _keep_interrupted(self) -> None:
        """State at the last finished step; a model even if no epoch was validated yet."""
        engine = self.engine
        self.progress.note("interrupted: keeping what is finished")
        engine.save(self.folder.path / "state")
        if engine.best.epoch is None:
            self._export()

    def _finish(self, interrupted: bool) -> tuple[EvalResult | None, EvalResult | None]:
        """Validation result of the best epoch, and its single test."""
        engine = self.engine
        if engine.best.epoch is None:
            return None, None
        best = load_tree(self.folder.path / "best")
        val = EvalResult(**best["val"]["scalars"], n=best["val"]["n"], confusion=best["val"]["confusion"])
        if interrupted:
            return val, None
        engine.method.load_state_dict(best["method"])
        if engine.test_source is None:
            return val, None
        test = engine.evaluate(engine.test_source, averaged=False)  # the best weights are averaged already
        self._log_eval("test", engine.best.epoch, test)
        return val, test

    def _record(self, result: RunResult) -> None:
        shown = result.test or result.val
        self.folder.write_json(
            "result.json",
            {
                "method": self.engine.method.name,
                "model": self.engine.config.model.name,
                "best_epoch": result.best_epoch,
                "val": result.val.scalars() if result.val else None,
                "test": result.test.scalars() if result.test else None,
                "images_per_second": result.images_per_second,
                "seconds": result.seconds,
                "interrupted": result.interrupted,
                "steps": self.engine.global_step,
                "total_steps": self.engine.total_steps,
            },
        )
        if self.engine.config.report.plots:
            classes = list(self.engine.parts.classes)
            draw_run(self.folder.path, None if shown is None else shown.confusion, classes)


def fit(engine: Engine) -> RunResult:
    """See ``Engine.fit``."""
    config = engine.config
    state = resumable_state(config)
    out = state.parent if state is not None else config.out or Path("runs") / default_run_name(config)
    try:
        folder = open_run_folder(out, resume=state is not None)
        if state is not None:
            engine.resume(state)  # first: a refused resume must leave the folder as it was
        folder.write_text("config.toml", to_toml(config))
        write_environment(folder)
        engine.parts.manifest.save(folder.path / "manifest")
        return Fit(engine, folder, resumed=state is not None).run()
    except OSError as err:
        if err.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RunFolderError(
                f"the disk is full: {out} could not be written ({err.strerror}). Free some space and continue with "
                f"resume={out}; what was finished is kept"
            ) from err
        raise
