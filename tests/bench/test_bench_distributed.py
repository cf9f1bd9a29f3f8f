"""Figures of several ranks: what is committed is drawn from the records, and these are whole and name no place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.accuracy.keep import walk
from bench.distributed import tables
from bench.distributed.runs import FOLDER
from mooring.config.method_settings import method_tables


def test_what_is_committed_is_drawn_from_the_records(repository: Path) -> None:
    again = "run  python -m bench.distributed.tables"
    assert tables.RESULTS.read_text(encoding="utf-8") == tables.results(), again
    readme = (repository / "README.md").read_text(encoding="utf-8")
    assert tables.with_block(readme, tables.readme_block()) == readme, again


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.jsonl")), ids=lambda file: file.stem)
def test_no_record_names_a_place_on_a_machine(file: Path) -> None:
    for line in file.read_text(encoding="utf-8").splitlines():
        assert not [text for text in walk(json.loads(line)) if text.startswith(("/", "~"))]


def test_the_tables_have_every_method() -> None:
    methods = set(method_tables())
    cells = {(r["method"], r["kind"], r["world"], r["backend"]) for r in tables.equality_records()}
    assert len(cells) == len(methods) * 2 * 2 * 5 and {cell[0] for cell in cells} == methods
    plain = {(r["method"], r["kind"], r["world"]) for r in tables.traffic_records() if r["backend"] == "ddp"}
    assert plain >= {
        (method, kind, world) for method in methods for kind in ("vit", "cnn") for world in (2, 4)
    }


def test_the_newest_record_of_a_cell_counts(tmp_path: Path) -> None:
    cell = {"method": "m", "kind": "vit", "world": 2, "backend": "ddp"}
    lines = [{**cell, "problem": "far"}, {**cell, "problem": None, "loss_difference": 1e-7}]
    (tmp_path / "equality.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [record["problem"] for record in tables.equality_records(tmp_path)] == [None]


def test_efficiency_is_against_one_process() -> None:
    """2 s alone, 2.5 s a rank: 80 %; its 0.5 s of exchange are 3 of 8 s on the wall."""
    one = {"method": "m", "scope": None, "backend": "local", "world": 1, "process_seconds": 2.0}
    four = {
        **one, "backend": "ddp", "world": 4, "process_seconds": 2.5, "part_seconds": {"exchange": 0.5},
        "exchange_wall_seconds": 3.0, "wall_seconds": 8.0,
    }  # fmt: skip
    row = tables.scaling_table([one, four]).splitlines()[-1]
    assert "| m | ddp | 2.00 | 2.50 (80%) |" in row and "| 0.50 |" in row and "3.00 of 8.00" in row
