"""Exit codes: which error ends a command how, and what a restart may mend."""

from __future__ import annotations

import signal

import pytest

from mooring.errors import ConfigError, DistributedError, RanksLostError, RunFolderError
from mooring.exit_codes import (
    CRASHED,
    DONE,
    HUNG,
    INTERRUPTED,
    LOST,
    PREEMPTED,
    USER_ERROR,
    gravest,
    would_come_again,
)


@pytest.mark.parametrize("error", [ConfigError, RunFolderError, DistributedError])
def test_what_a_user_must_put_right(error: type[ConfigError]) -> None:
    assert error("x").exit_code == USER_ERROR


def test_a_lost_rank_is_nobodys_fault_here() -> None:
    assert RanksLostError("x").exit_code == LOST


@pytest.mark.parametrize("code", [DONE, USER_ERROR, INTERRUPTED, 126, 127])
def test_would_come_again(code: int) -> None:
    assert would_come_again(code)


@pytest.mark.parametrize("code", [CRASHED, LOST, HUNG, PREEMPTED, -signal.SIGKILL, 128 + signal.SIGKILL])
def test_may_be_mended(code: int) -> None:
    assert not would_come_again(code)


@pytest.mark.parametrize(
    ("codes", "told"),
    [
        ([0, 0], DONE),
        ([1], CRASHED),
        ([LOST, 1], LOST),
        ([LOST, USER_ERROR, 1], USER_ERROR),
        ([HUNG, LOST, 1], HUNG),
        ([LOST, 137, 1], 137),
        ([PREEMPTED, 1], PREEMPTED),
    ],
)
def test_the_cause_comes_before_what_it_brings_about(codes: list[int], told: int) -> None:
    assert gravest(codes) == told
