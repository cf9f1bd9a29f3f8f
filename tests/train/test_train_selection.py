"""Which epoch counts as the best one."""

from __future__ import annotations

import torch

from mooring.train.evaluate import EvalResult
from mooring.train.selection import BestEpoch


def result(top1: float, nll: float) -> EvalResult:
    return EvalResult(top1, 1.0, top1, 0.0, nll, 10, torch.zeros(2, 2, dtype=torch.int64))


def test_higher_top1_wins_and_equal_top1_goes_by_the_lower_loss() -> None:
    best = BestEpoch()
    taken = [
        best.offer(epoch, result(*pair))
        for epoch, pair in enumerate([(0.5, 1.0), (0.5, 0.9), (0.5, 0.9), (0.4, 0.1), (0.6, 2.0)])
    ]
    assert taken == [True, True, False, False, True]
    assert best.epoch == 4


def test_a_first_epoch_with_a_broken_loss_is_still_an_epoch_and_the_next_good_one_replaces_it() -> None:
    best = BestEpoch()
    assert best.offer(0, result(0.1, float("nan")))
    assert best.offer(1, result(0.2, 1.0)) and best.epoch == 1


def test_state_round_trips() -> None:
    best, other = BestEpoch(), BestEpoch()
    best.offer(3, result(0.7, 0.2))
    other.load_state_dict(best.state_dict())
    assert other == best
