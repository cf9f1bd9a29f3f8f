"""The demo's own program, on the demo's photos and weights, one short run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mooring.models.weights import cache_folder

SHORT = ["train.epochs=1", "train.image_size=64", "train.eval_size=64", "report.progress=quiet"]


@pytest.fixture(scope="module")
def demo(repository: Path, tmp_path_factory: pytest.TempPathFactory):
    if not (cache_folder() / "demo" / "groceries.parquet").is_file():
        pytest.skip("the demo's files are not in the cache: run  python demo/fetch.py")
    out = tmp_path_factory.mktemp("demo")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(repository / "demo" / "run.py"), "--out", str(out), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)

    return run, out


def test_runs_shows_a_table_and_records(demo) -> None:
    run, out = demo
    first = run("--methods", "fine_tune", "--record", str(out / "record.jsonl"), "--set", *SHORT)
    assert first.returncode == 0, first.stderr
    assert "plain fine-tuning" in first.stdout and "14 classes: 675 train, 57 val, 661 test" in first.stdout
    record = json.loads((out / "record.jsonl").read_text())
    assert record["runs"]["fine_tune"][0]["test"]["top1"] > 1 / 14
    again = run("--methods", "fine_tune", "--set", *SHORT)  # reads what is done
    assert again.returncode == 0 and "seed 0" not in again.stdout
    other = run("--methods", "fine_tune", "--set", *SHORT, "optimizer.lr=1e-3")
    assert other.returncode != 0 and "other settings (optimizer)" in other.stderr
