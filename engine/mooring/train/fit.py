"""A whole run: epochs, validation, the best epoch, one test, the export. Whatever ends it, the folder is valid."""

from __future__ import annotations

import errno
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from torch import Tensor, nn

from mooring.config.load import as_started, to_toml
from mooring.config.method_settings import method_title
from mooring.data.source import EpochSource
from mooring.distributed import is_lost_rank
from mooring.errors import MooringError, RanksLostError, RunFolderError
from mooring.models.encoder import Encoder
from mooring.report.environment import write_environment
from mooring.report.metrics_log import DISCRIMINATION, MetricsLog, NoLog, cut_log, read_metrics
from mooring.report.plots import draw_run
from mooring.report.progress import Progress, make_progress
from mooring.report.run_folder import LOG_BYTES, RunFolder, default_run_name, open_run_folder
from mooring.state.store import checkpoints_of
from mooring.state.tree import load_tree, save_tree
from mooring.traffic import TRAFFIC
from mooring.train import best_weights
from mooring.train.checkpoint import require_unsaved, run_to_continue
from mooring.train.discrimination import Discrimination
from mooring.train.distortion import Distortion
from mooring.train.evaluate import EvalResult
from mooring.train.exporting import write_model
from mooring.train.health.memory import explain_out_of_memory, is_out_of_memory
from mooring.train.health.watch import RunHealth
from mooring.train.interrupt import Interrupt, Stopped
from mooring.train.results import RunResult
from mooring.train.running_mean import RunningMetrics
from mooring.train.sharded_loading import on_host

if TYPE_CHECKING:
    from mooring.train.engine import Engine


