"""A bounded share of the fuzzing for every test run; ``make fuzz`` is the long one."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from targets import TARGETS

# what an input costs decides how many there are
_EXAMPLES = {
    "run folder": 4,
    "image": 120,
    "image folder": 15,
    "key=value overrides": 60,
    "images.parquet": 25,
}


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_damage_is_a_typed_error(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MOORING_CACHE", str(tmp_path / "cache"))

    @settings(
        max_examples=_EXAMPLES.get(name, 30),
        deadline=None,
        database=None,
        derandomize=True,
        phases=(Phase.generate,),  # a seed does not shrink
        suppress_health_check=list(HealthCheck),
    )
    @given(st.integers(0, 2**62))
    def run(seed: int) -> None:
        with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
            TARGETS[name].run(random.Random(seed), Path(folder))

    run()
