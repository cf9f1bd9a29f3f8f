"""What is made of records: pairs of commits, tables, the picture, shares of a training step. Nothing is timed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import records
from bench.compare import compare
from bench.comparison import comparisons, headlines
from bench.step_share import StepShares
from bench.tables import all_newest, in_readme, readme_table, with_table

README = "# Title\n<!-- kernel table: environment none -->\n<!-- end of kernel table -->\nend\n"


def quantiles(p50: float) -> dict[str, float]:
    return {"p20": 0.9 * p50, "p50": p50, "p80": 1.1 * p50}


def fake_record(seconds: float, **changes: Any) -> dict[str, Any]:
    return {
        "op": "calibrate",
        "size": "B64-K2-D2048-C4",
        "dtype": "float32",
        "device": "cpu",
        "threads": 1,
        "pass": "forward",
        "candidate": "auto",
        "ours": changes.get("candidate", "auto") in ("auto", "native"),
        "baseline": "reference",
        "environment": "e0",
        "commit": "aaa",
        "time": "2026-01-01T00:00:00+00:00",
        "seconds": quantiles(seconds),
        "wall_seconds": quantiles(10 * seconds),
        "times_faster_than": {"reference": quantiles(2.0), "public": quantiles(3.0)},
        "wall_times_faster_than": {"reference": quantiles(1.5)},
        "peak_bytes": 2**20,
        "share_of_copy_rate": 0.5,
        "share_of_matmul_rate": 0.5,
        "relative_error": 1e-7,
        "copy_bytes": 64,
        "copy_bytes_per_second": 1.0,
    } | changes


def at_commit(commit: str, seconds: float, copy_rate: float = 1.0, **changes: Any) -> dict[str, Any]:
    return fake_record(seconds, commit=commit, copy_bytes_per_second=copy_rate, **changes)


def test_compare_corrects_for_the_machine_and_takes_the_newest() -> None:
    history = [
        at_commit("aaa", 9.0),
        at_commit("aaa", 4.0),
        at_commit("bbb", 4.0, 0.5),  # the machine ran at half its speed: the code got twice as fast
        at_commit("bbb", 1.0, candidate="native"),
    ]
    (change,) = compare(history, "aa", "bbb")
    assert change.speed_up == pytest.approx(2.0) and change.beyond_noise
    assert (change.old_seconds, change.new_seconds) == (4.0, 4.0)
    assert compare(history, "aaa", "ccc") == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("op", "other"),
        ("size", "B2"),
        ("dtype", "bfloat16"),
        ("pass", "backward"),
        ("candidate", "native"),
        ("threads", 2),
        ("environment", "e1"),
    ],
)
def test_compare_pairs_only_what_was_measured_alike(name: str, value: Any) -> None:
    assert compare([at_commit("aaa", 4.0), at_commit("bbb", 2.0, **{name: value})], "aaa", "bbb") == []


def test_compare_goes_by_the_wall_at_two_threads_and_by_time_alone_where_the_yardstick_differs() -> None:
    (change,) = compare(
        [at_commit("aaa", 4.0, threads=2), at_commit("bbb", 2.0, 7.0, threads=2, copy_bytes=65)], "aaa", "bbb"
    )
    assert (change.old_seconds, change.new_seconds, change.speed_up) == (40.0, 20.0, 2.0)


def test_records_are_rounded_and_keep_their_shape(tmp_path: Path) -> None:
    records.append(fake_record(1.23456789e-6), tmp_path)
    line = json.loads((tmp_path / "calibrate.jsonl").read_text())
    assert line["seconds"]["p50"] == 1.2346e-6 and line["threads"] == 1 and line["peak_bytes"] == 2**20


def training_step(part: str, seconds: float) -> dict[str, Any]:
    step = fake_record(seconds, op="training_step", size="B64", candidate="resnet50")
    step["pass"] = part
    return {
        k: v for k, v in step.items() if k not in ("times_faster_than", "baseline", "wall_times_faster_than")
    }


def history() -> list[dict[str, Any]]:
    return [
        fake_record(1e-6),
        fake_record(2e-6, candidate="reference"),
        fake_record(3e-6, candidate="public"),
        fake_record(1e-7, candidate="public solver", same_function=False),
        fake_record(1e-8, size="B1-K1-D4-C1", small=True),
        fake_record(1e-6, threads=2),
        fake_record(2e-6, threads=2, candidate="reference"),
        training_step("train", 5e-6),
        training_step("forward", 3e-6),
    ]


def test_share_of_a_training_step() -> None:
    made = history()
    first, _, two_threads = comparisons(made)
    shares = StepShares(made)
    # 1 us saved of 2 us for the baseline and 5 + 3 us for the rest of the step
    assert shares.saved(first) == pytest.approx(0.1)
    assert shares.saved(two_threads) is None, "no step was measured at two threads"
    plain = [record | {"step": "fine_tune", "calls_per_step": 3.0} for record in made]
    assert StepShares(plain).saved(comparisons(plain)[0]) == pytest.approx(3 / (6 + 5))
    wide = [record | {"size": record["size"].replace("B64-K2-D2048", "B256")} for record in plain]
    assert StepShares(wide).saved(comparisons(wide)[0]) == pytest.approx(3 / (6 + 20)), (
        "four times the images"
    )


def test_headlines_are_full_sizes_at_the_fewest_threads() -> None:
    (headline,) = headlines(comparisons(history()), "e0")
    assert not headline.small and headline.threads == 1
    assert headline.ours is not None and headline.ours["seconds"]["p50"] == 1e-6
    assert headline.eager_or_compiled is not None
    assert headline.best_baseline is not None and headline.best_baseline["candidate"] == "reference"


def test_picture_and_tables_are_drawn_from_records(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from bench.plot import main as plot

    store, out, readme = tmp_path / "records", tmp_path / "plots", tmp_path / "README.md"
    readme.write_text(README)
    arguments = ["--records", str(store), "--out", str(out), "--readme", str(readme)]
    assert plot(arguments) == 1
    described: dict[str, object] = {"cpu": "a CPU", "cpu_capability": "AVX2", "native": "avx2", "torch": "2"}
    records.remember_environment("e0", described, store)
    records.remember_environment("e0", described, store)
    assert len(records.environments(store)) == 1
    for record in history():
        records.append(record, store)
    assert plot(arguments) == 0
    assert (out / "overview.png").read_bytes().startswith(b"\x89PNG")
    table = (out / "table.md").read_text()
    row = next(line for line in table.splitlines() if "| 1 | auto |" in line)
    assert (
        "| 1.0 | 2.00 (1.80 to 2.20) | 3.00 (2.70 to 3.30) | 50.0% | 50.0% | 1.00 | 1.0e-07 | 10.00% |" in row
    )
    shown = readme.read_text()
    assert in_readme(shown) == "e0" and shown.startswith("# Title\n") and shown.endswith("-->\nend\n")
    assert "| 2.00 (1.80 to 2.20) | 1.50 (1.35 to 1.65) | 3.00" in shown, (
        "one thread, two threads, public code"
    )
    assert "`calibrate.jsonl`" in shown and "a CPU (avx2)" in shown
    assert plot([*arguments, "--environment", "e9"]) == 1


def test_the_readme_shows_what_the_committed_records_give(repository: Path) -> None:
    """Run  python -m bench.plot  when this fails."""
    readme = (repository / "README.md").read_text(encoding="utf-8")
    identity = in_readme(readme)
    table = readme_table(all_newest(), records.environments(), identity)
    assert with_table(readme, identity, table) == readme


def test_a_readme_without_a_place_for_the_table_is_refused() -> None:
    with pytest.raises(ValueError, match="lacks the lines"):
        with_table("# Title\n", "e0", "")
