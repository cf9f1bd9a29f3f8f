"""The weight of the source loss over a run, and how many source images it is worth."""

from __future__ import annotations

import math

from mooring.config.soft_settings import SoftFineTuningSettings
from mooring.methods.base import At

_BUCKET = 8  # sizes of the source batch: few enough for a captured step


def source_weight(settings: SoftFineTuningSettings, at: At) -> float:
    """w(t) of spec 3(c), a function of the step alone: the same on every rank and after a resume."""
    tau, w0 = _progress(settings, at), settings.w0
    match settings.soft_schedule:
        case "zero":
            return 0.0
        case "constant":
            return w0
        case "linear":
            return w0 * (1 - tau)
        case "cosine":  # sin^2 ((1 - tau) pi / 2): exactly 0 at the end
            return w0 * math.sin((1 - tau) * math.pi / 2) ** 2
        case "poly":
            return w0 * (1 - tau) ** settings.soft_power
        case "exp":
            end = math.exp(-5)
            return w0 * (math.exp(-5 * tau) - end) / (1 - end)
        case "step":
            return w0 if tau < settings.soft_until else 0.0


def _progress(settings: SoftFineTuningSettings, at: At) -> float:
    """tau, in [0, 1]: the share of the fall that is done."""
    if settings.soft_granularity == "epoch":
        done, whole = at.epoch, math.ceil(at.total_steps / at.steps_per_epoch) - 1
        if whole == 0:
            return 0.0  # the only epoch of a run: its weight is the first one
    else:
        done, whole = at.step, at.total_steps
    return min(1.0, done / (settings.soft_fraction * whole))


def source_batch_rows(settings: SoftFineTuningSettings, weight: float, batch: int) -> int:
    """Source images of a step: ``min(B_S, ceil(w B_S))`` in eights, or B_S where the batch does not shrink.

    Args:
        weight: w(t).
        batch: B_S.
    """
    if weight <= 0:
        return 0
    if not settings.source_shrink:
        return batch
    rows = math.ceil(weight * batch - 1e-9)  # a product like 0.1 * 30 is a hair above its whole number
    return min(batch, -(-rows // _BUCKET) * _BUCKET)
