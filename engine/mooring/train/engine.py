"""The engine: one object that builds a run from its configuration, steps it and fits it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from datetime import timedelta
from math import inf
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from mooring.collectives import all_reduce_
from mooring.config.load import absolute_paths, as_started, to_toml
from mooring.config.schema import RunConfig
from mooring.data.batch import Batch
from mooring.data.source import EpochSource
from mooring.distributed import Ranks, init_from_environment
from mooring.errors import ConfigError, DataError, RunFolderError
from mooring.methods.base import At, SetupContext, StepOutput
from mooring.models.batchnorm_sync import average_statistics_
from mooring.report.progress import Progress
from mooring.report.run_folder import check_run_folder, open_run_folder
from mooring.report.run_lock import RunLock
from mooring.state.store import CheckpointRef
from mooring.train import checkpoint
from mooring.train.agreed import agreed
from mooring.train.assembly import Parts, assemble
from mooring.train.checkpoint import Checkpoints, run_to_continue
from mooring.train.discrimination import Discrimination, measure_discrimination
from mooring.train.distortion import Distortion, feature_distortion
from mooring.train.evaluate import EvalResult, evaluate
from mooring.train.exactness import Difference, source_digest
from mooring.train.health.step import StepHealth
from mooring.train.mixer import Mixer
from mooring.train.rank_warnings import RankWarnings
from mooring.train.results import RunPlan, RunResult, StepResult
from mooring.train.seeding import seed_everything
from mooring.train.selection import BestEpoch


class Engine:
    """Trains one method on one data set.

    Use ``Engine.build(config).fit()`` for a whole run, or ``engine.step(batch)`` in a loop of your own::

        with Engine.build(RunConfig.model_validate({"data": "photos"})) as engine:
            for group in engine.epoch_groups():
                result = engine.step(group)

    Attributes:
        method: the trained module (encoder, head, auxiliary parts).
        train_source, val_source, test_source: batches; ``test_source`` is None without a test split.
        extra_test_sources: batches of each ``data.extra_test``, by name.
        global_step: optimizer steps done.
        epochs_validated: epochs that ``fit`` has validated.
        is_resumed: the state came from a checkpoint.
    """

    def __init__(self, parts: Parts) -> None:
        self.config = parts.config  # with what the data decided
        self.parts = parts
        self.method = parts.method
        self.backend = parts.backend
        self.ranks = parts.backend.ranks
        self.warnings = RankWarnings(self.ranks)
        self.optimizer = parts.optimizer
        self.schedule = parts.schedule
        self.ema = parts.ema
        self.train_source = parts.train_source
        self.val_source = parts.val_source
        self.test_source = parts.test_source
        self.extra_test_sources = parts.extra_test_sources
        self.source_stream = parts.source_stream
        self.global_step = 0
        self.epochs_validated = 0
        # of `fit`: its clocks and means, and how long the log is; saved and put back with the rest
        self.loop: dict[str, Any] = {}
        self.inexact: list[dict[str, Any]] = []  # where the run was continued though not bit for bit
        self.is_resumed = False
        self._checkpoints: Checkpoints | None = None
        self._lock: RunLock | None = None
        self._resumed_from: CheckpointRef | None = None
        self.best = BestEpoch()
        source_digest()  # of the code that runs, not of what an update puts in its place meanwhile
        train = self.config.train
        # each rank mixes its own rows
        seed = self.config.seed + self.ranks.rank
        self.mixer = Mixer(train.mixup, train.cutmix, parts.num_classes, seed)
        self.health = StepHealth(self)
        self._ready = False
        self._handed_over = False

    @classmethod
    def build(cls, config: RunConfig, *, scan_progress: Callable[[int, int], None] | None = None) -> Engine:
        """Builds everything a run needs; nothing is written to the run folder yet.

        Where a launcher started several processes (torchrun, deepspeed), each calls this, and they join here.

        Args:
            config: checked settings.
            scan_progress: called with (done, total) files where the data has to be scanned first.

        Raises:
            MooringError: settings, data, weights or output folder cannot be used; says what to do.
        """
        ranks = init_from_environment(timeout=timedelta(minutes=config.backend.timeout_minutes))
        config = ranks.broadcast(config)
        if config.out is not None:
            out = config.out
            ranks.on_first(lambda: check_run_folder(out, resume=run_to_continue(config) is not None))
        seed_everything(config.seed)
        if config.train.threads is not None:
            torch.set_num_threads(config.train.threads)
        try:
            engine = cls(assemble(absolute_paths(config), scan_progress=scan_progress, ranks=ranks))
        except Exception as err:
            ranks.agree(err)
            raise
        ranks.agree(None)
        if ranks.world > 1:  # equal until here, so that all ranks draw the same weights
            seed_everything(config.seed + ranks.rank)
        return engine

    @property
    def steps_per_epoch(self) -> int:
        return self.parts.steps_per_epoch

    @property
    def total_steps(self) -> int:
        return self.parts.total_steps

    @property
    def epoch(self) -> int:
        """Index of the epoch that the next step belongs to."""
        return self.global_step // self.steps_per_epoch

    @property
    def head_lr(self) -> float:
        """Peak learning rate of the head; a method may have settled it in its set-up."""
        return self.parts.head_lr * self.method.lr_factors(self._at()).get("head", 1.0)

    def plan(self) -> RunPlan:
        """What ``fit`` would do."""
        return self.parts.plan()

    # ---------------------------------------------------------------- one step

    def prepare(self, *, check: Callable[[], None] | None = None) -> None:
        """Runs the method's set-up once (bank warm-up, feature statistics); ``step`` and ``fit`` call it.

        Args:
            check: called before each batch that the set-up reads; may raise to stop it.
        """
        if self._ready:
            return
        self.method.train()
        self.method.setup(
            SetupContext(
                device=self.backend.device,
                warm_up=lambda: self._set_up_batches(self.parts.warm_up_source(), check),
                clean=lambda: self._set_up_batches(self.parts.clean_source(), check),
                train_size=self.parts.train_images,
                batch_size=self.config.train.batch_size * self.config.train.accumulate,
                total_steps=self.total_steps,
                steps_per_epoch=self.steps_per_epoch,
                autocast=self.backend.autocast,
                seed=self.config.seed,
                head_lr=self.parts.head_lr,
                optimizer=self.config.optimizer.name,
            )
        )
        if self.ema is not None:
            self.ema.copy_from(self.method)  # the set-up may have changed weights
        self.hand_over()
        self._ready = True  # only now: a set-up that was broken off has to be done again

    @property
    def is_ready(self) -> bool:
        """Whether the method is set up: before that there is no state to save."""
        return self._ready

    def hand_over(self) -> None:
        """Gives method and optimizer to the backend, once, when the method has the weights that it starts with."""
        if not self._handed_over:
            self.backend.prepare(self.method, self.optimizer)
            self._handed_over = True

    def _set_up_batches(self, source: EpochSource, check: Callable[[], None] | None) -> Iterator[Batch]:
        try:
            for batch in source if check is None else _checked(source, check, self.ranks):
                yield batch.to(self.backend.device)
        finally:
            source.close()

    def _at(self, micro: int = 0, micros: int = 1) -> At:
        return At(
            step=self.global_step,
            epoch=self.epoch,
            steps_per_epoch=self.steps_per_epoch,
            total_steps=self.total_steps,
            micro=micro,
            micros=micros,
        )

    def step(self, batch: Batch | Sequence[Batch]) -> StepResult:
        """One optimizer step on one batch, or on several micro-batches whose gradients are averaged.

        Args:
            batch: a batch, or the micro-batches of one accumulation group.

        Raises:
            NonFiniteError: the loss or a gradient is not finite, and ``health`` says to stop. The engine is where it
                was before the step.
            DataError: an image of the source task cannot be read, here or on another rank; the same holds.
        """
        self.prepare()
        if not self.method.training:
            self.method.train()
        group = [batch] if isinstance(batch, Batch) else list(batch)
        if not group:
            raise ValueError("step needs at least one batch, got an empty sequence")
        micros = len(group)
        lr = self._set_learning_rates()
        self.health.before_step()
        sources = self._source_batches(micros)
        self.method.before_step(self._at(0, micros))
        outputs: list[StepOutput] = []
        placed: list[Batch] = []
        for micro, (item, source) in enumerate(zip(group, sources, strict=True)):
            moved = self.mixer(item.to(self.backend.device))
            if source is not None:
                moved = replace(moved, source=source.to(self.backend.device))
            moved = self._counted(moved)
            output = self.backend.forward(moved, self._at(micro, micros))
            self.health.phase.enter("backward")
            self.backend.backward(output.loss / micros, last=micro == micros - 1)
            self.health.phase.enter("forward")
            outputs.append(output)
            placed.append(moved)
        metrics = _sum_metrics(outputs)
        verdict = self.health.judge(metrics["loss"])
        if self.config.train.clip_grad_norm is not None:
            metrics["grad_norm"] = self.backend.clip(self.config.train.clip_grad_norm)
        skipped: dict[str, Any] | None = None
        if self.health.take(verdict):
            self.method.after_step(outputs, placed, self._at(0, micros))
            if self.ema is not None:
                self.ema.update(self.method)
        else:
            assert verdict is not None  # without one, every step is taken
            skipped = self.health.not_taken(verdict, outputs, placed)
        loss, logits = metrics["loss"], outputs[-1].logits.detach()
        result = StepResult(self.global_step, loss, {} if skipped else metrics, logits, lr, skipped)
        self.global_step += 1
        return result

    def _counted(self, batch: Batch) -> Batch:
        """The batch with the number of rows that it is a part of."""
        if self.ranks.world == 1:
            return batch
        total = all_reduce_((batch.labels >= 0).sum().float(), self.ranks, "rows")
        return replace(batch, mean_rows=total / self.ranks.world)

    def _source_batches(self, micros: int) -> list[Batch | None]:
        """For each micro-batch as many rows of the source stream as this step reads.

        All are read before anything is computed, so that where one cannot be, the state is that from before the step.
        """
        stream = self.source_stream
        if stream is None:
            return [None] * micros
        rows = self.method.source_rows(self._at())
        if rows == 0:
            stream.close()  # what reads ahead would read for nothing
            return [None] * micros
        rows = -(-rows // self.ranks.world)
        before = stream.state_dict()
        try:
            return list(agreed((stream.take(rows) for _ in range(micros)), self.ranks))
        except DataError:
            stream.load_state_dict(before)
            raise

    def _set_learning_rates(self) -> float:
        """Sets every group's rate for this step; returns the first one's: the backbone's, or the head's in a probe."""
        self.schedule.set(self.global_step)
        factors = self.method.lr_factors(self._at())
        for group in self.optimizer.param_groups:
            group["lr"] *= factors.get(group["role"], 1.0)
        return float(self.optimizer.param_groups[0]["lr"])

    # ---------------------------------------------------------------- evaluation

    def evaluate(self, source: EpochSource, *, check: Callable[[], None] | None = None) -> EvalResult:
        """Top-1, top-5, mean per class, calibration error and loss on ``source``, with the weight EMA where kept.

        Args:
            source: one whole pass of it is evaluated, from its first batch.
            check: called before each batch; may raise to stop the evaluation.
        """
        with self._evaluated_weights():
            return self._evaluate(source, check)

    def validate(self, *, check: Callable[[], None] | None = None) -> dict[str, EvalResult]:
        """``evaluate`` on the validation split, the best first, for each way in which the method can predict.

        The method then predicts in the best way: by top-1, then by loss. Most methods have one, named ``""``.

        Args:
            check: as for ``evaluate``.
        """
        choices = self.method.prediction_choices()
        if not choices:
            return {"": self.evaluate(self.val_source, check=check)}
        results: dict[str, EvalResult] = {}
        with self._evaluated_weights():
            for choice in choices:
                self.method.choose_prediction(choice)
                results[choice] = self._evaluate(self.val_source, check)
        ranked = sorted(  # a loss that is no number is the worst
            results.items(), key=lambda item: (-item[1].top1, item[1].nll if item[1].nll < inf else inf)
        )
        self._choose_prediction(ranked[0][0])
        return dict(ranked)

    def _choose_prediction(self, choice: str) -> None:
        self.method.choose_prediction(choice)
        if self.ema is not None:
            with self.ema.applied_to(self.method):  # its copy of the choice, too
                self.method.choose_prediction(choice)

    @contextmanager
    def _evaluated_weights(self) -> Iterator[None]:
        """Eval mode and, where kept, the weight EMA."""
        was_training = self.method.training
        self.method.eval()
        try:
            with nullcontext() if self.ema is None else self.ema.applied_to(self.method):
                if not self.config.train.sync_batchnorm:
                    average_statistics_(self.method, self.ranks)  # those that go with the weights in place
                yield
        finally:
            self.method.train(was_training)

    def distortion(self, source: EpochSource, *, check: Callable[[], None] | None = None) -> Distortion:
        """How far the encoder's features on ``source`` are from the pretrained ones; needs ``report.distortion``.

        Args:
            source, check: as for ``evaluate``.
        """
        before = self.parts.pretrained
        if before is None:
            raise ConfigError("the distortion of features needs report.distortion=true when the run is built")
        source.rewind()
        batches = source if check is None else _checked(source, check, self.ranks)
        with self._evaluated_weights():
            return feature_distortion(before, self.method.encoder, batches, self.backend.device, self.ranks)

    def discrimination(self, *, check: Callable[[], None] | None = None) -> Discrimination:
        """What the encoder tells apart of classes that the run is not about, and of the source task.

        Needs ``report.discrimination``; with the weight EMA where kept.

        Args:
            check: as for ``evaluate``.
        """
        held_out = self.parts.held_out
        if held_out is None:
            raise ConfigError("this needs report.discrimination=true when the run is built")

        def batches(source: EpochSource | None) -> Iterable[Batch] | None:
            if source is None:
                return None
            source.rewind()
            return source if check is None else _checked(source, check, self.ranks)

        with self._evaluated_weights():
            return measure_discrimination(
                self.method.encoder,
                batches(held_out.unseen),
                source=batches(held_out.source),
                source_head=held_out.source_head,
                seed=self.config.seed,
                device=self.backend.device,
                autocast=self.backend.autocast,
            )

    def _evaluate(self, source: EpochSource, check: Callable[[], None] | None) -> EvalResult:
        source.rewind()
        return evaluate(
            self.backend.predict if self._handed_over else self.method.predict,
            source if check is None else _checked(source, check, self.ranks),
            self.parts.num_classes,
            device=self.backend.device,
            autocast=self.backend.autocast,
            ranks=self.ranks,
        )

    # ---------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Everything the rest of the run depends on, valid between any two steps; the tensors are the engine's own."""
        return checkpoint.engine_state(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Puts back what ``state_dict`` of an engine with the same settings and data returned.

        Raises:
            ValueError: the state does not fit.
        """
        checkpoint.restore_engine(self, state)
        self._begin_continued()

    def open_checkpoints(self, run: Path) -> Checkpoints:
        """The checkpoints that this engine writes, in the run folder; the same ones at every call."""
        if self._checkpoints is None:
            self._checkpoints = checkpoint.open_checkpoints(run, self.config.checkpoint, self.ranks)
        return self._checkpoints

    def save(self, reason: str) -> CheckpointRef:
        """Writes the state as it is now; returns when it is on the disk.

        Args:
            reason: for people: why the state was saved.

        Raises:
            ConfigError: there is no ``out``.
            RunFolderError: it cannot be written; the checkpoints before it are unchanged.
        """
        if self._checkpoints is None:
            if self.config.out is None:
                raise ConfigError("save needs a run folder: set out=FOLDER")
            out = self.config.out

            def opened() -> None:
                run = open_run_folder(out, resume=run_to_continue(self.config) is not None)
                self.lock(out)
                run.write_text("config.toml", to_toml(as_started(self.config)))

            self.ranks.on_first(opened)
            self.open_checkpoints(out)
            assert self._checkpoints is not None
            if self._resumed_from is not None:
                self._checkpoints.go_on_from(self, self._resumed_from)
        assert self._checkpoints is not None
        self._checkpoints.save(self, reason)
        ref = self._checkpoints.wait()
        assert ref is not None
        return ref

    def lock(self, run: Path) -> str | None:
        """Keeps other processes from training in a run folder until ``close``; for rank 0, before it writes there.

        Returns:
            why that cannot be, where the file system has no locks.

        Raises:
            RunFolderError: another process does.
        """
        if self._lock is None:
            self._lock = RunLock(run)
        return self._lock.problem

    def resume(self, ref: CheckpointRef, *, allow_inexact: bool | None = None) -> list[Difference]:
        """Continues from a checkpoint; call it right after ``build``.

        Of a run that goes on from one of its older checkpoints, the first ``save`` sets the newer ones aside, as
        ``step-N.later``.

        Args:
            ref: as ``save`` returned it, or from ``mooring.state.store.checkpoints_of(run).newest()``.
            allow_inexact: go on where the run would not continue bit for bit; None: as the settings say.

        Returns:
            what is not as it was when the state was saved.

        Raises:
            RunFolderError: the checkpoint is damaged or of another run, or the rest would not be exact; the message
                lists what differs.
        """
        if allow_inexact is None:
            allow_inexact = self.config.allow_inexact
        try:
            found = checkpoint.resume(self, ref, allow_inexact=allow_inexact)
        except Exception as err:
            self.ranks.agree(err)
            raise
        self.ranks.agree(None)
        self._begin_continued()
        self.is_resumed = True
        self._resumed_from = ref
        return found

    def _begin_continued(self) -> None:
        """What the set-up ends with, which a continued run does not do again."""
        self.method.train()  # a method decides itself what of it trains: a new module does not know that yet
        self._ready = True

    # ---------------------------------------------------------------- the whole run

    def epoch_groups(self) -> Iterator[list[Batch]]:
        """The rest of the current epoch in accumulation groups; the last group may be smaller.

        Raises:
            DataError: a batch cannot be read, on this rank or on another one.
        """
        group: list[Batch] = []
        self.health.before_group()
        for batch in agreed(self.train_source, self.ranks):
            group.append(batch)
            if len(group) == self.config.train.accumulate:
                yield group
                group = []
                self.health.before_group()
        if group:
            yield group

    def fit(self, *, test: bool = True, progress: Progress | None = None) -> RunResult:
        """Trains, validates every epoch, keeps the best epoch, tests it once, exports it.

        Ctrl-C ends the run early and leaves a valid run folder.

        Args:
            test: False leaves the test split alone, for runs that a choice is made among; a finished run
                that is continued with ``test=True`` makes up for it.
            progress: what shows the run, where several runs share one display; None: as
                ``report.progress`` says.

        Raises:
            MooringError: the run cannot go on; what was finished is kept.
        """
        from mooring.train.fit import fit

        return fit(self, test=test, progress=progress)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except RunFolderError as unsaved:
            if error is None:
                raise
            error.add_note(str(unsaved))  # the first error is the one to report

    def close(self) -> None:
        """Finishes a checkpoint that is being written and stops the data sources' background work.

        ``fit`` does it by itself, as does a ``with`` block.

        Raises:
            RunFolderError: the checkpoint could not be written.
        """
        own = (self.train_source, self.val_source, self.test_source, self.source_stream)
        for source in (*own, *self.extra_test_sources.values()):
            if source is not None:
                source.close()
        if self.parts.held_out is not None:
            self.parts.held_out.close()
        self.warnings.close()
        try:
            if self._checkpoints is not None:
                self._checkpoints.wait()
        finally:
            if self._lock is not None:
                self._lock.release()
                self._lock = None


def _checked(batches: Iterable[Batch], check: Callable[[], None], ranks: Ranks) -> Iterator[Batch]:
    for batch in agreed(batches, ranks):
        check()
        yield batch


def _sum_metrics(outputs: Iterable[StepOutput]) -> dict[str, Tensor]:
    """One step's metrics from its micro-batches: counts are summed, losses averaged as their gradients are."""
    outputs = list(outputs)
    total = {name: torch.stack([o.metrics[name] for o in outputs]).sum(0) for name in outputs[0].metrics}
    return {name: value / len(outputs) if name.startswith("loss") else value for name, value in total.items()}
