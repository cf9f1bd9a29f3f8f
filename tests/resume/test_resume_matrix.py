"""Every method, place of interruption, source and number of processes: n steps, a resume and n more are 2n steps.

A pairwise covering part runs always, all of it in ``make test-full``.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, product
from typing import Any

import pytest
from ranks import RankPool
from resume_cases import METHODS, POSITIONS, case, write_inputs

from mooring.methods.registry import METHODS as REGISTERED

AXES: tuple[tuple[Any, ...], ...] = (tuple(METHODS), POSITIONS, ("torch", "dali"), (1, 2))
# Two undisturbed runs of each method are enough for all pairs: one with either source and number of processes.
_TWO_RUNS = ((("torch", 1), ("dali", 2)), (("dali", 1), ("torch", 2)))
ALWAYS = {
    (method, position, *_TWO_RUNS[m % 2][(p + m // 2) % 2])
    for (m, method), (p, position) in product(enumerate(METHODS), enumerate(POSITIONS))
}


def parameters() -> Iterator[Any]:
    # cases of one method, source and number of processes follow each other: they share its undisturbed run
    for method, source, world, position in product(AXES[0], AXES[2], AXES[3], AXES[1]):
        marks = () if (method, position, source, world) in ALWAYS else pytest.mark.slow
        yield pytest.param(
            method, position, source, world, marks=marks, id=f"{method}-{position}-{source}-{world}"
        )


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:  # before the ranks start: they inherit it
        patch.setenv("MOORING_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[str, str]]:
    """Inputs and folder of the runs by number of processes."""
    found = {}
    for world in AXES[3]:
        inputs = tmp_path_factory.mktemp(f"inputs{world}")
        write_inputs(inputs, world=world)
        found[world] = str(inputs), str(tmp_path_factory.mktemp(f"runs{world}"))
    return found


def pairs(values: tuple[Any, ...]) -> set[Any]:
    """The pairs of values of two axes that meet in a case."""
    return {(i, values[i], j, values[j]) for i, j in combinations(range(len(values)), 2)}


def test_every_registered_method_is_here() -> None:
    assert set(METHODS) == set(REGISTERED)


def test_what_always_runs_covers_all_pairs() -> None:
    assert set().union(*map(pairs, ALWAYS)) == set().union(*map(pairs, product(*AXES)))
    assert len(ALWAYS) == len(METHODS) * len(POSITIONS)  # the fewest that can do it


@pytest.mark.parametrize(("method", "position", "source", "world"), list(parameters()))
def test_an_interrupted_run_is_the_undisturbed_one(
    method: str,
    position: str,
    source: str,
    world: int,
    places: dict[int, tuple[str, str]],
    request: pytest.FixtureRequest,
) -> None:
    inputs, folder = places[world]
    arguments = {"inputs": inputs, "folder": folder, "method": method, "source": source, "position": position}
    if world == 1:
        compared = [case(**arguments)]
    else:
        pool: RankPool = request.getfixturevalue("two_ranks")
        compared = pool.run("resume_cases:case", seconds=900, **arguments)
    assert len(compared) == world and min(compared) > 100


# where a probe rests, a bank, a conversion, a queue with a momentum encoder; parameters in many groups
DIVIDED = ("dr_tune", "fine_tune", "lp_ft", "daft", "bi_tuning")
DIVIDED_ALWAYS = {("dr_tune", "accumulation", 3), ("lp_ft", "mid_epoch", 1), ("bi_tuning", "validation", 3)}


@pytest.mark.parametrize(
    ("method", "position", "stage"),
    [
        pytest.param(*cell, marks=() if cell in DIVIDED_ALWAYS else pytest.mark.slow)
        for cell in product(DIVIDED, ("mid_epoch", "accumulation", "validation"), (1, 3))
    ],
)
def test_so_it_is_where_ranks_divide_the_state(
    method: str, position: str, stage: int, places: dict[int, tuple[str, str]], two_ranks: RankPool
) -> None:
    inputs, folder = places[2]
    arguments = {"inputs": inputs, "folder": folder, "method": method, "source": "torch"}
    compared = two_ranks.run("resume_cases:case", seconds=900, position=position, stage=stage, **arguments)
    assert min(compared) > 50
