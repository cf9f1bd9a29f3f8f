"""Runs a comparison: one run after another in this process, each skipped, continued or begun."""

from __future__ import annotations

import gc
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mooring.comparison.memory import MemoryMeter, PeakMemory
from mooring.comparison.picture import draw_comparison
from mooring.comparison.plan import Comparison, Part, Trial
from mooring.comparison.progress import RunOfMany
from mooring.comparison.records import Record, differing_settings, read_records, write_records
from mooring.comparison.table import markdown
from mooring.config.schema import RunConfig
from mooring.errors import RunFolderError
from mooring.report.progress import make_progress
from mooring.report.records import from_json_number, to_json_value, write_text_atomic
from mooring.report.run_folder import RunFolder
from mooring.train.checkpoint import resumable_state
from mooring.train.engine import Engine
from mooring.train.results import RunResult

_MEASURED = "measured.json"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a comparison gave.

    Attributes:
        out: its folder.
        records: of all its finished runs.
        interrupted: the user stopped it; the same call continues it.
    """

    out: Path
    records: Sequence[Record]
    interrupted: bool


def run_comparison(
    comparison: Comparison, *, stop: Callable[[], bool] = lambda: False, draw: bool = True
) -> Outcome:
    """Makes every run that is not finished yet, records it, and draws table and picture from the records.

    A learning rate is chosen on validation data alone: the runs it is chosen among are not tested, and only
    the chosen one of them is tested afterwards.

    Args:
        comparison: what to compare.
        stop: asked before each run; True ends the comparison there, as Ctrl-C does.
        draw: whether ``comparison.png`` is drawn.

    Raises:
        MooringError: settings, data or weights cannot be used, or the folder holds something else.
    """
    comparison.check()
    _check_folder(comparison.out)
    runner = _Runner(comparison, stop)
    interrupted = False
    with runner.display:
        try:
            runner.run()
        except _Interrupted:
            interrupted = True
    records = runner.relevant()
    if any(record["role"] == "result" for record in records):
        write_text_atomic(comparison.out / "table.md", markdown(records))
        if draw:
            draw_comparison(records, comparison.out / "comparison.png")
    return Outcome(comparison.out, records, interrupted)


class _Interrupted(Exception):
    """Ctrl-C was pressed, and the run under way has been saved."""


class _Runner:
    def __init__(self, comparison: Comparison, stop: Callable[[], bool]) -> None:
        self.comparison = comparison
        self.stop = stop
        self.records = read_records(comparison.out)
        first = comparison.trial(comparison.methods[0], comparison.parts[0], None, None)
        self.first_seed = first.seed
        self.display = make_progress(first.config.report.progress)
        self.progress = RunOfMany(self.display, comparison.runs)
        self.tested: dict[str, bool] = {}  # name of each run of this comparison, in order

    def relevant(self) -> list[Record]:
        """Records of this comparison's own runs: an earlier one in the same folder may have had more."""
        own = [(self.records[name], tested) for name, tested in self.tested.items() if name in self.records]
        return [record if tested else {**record, "role": "rate"} for record, tested in own]

    def run(self) -> None:
        comparison = self.comparison
        seeds = range(self.first_seed, self.first_seed + comparison.seeds)
        for part, method in comparison.groups():
            lr, swept = (comparison.lrs[0] if comparison.lrs else None), None
            if comparison.sweeps:
                lr, swept = self._choose(part, method)
            for seed in seeds:
                trial = comparison.trial(method, part, lr, seed)
                if swept is None or seed != self.first_seed:
                    self.progress.announce(str(trial))
                self._make(trial, test=True, sweep=swept)

    def _choose(self, part: Part, method: str) -> tuple[float, dict[str, Any]]:
        """The rate with the best top-1 on validation at the first seed; equals go by loss, then to the smaller."""
        rates = []
        for lr in self.comparison.lrs:
            trial = self.comparison.trial(method, part, lr, self.first_seed)
            self.progress.announce(f"{trial}, to choose the rate")
            val = self._make(trial, test=False, sweep=None)["val"]
            rates.append({"lr": lr, "top1": val["top1"], "nll": val["nll"]})
        best = min(
            rates, key=lambda rate: (-_or_worst(rate["top1"], -1.0), _or_worst(rate["nll"]), rate["lr"])
        )
        self.progress.note(
            f"{method}: learning rate {best['lr']:g}, {100 * best['top1']:.1f} % on validation"
        )
        return best["lr"], {
            "by": f"validation top-1 of seed {self.first_seed}", "rates": rates, "chosen": best["lr"],
        }  # fmt: skip

    def _make(self, trial: Trial, *, test: bool, sweep: dict[str, Any] | None) -> Record:
        self.tested[trial.name] = test
        kept = self.records.get(trial.name)
        if kept is not None:
            _check_same(trial, kept, self.comparison.out)
            if kept["role"] == "result" or not test:
                if kept["role"] == "result" and test and kept["sweep"] != sweep:
                    # chosen among other rates than before: the same run, another reason
                    kept = self._keep({**kept, "sweep": sweep})
                return kept
        if self.stop():
            raise _Interrupted
        result, measured = _train(trial, self.progress, test=test and self.comparison.tests)
        if result.interrupted:
            raise _Interrupted
        record = _record(trial, result, measured, role="result" if test else "rate", sweep=sweep)
        self._check_data(record)
        return self._keep(record)

    def _keep(self, record: Record) -> Record:
        record = to_json_value(record)
        self.records[record["run"]] = record
        write_records(self.comparison.out, self.records.values())
        return record

    def _check_data(self, record: Record) -> None:
        """All methods must have seen the same images."""
        for other in self.relevant():
            same = all(other[key] == record[key] for key in ("seed", "shots", "fraction"))
            if same and other["data"] != record["data"]:
                raise RunFolderError(
                    f"{self.comparison.out}: the data changed between {other['run']} and {record['run']}: "
                    "their results do not compare; take a new --out"
                )


