"""Learning rate over the run: a pure function of the optimizer step."""

from __future__ import annotations

import math

from torch.optim import Optimizer

from mooring.config.schema import ScheduleSettings


def warmup_steps(settings: ScheduleSettings, total_steps: int, steps_per_epoch: int) -> int:
    """Steps of the linear warm-up, at most one less than the run has."""
    return min(round(settings.warmup_epochs * steps_per_epoch), max(0, total_steps - 1))


def lr_factor(step: int, settings: ScheduleSettings, total_steps: int, steps_per_epoch: int) -> float:
    """Learning rate over its peak at optimizer step ``step``.

    Warm-up of W steps: ``(step + 1) / (W + 1)``, so the peak is reached at step W and no step is wasted at
    zero. After it, with ``t = (step - W) / (total_steps - W)`` and the final ratio r:

    - cosine: ``r + (1 - r) (1 + cos(pi t)) / 2``
    - linear: ``1 - (1 - r) t``
    - step: ``gamma ** k``, k the number of milestones (shares of the whole run) that are passed
    - constant: 1

    r is reached at ``step == total_steps``, right after the last step that is taken.

    Args:
        step: from 0; values past the end give the last factor.
        settings: the schedule.
        total_steps, steps_per_epoch: optimizer steps.
    """
    warmup = warmup_steps(settings, total_steps, steps_per_epoch)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    if settings.name == "cosine":
        return settings.final_ratio + (1 - settings.final_ratio) * (1 + math.cos(math.pi * progress)) / 2
    if settings.name == "linear":
        return 1 - (1 - settings.final_ratio) * progress
    if settings.name == "step":
        return settings.gamma ** sum(step >= round(share * total_steps) for share in settings.milestones)
    return 1.0


class Schedule:
    """Sets each group's learning rate from its peak. Keeps no state: a resumed run asks for its own step.

    Args:
        optimizer: the rates its groups have now are the peaks; they are kept in the groups as
            ``initial_lr``, and found there after the optimizer's state was loaded.
        settings: the schedule.
        total_steps, steps_per_epoch: optimizer steps.
    """

    def __init__(
        self, optimizer: Optimizer, settings: ScheduleSettings, total_steps: int, steps_per_epoch: int
    ) -> None:
        self.optimizer = optimizer
        self.settings = settings
        self.total_steps = total_steps
        self.steps_per_epoch = steps_per_epoch
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])

    def factor(self, step: int) -> float:
        """Learning rate over its peak at ``step``."""
        return lr_factor(step, self.settings, self.total_steps, self.steps_per_epoch)

    def set(self, step: int) -> float:
        """Sets the rates for optimizer step ``step`` (from 0), before it is taken; returns the factor."""
        factor = self.factor(step)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        return factor
