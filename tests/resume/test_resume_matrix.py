"""Every method, source, number of processes and place of interruption: n steps, a resume and n more are 2n steps.

A pairwise covering part runs always, all of it in ``make test-full``.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
from pairwise import covering, pairs
from resume_cases import (
    METHODS,
    POSITIONS,
    Ids,
    assert_equal,
    interrupted_run,
    make_config,
    outcome,
    run,
    write_inputs,
)

from mooring.methods.registry import METHODS as REGISTERED

SOURCES = ("torch", "dali")
AXES = (tuple(METHODS), POSITIONS, SOURCES)
ALWAYS = set(covering(AXES))
CASES = [
    pytest.param(*case, marks=() if case in ALWAYS else pytest.mark.slow, id="-".join(map(str, case)))
    for case in product(*AXES)
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("inputs")
    write_inputs(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOORING_CACHE", str(root / "cache"))
        yield root


@pytest.fixture(scope="module")
def undisturbed(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The run that nothing interrupts, once for each method and source."""
    known: dict[tuple[str, str], tuple[dict[str, Any], Ids]] = {}

    def of(method: str, source: str) -> tuple[dict[str, Any], Ids]:
        if (method, source) not in known:
            ids: Ids = {}
            config = make_config(inputs, tmp_path_factory.mktemp("whole") / "run", method, source)
            assert not run(config, ids)
            assert config.out is not None
            known[method, source] = outcome(config.out), ids
        return known[method, source]

    return of


def test_every_registered_method_is_here() -> None:
    assert set(METHODS) == set(REGISTERED)


def test_what_always_runs_covers_all_pairs() -> None:
    met = set().union(*(pairs(case) for case in ALWAYS))
    assert met == set().union(*(pairs(case) for case in product(*AXES)))
    assert len(ALWAYS) == len(METHODS) * len(POSITIONS)  # the fewest that can do it


@pytest.mark.parametrize(("method", "position", "source"), CASES)
def test_an_interrupted_run_is_the_undisturbed_one(
    method: str, position: str, source: str, inputs: Path, undisturbed: Any, tmp_path: Path
) -> None:
    wanted, ids = undisturbed(method, source)
    config = make_config(inputs, tmp_path / "run", method, source)
    assert interrupted_run(config, position) == ids
    assert assert_equal(wanted, outcome(tmp_path / "run")) > 100
