from __future__ import annotations

from dataclasses import dataclass

import pytest

from mooring.state.retention import Retention


@dataclass(frozen=True)
class Ref:
    step: int
    score: tuple[float, float] | None = None


RUN = [Ref(60), Ref(50, (0.5, 1.0)), Ref(40), Ref(30, (0.7, 0.9)), Ref(20), Ref(10, (0.7, 0.9))]


@pytest.mark.parametrize(
    ("rule", "steps"),
    [
        (Retention(), {60, 50}),
        (Retention(last=1), {60}),
        (Retention(last=99), {60, 50, 40, 30, 20, 10}),
        (Retention(last=1, best=1), {60, 10}),  # of equals the earlier one, as the best epoch is chosen
        (Retention(last=1, best=2), {60, 30, 10}),
        (Retention(last=2, best=9), {60, 50, 30, 10}),
        (Retention(last=1, every=20), {60, 40, 20}),
        (Retention(last=1, best=1, every=30), {60, 30, 10}),
        (Retention(last=0), {60}),  # the newest always stays
    ],
    ids=str,
)
def test_what_stays(rule: Retention, steps: set[int]) -> None:
    assert {RUN[i].step for i in rule.kept(RUN)} == steps


def test_a_loss_that_is_no_number_is_the_worst() -> None:
    refs = [Ref(30), Ref(20, (0.5, float("nan"))), Ref(10, (0.5, 9.0))]
    assert {refs[i].step for i in Retention(last=1, best=1).kept(refs)} == {30, 10}


def test_of_several_states_of_one_step_the_last_is_kept() -> None:
    refs = [Ref(30), Ref(20, (0.5, 1.0)), Ref(20)]
    assert Retention(last=1, every=20).kept(refs) == {0, 1}


def test_nothing_to_choose_from() -> None:
    assert Retention().kept([]) == set()
