"""Whole comparisons on generated photos: equal runs, rates chosen on validation, broken off and continued."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from mooring.cli import app
from mooring.comparison.plan import Comparison, Part
from mooring.comparison.progress import RunOfMany
from mooring.comparison.records import differing_settings, read_records
from mooring.comparison.runner import run_comparison
from mooring.errors import ConfigError, RunFolderError


def figures(record: Any) -> Any:
    """What must not depend on when a run was made."""
    return {key: record[key] for key in ("method", "seed", "lr", "val", "test", "best_epoch", "data")}


def press_ctrl_c(monkeypatch: pytest.MonkeyPatch, *, at_call: int) -> None:
    calls = 0
    advance = RunOfMany.advance

    def counted(self: RunOfMany, *arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == at_call:
            os.kill(os.getpid(), signal.SIGINT)
        advance(self, *arguments)

    monkeypatch.setattr(RunOfMany, "advance", counted)


def test_a_comparison_is_broken_off_and_continued(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two methods, two seeds, two rates, stopped in the middle of the second run: as if never stopped."""

    words = [*words, "train.epochs=1"]

    def compare(out: str, *methods: str) -> Any:
        return run_comparison(Comparison(methods, tmp_path / out, overrides=words, seeds=2, lrs=[1e-3, 3e-4]))

    with monkeypatch.context() as patched:
        press_ctrl_c(patched, at_call=6)  # 4 steps a run
        stopped = compare("broken", "fine_tune", "l2_sp")
    assert stopped.interrupted
    assert [record["run"] for record in stopped.records] == ["fine_tune-lr0.001-seed0"]
    assert stopped.records[0]["test"] is None, "chosen on validation alone"
    whole = compare("broken", "fine_tune", "l2_sp")
    assert not whole.interrupted
    undisturbed = {record["run"]: figures(record) for record in compare("again", "fine_tune").records}
    assert len(undisturbed) == 3
    assert undisturbed.items() <= {record["run"]: figures(record) for record in whole.records}.items()

    results = [record for record in whole.records if record["role"] == "result"]
    assert [(r["method"], r["seed"]) for r in results] == [
        ("fine_tune", 0), ("fine_tune", 1), ("l2_sp", 0), ("l2_sp", 1),
    ]  # fmt: skip
    rates = [record for record in whole.records if record["role"] == "rate"]
    assert len(rates) == 2 and all(record["test"] is None for record in rates)
    for method in ("fine_tune", "l2_sp"):
        first, second = (record for record in results if record["method"] == method)
        tried = {r["lr"]: r for r in whole.records if r["method"] == method and r["seed"] == 0}
        best = min(tried.values(), key=lambda r: (-r["val"]["top1"], r["val"]["nll"]))
        assert first["lr"] == second["lr"] == best["lr"] == first["sweep"]["chosen"]
        assert first["sweep"]["rates"][0]["top1"] == tried[1e-3]["val"]["top1"]
    for seed in (0, 1):
        a, b = (record for record in results if record["seed"] == seed)
        assert a["data"] == b["data"]
        different = set(differing_settings(a["settings"], b["settings"]))
        assert different <= {"optimizer.lr", "method.name", "method.backbone_pull", "method.head_pull"}
    record = results[0]
    assert record["environment"]["packages"]["torch"]
    assert record["peak_memory"]["bytes"] > 50 << 20
    assert record["seconds_per_epoch"] > 0 and record["images_per_second"] > 0

    out = tmp_path / "broken"
    assert json.loads((out / "records.jsonl").read_text().splitlines()[0])["what"] == "comparison"
    table = (out / "table.md").read_text()
    assert "test top-1" in table and "± " in table and "2 seeds" in table
    with Image.open(out / "comparison.png") as picture:
        assert picture.width > 400
    # a finished comparison runs nothing, and refuses other settings
    monkeypatch.setattr("mooring.comparison.runner._train", None)
    assert len(compare("broken", "fine_tune", "l2_sp").records) == 6
    with pytest.raises(RunFolderError, match=r"with other settings \(.*train\.epochs\)"):
        run_comparison(
            Comparison(["fine_tune"], out, overrides=[*words, "train.epochs=3"], seeds=1, lrs=[1e-3, 3e-4])
        )


