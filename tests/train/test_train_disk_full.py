"""A disk that really fills up in the middle of a run."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from mooring import Engine
from mooring.errors import RunFolderError
from mooring.train.inference import load_run


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400m", "tmpfs", str(place)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("a file system of limited size needs root: mount said " + mounted.stderr.decode().strip())
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_says_so_and_keeps_the_finished_epoch(make_config, small_disk: Path, monkeypatch) -> None:
    engine = Engine.build(make_config(out=small_disk / "run", train={"epochs": 3}))
    real = engine.step

    def step(group):
        if engine.global_step == engine.steps_per_epoch + 1:  # the first epoch is on disk
            with (small_disk / "other").open("wb") as file, pytest.raises(OSError, match="No space left"):
                while True:
                    file.write(bytes(1 << 20))
                    file.flush()
        return real(group)

    monkeypatch.setattr(engine, "step", step)
    with pytest.raises(RunFolderError, match=r"the disk is full.*resume="):
        engine.fit()
    assert load_run(small_disk / "run").classes == ["class_0", "class_1", "class_2"]
    (small_disk / "other").unlink()
    resumed = engine.config.model_copy(update={"resume": str(small_disk / "run")})
    assert Engine.build(resumed).fit().test is not None
