"""Records: strict JSON, whole files, a log that survives crashes and continued runs."""

from __future__ import annotations

import json
import math
import os
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mooring.errors import RunFolderError
from mooring.report.metrics_log import FILE_NAME, MetricsLog, Record, cut_log, read_metrics
from mooring.report.records import json_line, to_json_value, write_json_atomic, write_text_atomic


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ({"a": math.nan, "b": [math.inf, -math.inf]}, '{"a": "nan", "b": ["inf", "-inf"]}'),
        (torch.tensor([[1, 2], [3, 4]]), "[[1, 2], [3, 4]]"),
        (torch.tensor(0.5), "0.5"),
        (np.float64(0.25), "0.25"),
        (np.int64(3), "3"),
        (Path("a") / "b", '"a/b"'),
        ((1, True, None, "ü"), '[1, true, null, "ü"]'),
    ],
)
def test_values_become_strict_json(value: Any, line: str) -> None:
    assert json_line(value) == line
    json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))


def test_what_has_no_json_form_is_refused() -> None:
    with pytest.raises(TypeError, match="got object"):
        to_json_value({"a": object()})


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    write_json_atomic(file, {"a": 1})
    with pytest.raises(TypeError):
        write_json_atomic(file, {"a": object()})
    with pytest.raises(UnicodeEncodeError):
        write_text_atomic(file, "\udcff")  # fails after the temporary file was opened
    assert json.loads(file.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [file], "no temporary file stays"


def test_written_files_follow_the_umask(tmp_path: Path) -> None:
    write_text_atomic(tmp_path / "a", "x")
    (tmp_path / "b").write_text("x")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_no_other_thread_gets_another_umask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.umask", lambda mask: pytest.fail("the umask is the whole process's"))
    write_text_atomic(tmp_path / "a", "x")


def test_log_reads_back_what_was_written(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        log.write("train", step=5, epoch=0, values={"loss": math.inf, "lr": 1e-4})
        log.write("val", step=5, epoch=0, values={"top1": 0.5})
        log.write("note", step=5, epoch=0, values={"text": "hello"})
        # flushed line by line: readable while the run goes on
        assert len(read_metrics(tmp_path)) == 3
    assert read_metrics(tmp_path) == [
        Record("train", 5, 0, {"loss": math.inf, "lr": 1e-4}),
        Record("val", 5, 0, {"top1": 0.5}),
        Record("note", 5, 0, {"text": "hello"}),
    ]


def test_nan_reads_back_as_nan(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        log.write("train", step=1, epoch=0, values={"loss": torch.tensor(math.nan)})
    assert math.isnan(read_metrics(tmp_path)[0].values["loss"])


def test_every_cut_of_the_last_line_is_tolerated(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        for step in (1, 2):
            log.write("train", step=step, epoch=0, values={"loss": 0.5, "name": "bücher"})
    whole = (tmp_path / FILE_NAME).read_bytes()
    first = whole.index(b"\n") + 1
    for end in range(first, len(whole)):
        (tmp_path / FILE_NAME).write_bytes(whole[:end])
        steps = [record.step for record in read_metrics(tmp_path)]
        assert steps == ([1, 2] if end == len(whole) - 1 else [1])
        MetricsLog(tmp_path).close()
        assert (tmp_path / FILE_NAME).read_bytes() == whole[:first], "a continued log starts on its own line"


def test_damage_before_the_end_is_not_hidden(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text(
        '{"kind": "train"}\n{"kind": "val", "step": 1, "epoch": 0, "values": {}}\n'
    )
    with pytest.raises(ValueError, match=r"line 1: expected one metrics record"):
        read_metrics(tmp_path)


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_a_log_that_is_cut_and_continued_reads_as_one(tmp_path: Path) -> None:
    for attempt in range(3):  # the second and the third write into files of their own
        with MetricsLog(tmp_path, tensorboard=True) as log:
            lengths: dict[str, int] = {}
            for step in (10, 20, 30):
                log.write("train", step=10 * attempt + step, epoch=0, values={"loss": float(attempt)})
                if step == 10:
                    lengths = log.lengths()
            log.sync()
        assert cut_log(tmp_path, lengths) == []
    wanted = [(10, 0.0), (20, 1.0), (30, 2.0)]
    assert [(record.step, record.values["loss"]) for record in read_metrics(tmp_path)] == wanted
    assert scalars(tmp_path, "train/loss") == wanted
    assert cut_log(tmp_path, {}) == []
    assert not (tmp_path / FILE_NAME).exists() and not list((tmp_path / "tensorboard").iterdir())


def test_a_log_that_lost_its_end_is_named(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        log.write("train", step=1, epoch=0, values={"loss": 1.0})
        lengths = log.lengths()
    (tmp_path / FILE_NAME).write_bytes((tmp_path / FILE_NAME).read_bytes()[:-5])
    assert cut_log(tmp_path, lengths) == [f"{FILE_NAME} lacks its last 5 bytes: a part of the log is lost"]


@pytest.mark.parametrize("name", [FILE_NAME, "tensorboard", "tensorboard/events.out.tfevents.7.x"])
def test_a_link_among_the_files_of_a_log_is_refused_and_what_it_leads_to_stays(
    name: str, tmp_path: Path
) -> None:
    run, victim = tmp_path / "run", tmp_path / "victim"
    run.mkdir()
    if name == "tensorboard":
        victim.mkdir()
        victim = victim / "events.out.tfevents.7.x"
    victim.write_text("precious\n" * 100)
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).symlink_to(victim.parent if name == "tensorboard" else victim)
    refused = f"{re.escape(str(run / name))}: .*symbolic link to {re.escape(str((run / name).resolve()))}"
    for lengths in ({}, {name: 3}):
        with pytest.raises(RunFolderError, match=refused):
            cut_log(run, lengths)
    with pytest.raises(RunFolderError, match=refused):
        MetricsLog(run, tensorboard=True)
    assert victim.read_text() == "precious\n" * 100


def test_a_pipe_in_the_place_of_a_log_keeps_nobody_waiting(tmp_path: Path, no_waiting: None) -> None:
    os.mkfifo(tmp_path / FILE_NAME)
    for use in (lambda: read_metrics(tmp_path), lambda: MetricsLog(tmp_path), lambda: cut_log(tmp_path, {})):
        with pytest.raises(RunFolderError, match="not a regular file"):
            use()


def test_a_clock_that_was_set_back_does_not_change_the_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorBoard reads the files in the order of their names, which begin with the time."""
    for step, now in enumerate((2_000_000_000.0, 1_000_000_000.0, 1_000_000_001.0)):
        monkeypatch.setattr(time, "time", lambda now=now: now)
        with MetricsLog(tmp_path, tensorboard=True) as log:
            log.write("train", step=step, epoch=0, values={"loss": float(step)})
    monkeypatch.undo()
    assert scalars(tmp_path, "train/loss") == [(0, 0.0), (1, 1.0), (2, 2.0)]


def test_tensorboard_gets_the_same_numbers(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, tensorboard=True) as log:
        log.write("train", step=7, epoch=0, values={"loss": 0.5})
        log.write("note", step=7, epoch=0, values={"text": "hello"})
    assert scalars(tmp_path, "train/loss") == [(7, 0.5)]
