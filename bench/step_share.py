"""What a kernel's gain is of a whole training step: computed from records, never timed here.

    saved share = calls per step * (best baseline - ours) / (rest of the step + calls per step * best baseline)

The rest is put together from the two parts that ``bench.training_step`` has recorded in the same environment at the
same number of threads.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from bench.comparison import Comparison
from bench.records import Record, deciding_seconds, threads_of

TRAINING_STEP = "training_step"
_VIT_WIDTH, _BATCH = 768, 64  # of ViT-B/16's features; of the recorded steps


@dataclass(frozen=True)
class Step:
    """Passes through the encoder over one batch of 224-pixel images: trained, and forward only."""

    trained: float
    forward: float


STEPS = {
    "fine_tune": Step(1, 0),  # TeS, DAFT, L2-SP: nothing but the network itself
    "dr_tune": Step(1, 1),  # and the frozen encoder
    "bi_tuning": Step(1, 1),  # and the momentum encoder
    "soft": Step(2, 0),  # as many source images as target images
    # one view per side; nine crops of 64 pixels cost 0.73 of an image, in both networks
    "concept_tuning": Step(1.73, 1.73),
}


def _letter(size: str, letter: str, otherwise: int) -> int:
    found = re.search(rf"\b{letter}(\d+)", size)
    return int(found[1]) if found else otherwise


def encoder_of(size: str) -> str:
    """ViT-B where D is as wide as its features, else ResNet-50."""
    return "vit_base" if _letter(size, "D", 0) == _VIT_WIDTH else "resnet50"


class StepShares:
    """Training steps of all environments, from the newest records."""

    def __init__(self, newest: Iterable[Record]) -> None:
        self._parts = {
            (r["environment"], threads_of(r), r["candidate"], r["pass"]): deciding_seconds(r)["p50"]
            for r in newest
            if r["op"] == TRAINING_STEP
        }

    def rest(self, record: Record) -> float | None:
        """Seconds of the step that the op of ``record`` is part of, without the op; None: not measured."""
        step = STEPS.get(record.get("step", "dr_tune"))
        where = record["environment"], threads_of(record), encoder_of(record["size"])
        train, forward = (self._parts.get((*where, part)) for part in ("train", "forward"))
        if step is None or train is None or forward is None:
            return None
        images = _letter(record["size"], "B", _BATCH) / _BATCH
        return images * (step.trained * train + step.forward * forward)

    def saved(self, comparison: Comparison) -> float | None:
        """Share of the step that ours saves over the best baseline; negative where ours is slower."""
        ours, baseline = comparison.ours, comparison.best_baseline
        if ours is None or baseline is None or comparison.small:
            return None
        rest = self.rest(ours)
        if rest is None:
            return None
        calls = float(ours.get("calls_per_step", 1.0))
        mine, theirs = (deciding_seconds(record)["p50"] for record in (ours, baseline))
        return calls * (theirs - mine) / (rest + calls * theirs)
