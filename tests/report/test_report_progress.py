"""What a run shows: the words, and when."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

import pytest
from rich.console import Console

from mooring.report.metrics import duration, metric, shown_metrics
from mooring.report.progress import (
    BarProgress,
    PlainProgress,
    Progress,
    counting,
    make_progress,
    resolve_mode,
)
from mooring.report.table import Row, markdown_table, results_table


@dataclass(frozen=True)
class Plan:
    model: str = "resnet50"
    method: str = "dr_tune"
    device: str = "cpu"
    train_images: int = 100
    classes: int = 5
    steps_per_epoch: int = 10
    total_steps: int = 30


class Clock:
    """Seconds that pass when told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def run(progress: Progress, clock: Clock, first: int = 1) -> None:
    with progress:
        progress.start(Plan(), 3)
        for step in range(first, 31):
            clock.now += 1
            values = {"loss": 1 / step, "lr": 1e-3, "images_per_second": 32.0} if step % 5 == 0 else None
            progress.advance(step, values)
            if step % 10 == 0:
                progress.evaluated("val", step // 10 - 1, {"top1": 0.5, "nll": 0.25, "ece": math.nan})
        progress.note("done [not markup]")


def test_plain_lines() -> None:
    out, clock = io.StringIO(), Clock()
    run(PlainProgress(out, interval=12, clock=clock), clock)
    assert out.getvalue().splitlines() == [
        "dr_tune on resnet50: 100 training images, 5 classes, 30 steps in 3 epochs, cpu",
        "epoch 1/3  step 5/30  loss 0.2000  lr 1.0e-03  32 img/s  ETA 0:25",
        "epoch 1/3  val  top-1 50.0 %  calibration error nan  NLL 0.2500",
        "epoch 2/3  step 20/30  loss 0.0500  lr 1.0e-03  32 img/s  ETA 0:10",
        "epoch 2/3  val  top-1 50.0 %  calibration error nan  NLL 0.2500",
        "epoch 3/3  val  top-1 50.0 %  calibration error nan  NLL 0.2500",
        "done [not markup]",
    ]


def test_eta_of_a_continued_run_counts_its_own_steps() -> None:
    out, clock = io.StringIO(), Clock()
    run(PlainProgress(out, interval=0, clock=clock), clock, first=21)
    assert "epoch 3/3  step 25/30  loss 0.0400  lr 1.0e-03  32 img/s  ETA 0:05" in out.getvalue()


def test_bar_keeps_the_lines_of_finished_epochs() -> None:
    out, clock = io.StringIO(), Clock()
    console = Console(file=out, force_terminal=True, width=120, color_system=None)
    run(BarProgress(console, clock=clock), clock)
    text = out.getvalue()
    assert text.count("val  top-1 50.0 %") == 3
    assert "done [not markup]" in text
    assert "30/30" in text


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    run(make_progress("quiet"), Clock())
    with counting("scanning", "images", "quiet") as tick:
        tick(1, 1)
    assert capsys.readouterr() == ("", "")


def test_counting_in_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    with counting("scanning", "images", "plain") as tick:
        for done in range(1, 4):
            tick(done, 3)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("scanning: 3/3 images, ")


def test_a_pipe_gets_lines_and_other_ranks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_mode("auto") == "plain"
    assert resolve_mode("bar") == "bar"
    monkeypatch.setenv("RANK", "1")
    assert resolve_mode("bar") == "quiet"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (75, "1:15"), (3700, "1:01:40"), (math.inf, "-:--")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("top1", 0.7912, "79.1 %"),
        ("images_per_second", 31.4, "31"),
        ("images_per_second", 3.14, "3.1"),
        ("loss", 0.12345, "0.1235"),
        ("loss", 123.456, "123.5"),
        ("loss", math.inf, "inf"),
    ],
)
def test_metrics_are_shown_with_the_digits_that_mean_something(name: str, value: float, text: str) -> None:
    assert metric(name).show(value) == text


ROWS = [
    Row("linear_probe", {"top1": 0.79, "images_per_second": 90.0}),
    Row("fine_tune", {"top1": [0.80, 0.82, 0.84], "images_per_second": 40.0}),
    Row("a|b", {"top1": 0.8201}),
]


def test_markdown_marks_the_best_and_what_is_missing() -> None:
    assert markdown_table(ROWS, ["top1", "images_per_second"]) == (
        "| method | top-1 | images/s |\n"
        "|---|---:|---:|\n"
        "| linear_probe | 79.0 % | **90** |\n"
        "| fine_tune | **82.0 ± 2.0 %** | 40 |\n"
        "| a\\|b | **82.0 %** | - |\n"
    )


def test_names_are_no_markup() -> None:
    console = Console(file=io.StringIO(), width=80, record=True)
    console.print(results_table([Row("[bold]q", {"top1": 0.5})], ["top1", "[/x]"], title="[/x] t"))
    text = console.export_text()
    for name in ("[bold]q", "[/x] t", "[/x]"):
        assert name in text


@pytest.mark.parametrize(("classes", "shown"), [(5, False), (6, True), (None, True)])
def test_top5_is_shown_where_it_says_something(classes: int | None, shown: bool) -> None:
    assert ("top5" in shown_metrics(["top1", "top5"], classes)) == shown
    if classes is not None:
        out = io.StringIO()
        progress = PlainProgress(out)
        progress.start(Plan(classes=classes), 1)
        progress.evaluated("val", 0, {"top1": 0.5, "top5": 1.0})
        assert ("top-5" in out.getvalue()) == shown
        assert "in 1 epoch," in out.getvalue()


def test_terminal_table_has_the_same_cells() -> None:
    console = Console(file=io.StringIO(), width=80, record=True)
    console.print(results_table(ROWS, ["top1", "images_per_second"], title="t"))
    text = console.export_text()
    for cell in ("linear_probe", "79.0 %", "82.0 ± 2.0 %", "images/s"):
        assert cell in text
