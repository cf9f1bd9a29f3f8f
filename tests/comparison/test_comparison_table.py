"""Records in, table and picture out: against figures by hand, without any run."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from mooring.comparison.picture import draw_comparison
from mooring.comparison.records import read_records, write_records
from mooring.comparison.table import lines, markdown, notes, terminal
from mooring.errors import RunFolderError

TOP1 = {"fine_tune": (0.80, 0.82, 0.84), "l2_sp": (0.81, 0.84, 0.87)}


def record(method: str, seed: int, top1: float, **changes: Any) -> dict[str, Any]:
    return {
        "run": f"{method}-{changes.get('shots')}-{seed}", "role": "result", "method": method, "model": "m",
        "shots": None, "fraction": None, "seed": seed, "epochs": 4, "lr": 3e-4, "sweep": None, "settings": {},
        "val": {"top1": top1 - 0.1, "mean_per_class": top1 - 0.1},
        "test": {"top1": top1, "mean_per_class": top1 - 0.02}, "seconds_per_epoch": 2.0 + seed,
        "images_per_second": 50.0, "peak_memory": {"bytes": (100 + seed) << 20, "how": "CUDA allocator"},
    } | changes  # fmt: skip


RECORDS = [record(method, seed, top1) for method, all_of in TOP1.items() for seed, top1 in enumerate(all_of)]


def test_the_table_holds_the_figures_by_hand() -> None:
    """Differences 1, 2, 3 points: 2.0 +- 4.303 / sqrt 3 = 2.5 points, p = 1 - sqrt(6/7) = 0.07."""
    first, second = markdown(RECORDS).splitlines()[2:4]
    assert first == "| fine_tune | 82.0 ± 2.0 % | 80.0 ± 2.0 % | - | - | 0.0003 | 3 | 50 | 102 |"
    assert second == "| l2_sp | 84.0 ± 3.0 % | 82.0 ± 3.0 % | +2.0 ± 2.5 | 0.07 | 0.0003 | 3 | 50 | 102 |"
    console = Console(width=80, record=True, file=io.StringIO())
    for table in terminal(RECORDS, "a [b]"):
        console.print(table)
    text = console.export_text()
    assert "+2.0 ± 2.5" in text and "a [b]" in text, "80 columns are enough"


def test_what_was_measured_beyond_the_classes_has_columns() -> None:
    measured = [
        {**each, "discrimination": {"pretrained": {}, "selected": {"source_top1": each["test"]["top1"] / 2}}}
        for each in RECORDS[:3]
    ]
    head, _, first, second = markdown([*measured, *RECORDS[3:]]).splitlines()[:4]
    assert "| p | source top-1 | learning rate |" in head
    assert "| - | 41.0 ± 1.0 % | 0.0003 |" in first and "| 0.07 | - | 0.0003 |" in second


def test_further_test_sets_and_distortion_have_columns_where_every_run_has_them() -> None:
    measured = {
        "extra_tests": {"art": {"top1": 0.5}, "sketch": {"top1": 0.25}},
        "distortion": {"val": {"feature_cosine": 0.1}, "test/art": {"feature_cosine": 0.75}},
    }
    text = markdown([{**each, **measured} for each in RECORDS])
    head, first = text.splitlines()[0], text.splitlines()[2]
    assert "| art | sketch | cosine: art | learning rate |" in head and "cosine: val" not in head
    assert "| 50.0 ± 0.0 % | 25.0 ± 0.0 % | 0.750 |" in first
    titles = [str(table.title) for table in terminal([{**each, **measured} for each in RECORDS], "t")]
    assert titles == ["t", "further test sets, top-1", "features, before and after", "what it cost"]
    one_lacks_them = [{**RECORDS[0], **measured}, *RECORDS[1:]]
    assert "cosine" not in markdown(one_lacks_them) and " art " not in markdown(one_lacks_them)


def test_what_is_paired_is_a_seed_that_both_have() -> None:
    """In another order, and with a seed that plain fine-tuning lacks."""
    found = lines([*RECORDS[::-1], record("l2_sp", 7, 0.1)])
    gain = next(line.gain for line in found if line.method == "l2_sp")
    assert gain is not None and gain.n == 3
    assert gain.mean == pytest.approx(0.02)
    assert all(line.gain is None for line in lines(RECORDS[3:])), "no baseline, no test"


def test_without_a_test_split_the_notes_warn() -> None:
    text = " ".join(notes([{**each, "test": None} for each in RECORDS]))
    assert "validation split that chose the epoch" in text
    assert "val top-1" in markdown([{**each, "test": None} for each in RECORDS])
    assert "3 seeds" in text and "cannot go below p = 0.25" in text
    assert "No run is finished" in notes([])[0]


@pytest.mark.parametrize("parts", [(None,), (1, 5)])
def test_the_picture_is_drawn_from_the_file(parts: tuple[int | None, ...], tmp_path: Path) -> None:
    records = [
        record(r["method"], r["seed"], r["test"]["top1"], shots=shots) for shots in parts for r in RECORDS
    ]
    write_records(tmp_path, records)
    draw_comparison(list(read_records(tmp_path).values()), tmp_path / "picture.png")
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.width > 800


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    write_records(tmp_path, RECORDS[:1])
    with (tmp_path / "records.jsonl").open("a") as file:
        file.write('{"run": "x"}\n')
    with pytest.raises(RunFolderError, match=r"records\.jsonl:2: expected a record, got one without"):
        read_records(tmp_path)