class Fit:
    """The loop around ``engine.step``.

    Args:
        engine: freshly built, or resumed.
        folder: where the run is recorded.
        test: whether the best epoch is tested, on the test split where there is one and on every further set.
        progress: what shows the run; None: as ``report.progress`` says.
    """

    def __init__(
        self,
        engine: Engine,
        folder: RunFolder,
        *,
        test: bool = True,
        progress: Progress | None = None,
    ) -> None:
        self.engine = engine
        self.folder = folder
        self.test = test
        report = engine.config.report
        self.ranks = engine.ranks
        # rank 0 writes and speaks for all
        first = self.ranks.is_first
        self.log = MetricsLog(folder.path, tensorboard=report.tensorboard) if first else NoLog()
        self.progress = progress or make_progress(report.progress if first else "quiet")
        self.interrupt = Interrupt(lambda: self.progress.note("interrupted: finishing this step"), self.ranks)
        self.checkpoints = engine.open_checkpoints(folder.path)
        # steps and validated epochs of the newest checkpoint
        self.saved = (engine.global_step, engine.epochs_validated) if engine.is_resumed else None
        self.health = RunHealth(engine, folder, self._note)
        # over all parts of an interrupted run
        before = engine.loop
        if "spikes" in before:
            self.health.spikes.load_state_dict(before["spikes"])
        self.seconds: float = before.get("seconds", 0.0)
        self.seconds_training: float = before.get("seconds_training", 0.0)
        self.images: int = before.get("images", 0)
        # since the last line of the log
        self.running = RunningMetrics(self.ranks)
        if "running" in before:
            self.running.load_state_dict(before["running"], engine.backend.device)
        self.rows_since: int = before.get("rows_since", 0)
        self.since = time.perf_counter() - before.get("seconds_since", 0.0)
        # of this process: what it sent in its training steps
        self.sent: Counter[str] = Counter()
        self.steps = 0
        # how often each test set was looked at
        self.looks: dict[str, int] = {}

    def run(self) -> RunResult:
        engine = self.engine
        self.started = time.perf_counter()
        stopped: Stopped | None = None
        val: EvalResult | None
        try:
            with self.progress, self.interrupt, self.health.heartbeat:
                self.progress.start(engine.plan(), engine.config.train.epochs)
                if (places := len(set(self.checkpoints.store.keepers))) > 1:
                    self.progress.note(
                        f"the run folder is on {places} file systems: each keeps the state of its own ranks; log, "
                        "results and model are on rank 0's"
                    )
                try:
                    self._epochs_or_kept()
                    val, test = self._finish()
                    extra = self._extra_tests()
                    distortion = self._distortion()
                except Stopped as err:
                    stopped = err
                    val, test, extra, distortion = self._keep_interrupted(), None, {}, {}
            self.engine.loop = self._loop()
            result = RunResult(
                run=self.folder.path,
                best_epoch=engine.best.epoch,
                val=val,
                test=test,
                images_per_second=self.images / self.seconds_training if self.seconds_training else 0.0,
                seconds=self._elapsed(),
                interrupted=stopped is not None,
                preempted=stopped is not None and stopped.preempted,
                extra_tests=extra,
                distortion=distortion,
                discrimination=self.ranks.on_first(self._discrimination),
                test_looks=self.looks,
            )
            self._record(result)
            return result
        except RuntimeError as err:
            if not is_lost_rank(err):
                raise
            phase = engine.health.phase
            raise RanksLostError(
                f"rank {self.ranks.rank} of {self.ranks.world} lost another one in '{phase.name}' of step "
                f"{phase.step} ({str(err).splitlines()[0][:200]}): what ended that one is told where it "
                f"ran; continue with resume={self.folder.path}"
            ) from err
        finally:
            self.log.close()

    def _note(self, text: str, values: dict[str, Any]) -> None:
        """Shows a sentence, and keeps it in the log."""
        engine = self.engine
        epoch = engine.global_step // engine.steps_per_epoch
        self.log.write("note", step=engine.global_step, epoch=epoch, values={"note": text, **values})
        self.progress.note(text)

    def _check(self) -> None:
        """A safe point between batches."""
        self.engine.health.phase.beat()
        self.interrupt.check()

    def _elapsed(self) -> float:
        return self.seconds + time.perf_counter() - self.started

    def _loop(self) -> dict[str, Any]:
        """What this loop keeps beside the engine, and how long the log is."""
        return {
            "seconds": self._elapsed(),
            "seconds_training": self.seconds_training,
            "images": self.images,
            "running": self.running.state_dict(),
            "rows_since": self.rows_since,
            "seconds_since": time.perf_counter() - self.since,
            "spikes": self.health.spikes.state_dict(),
            "log": self.log.lengths(),
        }

    def _save(self, reason: str, val: EvalResult | None = None) -> None:
        """Takes the state; it is on the disk at the next save, or when the run ends."""
        engine = self.engine
        engine.health.phase.enter("checkpoint")
        engine.loop = self._loop()
        score = None if val is None else (val.top1, val.nll)
        # what the checkpoint counts as written must be on the disk before it
        self.checkpoints.save(engine, reason, score=score, before=self.log.sync)
        self.saved = engine.global_step, engine.epochs_validated

    # ---------------------------------------------------------------- epochs

    def _epochs_or_kept(self) -> None:
        """``_epochs``; what goes wrong in them leaves the state from before it, or says what took the memory."""
        try:
            self._epochs()
        except MooringError as err:
            if self.engine.is_ready:
                reason = f"before a {type(err).__name__}"
                self.health.keep(err, lambda: self._save_anew(reason))
            raise
        except (MemoryError, RuntimeError) as err:
            if not is_out_of_memory(err):
                raise
            raise explain_out_of_memory(self.engine, err) from err

    def _save_anew(self, reason: str) -> None:
        """Saves unless this very state is saved already; returns when it is on the disk."""
        if self.saved != (self.engine.global_step, self.engine.epochs_validated):
            self._save(reason)
        self.checkpoints.wait()

    def _epochs(self) -> None:
        engine = self.engine
        engine.health.phase.enter("set-up")
        engine.prepare(check=self._check)
        self.interrupt.check()
        if (
            engine.parts.held_out is not None
            and engine.global_step == 0
            and not self.ranks.on_first(self._measured_before)
        ):
            self._log_discrimination(0, engine.discrimination(check=self._check))
        while True:
            # also true right after a resume, where the first part was stopped during validation
            if engine.global_step == (engine.epochs_validated + 1) * engine.steps_per_epoch:
                self._validate(engine.epochs_validated)
            if engine.global_step >= engine.total_steps:
                return
            self._train_epoch(engine.global_step // engine.steps_per_epoch)

    def _validate(self, epoch: int) -> None:
        engine = self.engine
        engine.health.phase.enter("validation")
        results = engine.validate(check=self._check)
        measured = None
        if engine.parts.held_out is not None:
            measured = engine.discrimination(check=self._check)
        for warning in engine.warnings.collect():
            self.progress.note(warning)
        val = next(iter(results.values()))
        self._log_eval("val", epoch, val)
        if measured is not None:
            self._log_discrimination(epoch, measured)
        if len(results) > 1:
            each = ", ".join(f"{choice} {result.top1:.4f}" for choice, result in results.items())
            self.progress.note(f"top-1 by way to predict, the best is kept: {each}")
        before = engine.best.epoch
        if engine.best.offer(epoch, val):
            self._keep_best(val, before)
        engine.epochs_validated = epoch + 1
        self._save(f"epoch {epoch + 1}", val)

    def _train_epoch(self, epoch: int) -> None:
        engine = self.engine
        if self.rows_since == 0:
            self.since = time.perf_counter()  # validation is not training
        for group in engine.epoch_groups():
            already_sent = TRAFFIC.bytes.copy()
            result = engine.step(group)
            self.sent.update(TRAFFIC.since(already_sent))
            self.steps += 1
            self.running.add(result.metrics)
            self.health.after_step(result)
            self.rows_since += self.ranks.world * sum(b.labels.shape[0] for b in group)
            last = engine.global_step % engine.steps_per_epoch == 0
            means: dict[str, float] | None = None
            if engine.global_step % engine.config.report.log_every == 0 or last:
                means = self._drain(epoch, result.lr)
            self.progress.advance(engine.global_step, means)
            self.checkpoints.check()
            every = engine.config.checkpoint.every
            if (
                every is not None and engine.global_step % every == 0 and not last
            ):  # the last one is validated first
                self._save(f"step {engine.global_step}")
            self.interrupt.check()

    def _drain(self, epoch: int, lr: float) -> dict[str, float]:
        """Reads the metrics since the last line and writes the next one."""
        engine = self.engine
        means = self.running.drain()  # waits for the device: the clock below is honest
        now = time.perf_counter()
        seconds = now - self.since
        self.seconds_training += seconds
        self.images += self.rows_since
        means |= {"lr": lr, "images_per_second": self.rows_since / seconds}
        self.since, self.rows_since = now, 0
        self.log.write("train", step=engine.global_step, epoch=epoch, values=means)
        if "loss" not in means:  # every step since then was left out
            return means
        self.health.logged(means["loss"])
        if not means["loss"] < float("inf"):  # also catches NaN
            raise MooringError(
                f"the training loss became {means['loss']} near step {engine.global_step}: lower optimizer.lr "
                f"(now {lr:.2g}) or set train.clip_grad_norm=1; "
                f"{self._kept()}"
            )
        return means

    def _kept(self) -> str:
        if self.engine.best.epoch is None:
            return "no epoch was finished, so nothing is kept"
        return f"epoch {self.engine.best.epoch + 1}, the best so far, is kept in {self.folder.path}"

    def _log_eval(self, kind: str, epoch: int, result: EvalResult) -> None:
        values = result.scalars()
        self.log.write(kind, step=self.engine.global_step, epoch=epoch, values=values)
        self.progress.evaluated(kind, epoch, values)

    def _log_discrimination(self, epoch: int, measured: Discrimination) -> None:
        values, step = measured.scalars(), self.engine.global_step
        self.log.write(DISCRIMINATION, step=step, epoch=epoch, values=values)
        self.progress.evaluated("beyond its classes" if step else "before training", epoch, values)

    # ---------------------------------------------------------------- what is kept

    def _keep_best(self, val: EvalResult, before: int | None) -> None:
        """Weights of the best epoch and their export, each replaced as a whole; ``before``: the best one until now."""
        engine = self.engine
        engine.health.phase.enter("export")
        with self._averaged():
            best = {"epoch": engine.best.epoch, "method": engine.backend.weights(), "val": _as_tree(val)}
            self.ranks.on_first(partial(best_weights.keep, self.folder.path, best, before))
            self._export()

    def _averaged(self) -> AbstractContextManager[None]:
        """The weights that are evaluated and exported: the average where the run keeps one."""
        engine = self.engine
        return nullcontext() if engine.ema is None else engine.ema.applied_to(engine.method)

    def _export(self) -> None:
        engine = self.engine
        encoder, head = engine.method.exported()
        assert isinstance(encoder, Encoder)  # the engine builds no other
        if engine.parts.in_parts:  # no device has room for all of it
            weights = engine.backend.weights()
            self.ranks.on_first(lambda: self._export_here(*on_host(engine.config, encoder, head, weights)))
            return
        with engine.backend.whole(engine.method):
            self.ranks.on_first(partial(self._export_here, encoder, head))

    def _export_here(self, encoder: Encoder, head: nn.Linear) -> None:
        engine, size = self.engine, self.engine.parts.eval_size
        model = self.folder.path / "model"
        best_weights.forget_model(model)
        write_model(engine.method, encoder, head, engine.config, engine.parts.classes, size, model)
        if engine.best.epoch is not None:
            best_weights.sign_model(model, self._best_identity())

    def _best_identity(self) -> dict[str, Any]:
        assert self.engine.best.epoch is not None
        return best_weights.identity(self.folder.path, self.engine.best.epoch)

    def _export_best(self, weights: Mapping[str, Tensor]) -> None:
        """Puts the best epoch's weights in place, and exports them where ``model/`` is of other ones.

        It is after a process died while it wrote one, or before it had saved the state that goes with it.
        """
        engine = self.engine
        engine.backend.load_weights(weights)
        if engine.ema is not None:
            engine.ema.copy_from(engine.method)  # the best weights are averaged already
        if not self.ranks.on_first(self._is_exported):
            self._export()

    def _is_exported(self) -> bool:
        return best_weights.model_is_of(self.folder.path / "model", self._best_identity())

    def _keep_interrupted(self) -> EvalResult | None:
        """State at the last finished step; a model even if no epoch was validated yet. The best epoch's result."""
        engine = self.engine
        if not engine.is_ready:
            return None  # stopped in the set-up, which starts anew: there is nothing to keep
        self._save_anew("stopped")
        if engine.best.epoch is None:
            with self._averaged():
                self._export()
            return None
        val, weights = self._best_epoch()
        if not self.ranks.on_first(self._is_exported):
            self._export_best(weights)
        return val

    def _best_epoch(self) -> tuple[EvalResult, dict[str, Tensor]]:
        """Validation result and weights of the best epoch."""
        best = self.ranks.on_first(partial(load_tree, self.folder.path / "best"))
        if best["epoch"] != self.engine.best.epoch:
            raise RunFolderError(
                f"{self.folder.path / 'best'} holds epoch {best['epoch'] + 1}, the best one of this run is "
                f"{(self.engine.best.epoch or 0) + 1}: it was changed while the run went on; continue with "
                f"resume={self.folder.path}"
            )
        return _from_tree(best["val"]), best["method"]

    def _finish(self) -> tuple[EvalResult, EvalResult | None]:
        """Validation result of the best epoch, and its single test."""
        engine = self.engine
        engine.health.phase.enter("checkpoint")
        self.checkpoints.wait()  # the weights are about to be exchanged for the best ones
        assert engine.best.epoch is not None  # every finished run has validated
        val, weights = self._best_epoch()
        self._export_best(weights)
        if engine.test_source is None or not self.test:
            return val, None
        engine.health.phase.enter("test")
        return val, self._tested("test", engine.test_source, self.folder.path / "test")

    def _tested(self, name: str, source: EpochSource, folder: Path, **facts: Any) -> EvalResult:
        """Result of the selected weights, which are in place, on a test set: looked at once, and kept.

        A finished run that is resumed has it. One that was extended may have selected another epoch: then the set is
        looked at again, and log and result say so.
        """
        engine = self.engine
        assert engine.best.epoch is not None
        of = self.ranks.on_first(self._best_identity)
        before = self.ranks.on_first(partial(_load_if_there, folder))
        if before is not None and any(before.get(key) != value for key, value in facts.items()):
            before = None  # it is of another set
        looks = 0 if before is None else int(before.get("looks", 1))
        if before is not None and before.get("of") == of:
            result = _from_tree(before)
        else:
            looks += 1
            result = engine.evaluate(source, check=self._check)
            tree = _as_tree(result) | facts | {"of": of, "looks": looks}
            self.ranks.on_first(partial(save_tree, folder, tree, replace=True))
        self.looks[name] = looks
        if looks > 1:
            self._note(f"{name} was looked at {looks} times: other weights were selected after the first", {})
        self._log_eval(name, engine.best.epoch, result)  # the log of a resumed run was cut before this line
        return result

    def _extra_tests(self) -> dict[str, EvalResult]:
        """Each further test set once, with the selected weights in place; none in a run that is not to be tested."""
        engine = self.engine
        found: dict[str, EvalResult] = {}
        if not self.test:
            return found
        for name, source in engine.extra_test_sources.items():
            folder = self.folder.path / "extra_test" / name
            path = str(engine.config.data.extra_test[name])
            found[name] = self._tested(f"test/{name}", source, folder, path=path)
        return found

    def _distortion(self) -> dict[str, Distortion]:
        """How far the selected encoder's features are from the pretrained ones, on every set that is reported."""
        engine = self.engine
        if not engine.config.report.distortion:
            return {}
        sources: dict[str, EpochSource | None] = {"val": engine.val_source}
        if self.test:
            sources["test"] = engine.test_source
            sources |= {f"test/{name}": source for name, source in engine.extra_test_sources.items()}
        return {
            name: engine.distortion(source, check=self._check)
            for name, source in sources.items()
            if source is not None
        }

    def _measured_before(self) -> bool:
        """Whether the log has the pretrained encoder already: the run was stopped before its first step."""
        return any(record.kind == DISCRIMINATION for record in read_metrics(self.folder.path))

    def _discrimination(self) -> dict[str, Mapping[str, float]]:
        """Of the encoder as it began and as it was selected, from the log: also where the run was continued."""
        if self.engine.parts.held_out is None:
            return {}
        found: dict[str, Mapping[str, float]] = {}
        for record in read_metrics(self.folder.path):
            if record.kind == DISCRIMINATION and record.step == 0:
                found["pretrained"] = record.values
            elif record.kind == DISCRIMINATION and record.epoch == self.engine.best.epoch:
                found["selected"] = record.values
        return found

    def _record(self, result: RunResult) -> None:
        self.ranks.on_first(lambda: self._record_here(result))

    def _record_here(self, result: RunResult) -> None:
        shown = result.test or result.val
        self.folder.write_json(
            "result.json",
            {
                "method": method_title(self.engine.config.method),
                "model": self.engine.config.model.name,
                "best_epoch": result.best_epoch,
                "val": result.val.scalars() if result.val else None,
                "test": result.test.scalars() if result.test else None,
                "extra_tests": {name: found.scalars() for name, found in result.extra_tests.items()},
                "distortion": {name: found.scalars() for name, found in result.distortion.items()},
                "discrimination": result.discrimination,
                "test_looks": result.test_looks,
                "head_lr": self.engine.head_lr,
                "images_per_second": result.images_per_second,
                "seconds": result.seconds,
                "interrupted": result.interrupted,
                "inexact": self.engine.inexact,
                "processes": self.ranks.world,
                "bytes_sent_per_step": {name: total // self.steps for name, total in self.sent.items()},
                "steps": self.engine.global_step,
                "total_steps": self.engine.total_steps,
            },
        )
        if self.engine.config.report.plots:
            classes = list(self.engine.parts.classes)
            draw_run(
                self.folder.path,
                None if shown is None else shown.confusion,
                classes,
                split="test" if result.test else "val",
            )


def _load_if_there(folder: Path) -> dict[str, Any] | None:
    return load_tree(folder) if folder.is_dir() else None


def _as_tree(result: EvalResult) -> dict[str, Any]:
    return {"scalars": result.scalars(), "n": result.n, "confusion": result.confusion}


def _from_tree(tree: dict[str, Any]) -> EvalResult:
    return EvalResult(**tree["scalars"], n=tree["n"], confusion=tree["confusion"])


def _checkpoint_bytes(engine: Engine, *, begun: bool) -> int:
    """Room for what a run has yet to write beside its logs, while old and new stand side by side for a moment."""
    weights = _tensor_bytes(dict(engine.method.state_dict()))
    state = (4 if engine.ema is not None else 3) * weights + _tensor_bytes(engine.method.extra_state())
    kept = engine.config.checkpoint
    # the best epoch and the export, each twice; the states that are kept, and the one being written; the weights
    # that those call the best
    states = 1 if begun else kept.keep_last + kept.keep_best + 1
    return (4 + states - 1) * weights + states * state


def _tensor_bytes(tree: Any) -> int:
    if isinstance(tree, dict):
        return sum(_tensor_bytes(branch) for branch in tree.values())
    return tree.numel() * tree.element_size() if isinstance(tree, Tensor) else 0


def fit(engine: Engine, *, test: bool = True, progress: Progress | None = None) -> RunResult:
    """See ``Engine.fit``."""
    with engine:
        return _fit(engine, test, progress)


def _fit(engine: Engine, test: bool, progress: Progress | None) -> RunResult:
    config = engine.config
    ranks = engine.ranks
    begun = ranks.on_first(partial(run_to_continue, config))
    out = ranks.broadcast(
        begun or config.out or Path("runs") / default_run_name(config)
    )  # its name holds the time
    try:
        need = LOG_BYTES + _checkpoint_bytes(engine, begun=begun is not None)
        folder = ranks.on_first(partial(open_run_folder, out, resume=begun is not None, need_bytes=need))
        unlocked = ranks.on_first(partial(engine.lock, out))
        # first: a refused resume must leave the folder as it was
        notes, inexact = ([], []) if begun is None else _continue(engine, begun)
        notes += [unlocked] if unlocked is not None else []
        ranks.on_first(partial(_describe, engine, folder))
        run = Fit(engine, folder, test=test, progress=progress)
        for note in notes:
            run.progress.note(note)
        if inexact:
            run.log.write("note", step=engine.global_step, epoch=engine.epoch, values={"inexact": inexact})
        return run.run()
    except (OSError, SafetensorError, RunFolderError) as err:
        if _disk_is_full(err) or (err.__cause__ is not None and _disk_is_full(err.__cause__)):
            raise RunFolderError(
                f"the disk is full: {out} could not be written ({err}). Free some space and continue with "
                f"resume={out}; what was finished is kept"
            ) from err
        if isinstance(err, OSError) and Path(str(err.filename)).is_relative_to(out):
            raise RunFolderError(
                f"{err.filename}: expected a file that can be read and written, got {err.strerror}: put it right and "
                f"continue with resume={out}; what was finished is kept"
            ) from err
        raise


def _describe(engine: Engine, folder: RunFolder) -> None:
    folder.remove_unfinished()
    folder.write_text("config.toml", to_toml(as_started(engine.config)))
    write_environment(folder)
    engine.parts.manifest.save(folder.path / "manifest")


def _continue(engine: Engine, run: Path) -> tuple[list[str], list[str]]:
    """Puts the run where its newest whole checkpoint left it, or at its beginning.

    Returns:
        what people should know, and why the run is not bit for bit the one that was started.
    """
    ranks = engine.ranks
    store = checkpoints_of(run, ranks)
    found = store.newest()  # reads every byte
    found.require_whole()
    notes = list(found.notes)
    inexact: list[str] = []
    if found.ref is None:
        ranks.on_first(partial(require_unsaved, run))
        notes.append("nothing was saved yet: the run starts from its beginning")
    else:
        inexact = [str(difference) for difference in engine.resume(found.ref) if difference.breaks]
        ranks.on_first(partial(best_weights.require, run, engine.best.epoch, store, found.ref))
        notes += [f"not bit for bit the run that was started: {difference}" for difference in inexact]
    store.tidy(found.damaged)
    ranks.on_first(lambda: best_weights.settle(run, engine.best.epoch, best_weights.best_epochs(store)))
    notes += ranks.on_first(lambda: cut_log(run, engine.loop.get("log", {})))
    return notes, inexact


def _disk_is_full(err: BaseException) -> bool:
    if isinstance(err, OSError):
        return err.errno in (errno.ENOSPC, errno.EDQUOT)
    # safetensors gives the system's error as text only
    return any(f"os error {code}" in str(err) for code in (errno.ENOSPC, errno.EDQUOT))
