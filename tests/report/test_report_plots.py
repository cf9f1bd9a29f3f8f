"""Pictures: drawn from records alone, for any number of classes, and with the numbers of the records."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mooring.errors import RunFolderError
from mooring.report.metrics_log import MetricsLog, Record
from mooring.report.plots import draw_confusion, draw_curves, draw_run


def write_run(folder: Path, epochs: int, steps: int) -> None:
    with MetricsLog(folder) as log:
        for epoch in range(epochs):
            for step in range(epoch * steps + 1, (epoch + 1) * steps + 1):
                values = {"loss": 1 / step, "top1": 0.5, "lr": 1e-3}
                log.write("train", step=step, epoch=epoch, values=values)
            values = {"top1": 0.6 + 0.01 * epoch, "mean_per_class": 0.5, "nll": 0.7}
            log.write("val", step=(epoch + 1) * steps, epoch=epoch, values=values)
        log.write("test", step=epochs * steps, epoch=epochs - 1, values={"top1": 0.55})


def test_draw_run_writes_pictures_and_the_matrix_as_a_record(tmp_path: Path) -> None:
    write_run(tmp_path, 3, 20)
    counts = torch.tensor([[3, 1], [0, 4]])
    written = draw_run(tmp_path, counts, ["cat", "dog"], "test")
    assert [file.name for file in written] == ["curves.png", "confusion.png"]
    assert json.loads((tmp_path / "confusion.json").read_text()) == {
        "split": "test",
        "classes": ["cat", "dog"],
        "counts": [[3, 1], [0, 4]],
    }
    for file in written:
        pixels = np.asarray(Image.open(file).convert("L"))
        assert min(pixels.shape) > 300
        assert pixels.std() > 5, "an empty picture"
        file.unlink()
    assert draw_run(tmp_path) == written, "the records alone are enough"


def test_a_run_that_logged_nothing_has_no_pictures(tmp_path: Path) -> None:
    assert draw_run(tmp_path) == []
    MetricsLog(tmp_path).close()
    assert draw_run(tmp_path) == []


def test_curves_carry_the_numbers_of_the_records(tmp_path: Path) -> None:
    records = [
        Record("train", 10, 0, {"loss": 2.0, "lr": 1e-3}),
        Record("val", 10, 0, {"top1": 0.5, "nll": 1.0}),
        Record("train", 20, 1, {"loss": math.nan, "lr": 5e-4}),
        Record("val", 20, 1, {"top1": 0.75, "nll": 0.5}),
    ]
    loss, accuracy, rate = draw_curves(records).axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in (*loss.lines, *accuracy.lines)}
    assert lines["train"] == [[1, 2.0]], "a loss that is no number is left out"
    assert lines["validation NLL"] == [[1, 1.0], [2, 0.5]]
    assert lines["validation top-1"] == [[1, 50.0], [2, 75.0]]
    assert "best 75.0 %, epoch 2" in lines
    assert rate.lines[0].get_xydata().tolist() == [[1, 1e-3], [2, 5e-4]]


@pytest.mark.parametrize("classes", [2, 25, 26, 200, 201])
def test_confusion_of_any_number_of_classes(classes: int) -> None:
    counts = np.eye(classes, dtype=int) * 4
    counts[0] = 0  # a class without an image
    counts[1, 0] = 3
    axes, beside, *_ = draw_confusion(counts, [f"class {i}" for i in range(classes)]).axes
    assert (len(axes.get_yticklabels()) == classes) == (classes <= 200)
    assert [text.get_text() for text in beside.texts] == ["class 1\n   taken for class 0: 3 (43 %)"]
    shown = np.asarray(axes.images[0].get_array())
    assert shown[1, 0] == pytest.approx(3 / 7)
    assert shown[0].sum() == 0
    assert len(axes.texts) == (classes if classes <= 25 else 0), "counts are written where they fit"


def test_names_are_no_formulas(tmp_path: Path) -> None:
    (picture,) = draw_run(tmp_path, [[1, 1], [1, 1]], ["$x", "a_b$^"])
    assert picture.is_file()


def test_counts_and_names_must_agree() -> None:
    with pytest.raises(ValueError, match=r"counts must be \[3, 3\].*got \[2, 2\]"):
        draw_confusion(np.eye(2), ["a", "b", "c"])


def val(epoch: int, top1: float, nll: float) -> Record:
    return Record("val", 10 * (epoch + 1), epoch, {"top1": top1, "nll": nll})


@pytest.mark.parametrize(
    ("losses", "recorded", "marked"),
    [
        ((0.3, 0.2, 0.4), None, 2),
        ((0.3, 0.3, 0.3), None, 1),
        ((0.3, 0.2, 0.4), 2, 3),
        ((0.3, 0.2, 0.4), 9, 2),
    ],
)
def test_the_epoch_marked_is_the_one_the_run_chose(
    losses: tuple[float, ...], recorded: int | None, marked: int
) -> None:
    """Of equal accuracies the lowest loss counts, as in the run; a recorded choice comes first."""
    records = [val(epoch, 0.9, loss) for epoch, loss in enumerate(losses)]
    _, accuracy, _ = draw_curves(records, recorded).axes
    assert f"best 90.0 %, epoch {marked}" in [line.get_label() for line in accuracy.lines]
    ring = next(line for line in accuracy.lines if line.get_markersize() == 9)
    assert ring.get_xydata().tolist() == [[marked, 90.0]]


def test_the_result_of_the_run_says_which_epoch_is_marked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path, 3, 2)
    (tmp_path / "result.json").write_text('{"best_epoch": 0}')
    seen: list[int | None] = []

    def spy(records: list[Record], best_epoch: int | None) -> object:
        seen.append(best_epoch)
        return draw_curves(records, best_epoch)

    monkeypatch.setattr("mooring.report.plots.draw_curves", spy)
    draw_run(tmp_path)
    assert seen == [0]


def test_one_epoch_shows_and_axes_do_not_exaggerate() -> None:
    records = [Record("train", 4, 0, {"loss": 1.0, "lr": 1e-3, "top1": 0.901}), val(0, 0.9, 0.3)]
    loss, accuracy, rate = draw_curves(records).axes
    for line in (*loss.lines, *accuracy.lines):
        if len(line.get_xydata()) == 1:
            assert line.get_marker() == "o", line.get_label()
    low, high = accuracy.get_ylim()
    assert low <= 88 and high >= 92.1
    left, right = rate.get_xlim()
    assert left == 0 and 1 <= right <= 1.05
    _, perfect, _ = draw_curves([val(epoch, 1.0, 0.1) for epoch in range(3)]).axes
    assert perfect.get_ylim()[0] <= 98 and perfect.get_ylim()[1] <= 101


def test_the_confusion_names_its_split_and_lists_only_what_there_is() -> None:
    figure = draw_confusion(np.eye(3, dtype=int) * 4, ["a", "b", "c"], "val")
    axes = [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]
    assert len(axes) == 1, "an empty panel beside the matrix"
    assert axes[0].get_title(loc="left").startswith("val split: 12 of 12 images right (100.0 %)")


def test_names_in_any_script_give_one_line_at_most(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    (picture,) = draw_run(tmp_path, [[3, 1], [0, 4]], ["\u732b", "\U0001f9ff\u0f40"])
    assert picture.is_file()
    assert [str(warning.message) for warning in recwarn if "Glyph" in str(warning.message)] == []
    assert len(caplog.records) <= 1
    assert all("install a font" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("content", ['{"classes": ["a"]}', "[]", '{"classes": ["a"], "counts": [[1, 2]]}'])
def test_a_damaged_matrix_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "confusion.json").write_text(content)
    with pytest.raises(RunFolderError, match=r"confusion\.json: expected classes and"):
        draw_run(tmp_path)
