from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mooring.config.schema import ScheduleSettings
from mooring.train.schedules import Schedule, lr_factor, warmup_steps

NAMES = ["cosine", "linear", "step", "constant"]


def settings(name: str = "cosine", **kwargs) -> ScheduleSettings:
    return ScheduleSettings(name=name, **kwargs)


@pytest.mark.parametrize("name", NAMES)
def test_warm_up_rises_to_the_peak_at_its_last_boundary(name: str) -> None:
    s = settings(name, warmup_epochs=2.0)
    factors = [lr_factor(step, s, 100, 5) for step in range(11)]
    assert factors == [(step + 1) / 11 for step in range(10)] + [1.0]


@pytest.mark.parametrize(
    ("name", "at"),
    [
        ("cosine", lambda t, r: r + (1 - r) * (1 + math.cos(math.pi * t)) / 2),
        ("linear", lambda t, r: 1 - (1 - r) * t),
        ("constant", lambda t, r: 1.0),
    ],
)
@pytest.mark.parametrize("final_ratio", [0.0, 0.1])
def test_after_the_warm_up(name: str, at, final_ratio: float) -> None:
    s = settings(name, warmup_epochs=1.0, final_ratio=final_ratio)
    for step in (10, 11, 35, 59, 60):
        expected = at((step - 10) / 50, final_ratio)
        assert lr_factor(step, s, 60, 10) == pytest.approx(expected, abs=1e-12)
    assert lr_factor(60, s, 60, 10) == pytest.approx(1.0 if name == "constant" else final_ratio, abs=1e-12)
    assert lr_factor(1000, s, 60, 10) == lr_factor(60, s, 60, 10)


def test_step_drops_exactly_at_its_milestones() -> None:
    s = settings("step", warmup_epochs=0, milestones=(0.5, 0.8), gamma=0.1)
    factors = [lr_factor(step, s, 10, 5) for step in range(10)]
    assert factors == pytest.approx([1.0] * 5 + [0.1] * 3 + [0.01] * 2)


@pytest.mark.parametrize(
    ("epochs", "total", "expected"), [(0, 10, 0), (0.5, 10, 2), (1, 10, 5), (9, 10, 9), (1, 1, 0)]
)
def test_warm_up_length(epochs: float, total: int, expected: int) -> None:
    assert warmup_steps(settings(warmup_epochs=epochs), total, 5) == expected


@given(
    name=st.sampled_from(NAMES),
    total=st.integers(1, 200),
    per_epoch=st.integers(1, 50),
    warmup=st.floats(0, 10),
    ratio=st.floats(0, 1),
)
def test_factors_are_positive_and_never_rise_after_the_peak(
    name: str, total: int, per_epoch: int, warmup: float, ratio: float
) -> None:
    s = settings(name, warmup_epochs=warmup, final_ratio=ratio)
    factors = [lr_factor(step, s, total, per_epoch) for step in range(total)]
    assert all(0 < f <= 1 for f in factors)
    start = warmup_steps(s, total, per_epoch)
    assert all(a < b for a, b in pairwise(factors[:start]))
    assert all(a >= b - 1e-12 for a, b in pairwise(factors[start:]))
    if name != "step":  # there a milestone may pass during the warm-up
        assert max(factors) == factors[start] == 1.0


def optimizer() -> torch.optim.Optimizer:
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (0.1, 3.3)]
    return torch.optim.SGD(groups, momentum=0.9)


def test_each_group_keeps_its_own_peak() -> None:
    opt = optimizer()
    schedule = Schedule(opt, settings(warmup_epochs=1), 40, 10)
    for step in (0, 9, 10, 25, 39):
        assert schedule.set(step) == schedule.factor(step)
        assert [g["lr"] for g in opt.param_groups] == [lr * schedule.factor(step) for lr in (0.1, 3.3)]


def test_a_resumed_run_has_the_same_rates() -> None:
    opt = optimizer()
    schedule = Schedule(opt, settings(), 40, 10)
    schedule.set(25)
    again = optimizer()
    resumed = Schedule(again, settings(), 40, 10)
    again.load_state_dict(opt.state_dict())
    resumed.set(26)
    schedule.set(26)
    assert [g["lr"] for g in again.param_groups] == [g["lr"] for g in opt.param_groups]
    # also when the schedule is made after the optimizer's state was loaded, at a lowered rate
    late = optimizer()
    late.load_state_dict(opt.state_dict())
    Schedule(late, settings(), 40, 10).set(26)
    assert [g["lr"] for g in late.param_groups] == [g["lr"] for g in opt.param_groups]
