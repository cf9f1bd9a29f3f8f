"""An image of the source task that cannot be read: the state that is kept is the one from before the step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from resume_cases import STOP_STEP, Ids, assert_equal, make_config, outcome, run, write_inputs

from mooring.data.batch import Batch
from mooring.errors import DataError
from mooring.train.engine import Engine


@pytest.mark.parametrize("health", ["stop", "off"])
def test_a_source_image_that_vanishes_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, health: str
) -> None:
    monkeypatch.setenv("MOORING_CACHE", str(tmp_path / "cache"))
    write_inputs(tmp_path)
    changes: dict[str, Any] = {"health": {"nonfinite": health}}

    def config(name: str) -> Any:
        return make_config(tmp_path, tmp_path / name, "soft_fine_tuning", "torch", **changes)

    undisturbed: Ids = {}
    assert not run(config("whole"), undisturbed)

    files = {file: file.read_bytes() for file in sorted((tmp_path / "source" / "train").rglob("*.png"))}

    def arrange(engine: Engine) -> None:
        step = engine.step

        def disturbed(group: list[Batch]) -> Any:
            if engine.global_step == STOP_STEP:
                for file in files:
                    file.write_bytes(b"gone")
            return step(group)

        engine.step = disturbed  # type: ignore[method-assign]

    ids: Ids = {}
    with pytest.raises(DataError, match="the state before it is kept"):
        run(config("run"), ids, arrange)
    for file, content in files.items():
        file.write_bytes(content)
    assert not run(config("run").model_copy(update={"resume": "auto"}), ids)
    assert ids == undisturbed
    assert assert_equal(outcome(tmp_path / "whole"), outcome(tmp_path / "run")) > 100