def test_the_command_compares_parts_of_the_data(words: list[str], tmp_path: Path) -> None:
    arguments = ["compare", *words, "train.epochs=1", "methods=[fine_tune, linear_probe]", "--seeds", "1"]
    result = CliRunner(env={"COLUMNS": "200"}).invoke(
        app, [*arguments, "--shots", "2,4", "--out", str(tmp_path / "out")]
    )
    assert result.exit_code == 0, result.output
    for text in ("2 shots", "4 shots", "test top-1", "One seed shows no spread"):
        assert text in result.stdout
    assert "run 4 of 4: linear_probe, 4 shots, seed 0" in result.stderr
    records = read_records(tmp_path / "out")
    assert {(r["method"], r["shots"]): r["counts"]["train"] for r in records.values()} == {
        ("fine_tune", 2): 4, ("linear_probe", 2): 4, ("fine_tune", 4): 8, ("linear_probe", 4): 8,
    }  # fmt: skip
    assert len({r["counts"]["val"] for r in records.values()}) == 1
    assert (tmp_path / "out" / "comparison.png").is_file()


def test_methods_and_seeds_are_said_once(words: list[str]) -> None:
    result = CliRunner().invoke(app, ["compare", *words, "methods=[fine_tune]", "--methods", "l2_sp"])
    assert result.exit_code == 2 and "methods: expected one value" in result.stderr.replace("\n", " ")
    result = CliRunner().invoke(app, ["compare", *words, "methods=[fine_tune]", "seeds=x"])
    assert result.exit_code == 2 and "seeds: expected whole numbers" in result.stderr.replace("\n", " ")


def test_settings_of_a_method_go_to_that_method(words: list[str], tmp_path: Path) -> None:
    comparison = Comparison(["fine_tune", "dr_tune"], tmp_path, overrides=[*words, "method.bank_size=8"])
    whole = Part()
    assert comparison.trial("dr_tune", whole, None, 1).config.method.bank_size == 8  # type: ignore[union-attr]
    assert comparison.trial("fine_tune", whole, None, 1).config.method.name == "fine_tune"
    assert comparison.trial("fine_tune", Part(shots=2), 1e-3, 1).name == "fine_tune-shots2-lr0.001-seed1"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": []}, "expected at least one"),
        ({"methods": ["fine_tune", "fine_tune"]}, "expected each once"),
        ({"shots": [1], "fractions": [0.5]}, "give one of them"),
        ({"overrides": ["method=dr_tune"]}, "written --methods"),
        ({"overrides": ["out=x"]}, "written --out"),
        ({"overrides": ["optimizer.lr=1"], "lrs": [1e-3]}, "beside --lrs"),
        ({"overrides": ["method.bank_size=8"]}, "none of fine_tune has it"),
        ({"overrides": ["resume=x"]}, "leave it out"),
        ({"methods": ["fine_tun"]}, "the nearest is fine_tune"),
        ({"methods": ["fine_tune+dr_tune"]}, "leave it out"),
        ({"lrs": [-1.0]}, "optimizer.lr"),
        ({"seeds": 0}, "at least 1"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_runs(
    words: list[str], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    options = {"methods": ["fine_tune"], "out": tmp_path / "out", **change}
    options["overrides"] = [*words, *change.get("overrides", [])]
    with pytest.raises(ConfigError, match=message):
        run_comparison(Comparison(**options))
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_refused(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(RunFolderError, match="expected a new folder or an earlier comparison"):
        run_comparison(Comparison(["fine_tune"], tmp_path, overrides=words))
