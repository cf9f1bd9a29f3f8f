"""What the engine returns: a plan before the run, a result per step, a result at the end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from mooring.train.distortion import Distortion
from mooring.train.evaluate import EvalResult


@dataclass(frozen=True, slots=True)
class RunPlan:
    """What a run will do, known before it starts (``mooring train --dry-run``)."""

    train_images: int
    val_images: int
    test_images: int
    classes: int
    steps_per_epoch: int
    total_steps: int
    feature_dim: int
    parameters: int
    trainable_parameters: int
    model: str
    method: str
    device: str
    precision: str
    source: str
    lr: float
    head_lr: float


@dataclass(frozen=True, slots=True)
class StepResult:
    """One optimizer step. Tensors stay on the device: reading one waits for it.

    Attributes:
        step: index of the step that was done.
        loss: scalar, mean over the micro-batches.
        metrics: sums over the micro-batches of what the method reports, except ``loss`` (mean).
        logits: [B, C] of the last micro-batch, detached.
        lr: backbone learning rate of the step.
        skipped: what was wrong with a step that was left out (``health.nonfinite=skip``), as ``diagnosis.json`` has
            it; such a step reports no metrics.
    """

    step: int
    loss: Tensor
    metrics: Mapping[str, Tensor]
    logits: Tensor
    lr: float
    skipped: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class RunResult:
    """The end of a run.

    Attributes:
        run: the run folder.
        best_epoch: epoch with the best validation top-1 (the earlier one of equals, the lower loss first).
        val: validation result of that epoch.
        test: its result on the test split, evaluated once, where there is one.
        images_per_second: training images over the time spent in training steps, waiting for data included.
        seconds: whole run, evaluation included.
        extra_tests: its result on each ``data.extra_test``, by name.
        distortion: how far its features are from the pretrained ones, by evaluated set (``val``, ``test``,
            ``test/NAME``), where ``report.distortion``.
        discrimination: what the encoder tells apart beyond the run's classes, ``pretrained`` and ``selected``, where
            ``report.discrimination``; every epoch's is in the log.
        test_looks: how often the test split (``test``) and each further set (``test/NAME``) were looked at: once,
            unless a finished run was continued and selected other weights.
        interrupted: it was stopped; everything up to the last finished step is kept.
        preempted: it was stopped by SIGTERM or SIGUSR1: whoever sent it wants it to be continued later.
    """

    run: Path
    best_epoch: int | None
    val: EvalResult | None
    test: EvalResult | None
    images_per_second: float
    seconds: float
    interrupted: bool = False
    extra_tests: Mapping[str, EvalResult] = field(default_factory=dict)
    distortion: Mapping[str, Distortion] = field(default_factory=dict)
    discrimination: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    preempted: bool = False
    test_looks: Mapping[str, int] = field(default_factory=dict)

    def rows(self) -> dict[str, dict[str, float]]:
        """All numbers by evaluated set: ``val``, ``test``, ``test/NAME``."""
        measured = {"val": self.val, "test": self.test}
        measured |= {f"test/{name}": result for name, result in self.extra_tests.items()}
        return {
            name: result.scalars() | (self.distortion[name].scalars() if name in self.distortion else {})
            for name, result in measured.items()
            if result is not None
        }
