"""Accuracy on real images: what is committed is drawn from the records, and the records hold no path of a machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from bench.accuracy import tables
from bench.accuracy.__main__ import comparisons
from bench.accuracy.experiments import EXPERIMENTS
from bench.accuracy.keep import FOLDER, keep, kept, names, walk
from bench.accuracy.picture import draw_gains
from mooring.config.method_settings import method_names, method_tables


def record(method: str, seed: int, top1: float, root: Path) -> dict[str, Any]:
    return {
        "run": f"{method}-seed{seed}", "role": "result", "method": method, "model": "m", "shots": None,
        "fraction": None, "seed": seed, "epochs": 3, "lr": 1e-3, "sweep": None, "val": {"top1": top1},
        "test": {"top1": top1, "mean_per_class": top1}, "seconds_per_epoch": 1.0, "images_per_second": 10.0,
        "peak_memory": {"bytes": 1 << 20, "how": "resident"}, "counts": {"train": 10}, "data": "d" * 64,
        "settings": {"data": {"path": str(root / "photos")}, "seed": seed, "method": {"name": method}},
        "environment": {
            "time": f"at {seed}", "commit": "c" * 40, "command": [str(root / "cli.py")], "python": "3.11",
            "packages": {"torch": "2"}, "cpu": {"model": "cpu", "capability": "AVX2"}, "devices": [],
        },
    }  # fmt: skip


def test_kept_records_hold_what_the_tables_need_and_no_path(tmp_path: Path) -> None:
    """Three seeds of two methods: 80, 82, 84 and 81, 84, 87 percent."""
    tops = {"fine_tune": (0.80, 0.82, 0.84), "l2_sp": (0.81, 0.84, 0.87)}
    runs = [record(m, seed, top, tmp_path) for m, each in tops.items() for seed, top in enumerate(each)]
    keep("fruit", "Fruit", runs, {"assets": tmp_path}, tmp_path / "kept")
    assert names(tmp_path / "kept") == ["fruit"]
    head, found = kept("fruit", tmp_path / "kept")
    assert head["settings"] == {"data.path": "{assets}/photos"} and len(head["environments"]) == 1
    assert found[3]["settings"] == {"seed": 0, "method.name": "l2_sp"}
    assert str(tmp_path) not in (tmp_path / "kept" / "fruit.jsonl").read_text()
    text = tables.summary({"fruit": (head, found)})
    assert "| fine_tune | 82.0 ± 2.0 |" in text and "| l2_sp | **84.0 ± 3.0** |" in text
    assert "+2.0 ± 2.5" in tables.results({"fruit": (head, found)}, []), "the comparison's own table"
    draw_gains({"Fruit": found}, tmp_path / "gains.png")
    with Image.open(tmp_path / "gains.png") as picture:
        assert picture.width > 1000


def test_a_row_with_settings_of_its_own_is_a_comparison_of_its_own(tmp_path: Path) -> None:
    roots = {"assets": tmp_path, "demo": tmp_path, "work": tmp_path}
    made = dict(comparisons(EXPERIMENTS["soft_resnet20"], tmp_path, roots))
    assert set(made) == {None, *EXPERIMENTS["soft_resnet20"].variants}
    assert made[None].methods == ("fine_tune",)
    assert "method.soft_schedule=linear" in made["soft_fine_tuning, linear"].overrides


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiments_name_methods_that_there_are(name: str) -> None:
    experiment = EXPERIMENTS[name]
    used = [*experiment.methods, *(method for method, _ in experiment.variants.values())]
    assert {part for method in used for part in method_names(method)} <= set(method_tables())
    assert experiment.seeds >= 3 and "fine_tune" in experiment.methods


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.jsonl")), ids=lambda file: file.stem)
def test_no_record_names_a_place_on_a_machine(file: Path) -> None:
    for line in file.read_text(encoding="utf-8").splitlines():
        told = [text for text in walk(json.loads(line)) if text.startswith(("/", "~"))]
        assert not told


def test_what_is_committed_is_drawn_from_the_records(repository: Path) -> None:
    found, costs = tables.experiments(), tables.step_costs()
    again = "run  python -m bench.accuracy.tables"
    assert tables.RESULTS.read_text(encoding="utf-8") == tables.results(found, costs), again
    readme = (repository / "README.md").read_text(encoding="utf-8")
    assert tables.with_block(readme, tables.readme_block(found, costs)) == readme, again
    assert tables.PICTURE.is_file()