def _train(trial: Trial, progress: RunOfMany, *, test: bool) -> tuple[RunResult, dict[str, Any]]:
    """One run, and what is measured around it; nothing of it stays in memory."""
    out = trial.config.out
    assert out is not None  # every trial has its folder
    if out.is_dir() and resumable_state(trial.config) is None:
        shutil.rmtree(out)  # our own, stopped before there was anything to continue
    engine = Engine.build(trial.config)
    try:
        for note in engine.parts.manifest.notes:
            progress.note_once(f"note: {note}")
        meter = MemoryMeter(engine.backend.device)
        result = engine.fit(test=test, progress=progress)
        measured = {
            "peak_memory": meter.read(),
            "seconds_in_training": engine.clock[1],
            "lr": engine.parts.lr,
            "head_lr": engine.head_lr,
            "counts": engine.parts.manifest.counts,
            "data": engine.parts.manifest.digest,
            "classes": engine.parts.num_classes,
            "device": str(engine.backend.device),
            "precision": engine.parts.precision,
        }
    finally:
        engine.close()
        del engine
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return result, _merged(RunFolder(out), measured)


def _merged(folder: RunFolder, measured: dict[str, Any]) -> dict[str, Any]:
    """With the memory of the earlier parts of an interrupted run; a part that only tests adds nothing."""
    peak: PeakMemory = measured["peak_memory"]
    if (folder.path / _MEASURED).is_file():
        earlier = folder.read_json(_MEASURED)
        trained = measured["seconds_in_training"] > earlier["seconds_in_training"]
        if not trained or earlier["peak_memory"]["bytes"] > peak.bytes:
            measured["peak_memory"] = PeakMemory(**earlier["peak_memory"])
    folder.write_json(_MEASURED, measured)
    return measured


def _record(
    trial: Trial,
    result: RunResult,
    measured: Mapping[str, Any],
    *,
    role: str,
    sweep: dict[str, Any] | None,
) -> dict[str, Any]:
    config = trial.config
    return {
        "what": "comparison",
        "run": trial.name,
        "role": role,
        "method": trial.method,
        "model": config.model.name,
        "shots": trial.part.shots,
        "fraction": trial.part.fraction,
        "seed": trial.seed,
        "epochs": config.train.epochs,
        "sweep": sweep,
        "best_epoch": result.best_epoch,
        "val": result.val.scalars() if result.val else None,
        "test": result.test.scalars() if result.test else None,
        "extra_tests": {name: found.scalars() for name, found in result.extra_tests.items()},
        "distortion": {name: found.scalars() for name, found in result.distortion.items()},
        "images_per_second": result.images_per_second,
        "seconds": result.seconds,
        "seconds_per_epoch": measured["seconds_in_training"] / config.train.epochs,
        **measured,
        "settings": _settings(config),
        "environment": json.loads((result.run / "environment.json").read_text(encoding="utf-8")),
    }


def _check_same(trial: Trial, kept: Record, out: Path) -> None:
    differing = differing_settings(kept["settings"], _settings(trial.config))
    if differing:
        raise RunFolderError(
            f"{out} holds {trial.name} with other settings ({', '.join(differing)}): take another --out"
        )


def _settings(config: RunConfig) -> dict[str, Any]:
    """Every setting that can change a result, without this user's home folder."""
    settings: dict[str, Any] = config.model_dump(mode="json", exclude={"out", "resume", "report"})
    return _homeless(settings)


def _homeless(value: Any) -> Any:
    """Texts that begin with this user's home folder begin with ``~`` instead."""
    if isinstance(value, dict):
        return {key: _homeless(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_homeless(inner) for inner in value]
    home = str(Path.home())
    if isinstance(value, str) and len(home) > 1 and value.startswith(home):
        return "~" + value.removeprefix(home)
    return value


def _check_folder(out: Path) -> None:
    """Refuses a folder that holds something else.

    Raises:
        RunFolderError: it does, or it cannot be made.
    """
    if out.exists() and not out.is_dir():
        raise RunFolderError(f"--out: expected a folder, got the file {out}")
    ours = any((out / name).exists() for name in ("runs", "records.jsonl"))
    if out.is_dir() and any(out.iterdir()) and not ours:
        raise RunFolderError(f"--out: expected a new folder or an earlier comparison, got {out}")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise RunFolderError(f"--out: cannot make {out}: {err.strerror}: choose another folder") from None


def _or_worst(value: Any, worst: float = float("inf")) -> float:
    """A number of a record; NaN, as of a run that diverged, is the worst there is."""
    number = float(from_json_number(value))
    return worst if math.isnan(number) else number
