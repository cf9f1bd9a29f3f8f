"""What is known about a step whose loss or gradient is not finite."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from mooring.data.batch import Batch
from mooring.errors import MooringError
from mooring.methods.base import StepOutput
from mooring.train.health.nonfinite import Verdict

_MOST_NAMES = 40


class NonFiniteError(MooringError):
    """A step's loss or gradient is not finite; the weights are those from before it.

    Attributes:
        diagnosis: what is known about the step, as the run folder's ``diagnosis.json`` holds it.
    """

    def __init__(self, message: str, diagnosis: Mapping[str, Any]) -> None:
        super().__init__(message)
        self.diagnosis = dict(diagnosis)


def diagnose(
    step: int,
    epoch: int,
    outputs: Sequence[StepOutput],
    batches: Sequence[Batch],
    verdict: Verdict,
    optimizer: Optimizer,
    names: Mapping[int, str],
) -> dict[str, Any]:
    """The facts of a bad step; waits for the device.

    Args:
        step, epoch: where it happened.
        outputs, batches: of its micro-batches.
        verdict: of the step.
        optimizer: for learning rates and roles.
        names: ``id(parameter)`` -> name.

    Returns:
        JSON-able values: manifest ids of the images, loss terms of each micro-batch, parameters with a gradient that is
        not finite (in the order of the network), gradient norms and largest weights by parameter group.
    """
    norms = dict(zip((id(p) for p in verdict.parameters), verdict.norms.tolist(), strict=True))
    bad = [names[key] for key, norm in norms.items() if not math.isfinite(norm)]
    order = {name: place for place, name in enumerate(names.values())}
    return {
        "step": step,
        "epoch": epoch,
        "ids": [batch.ids.tolist() for batch in batches],
        "images that are not finite": [
            batch.ids[~batch.images.isfinite().flatten(1).all(1)].tolist() for batch in batches
        ],
        "losses": [
            {
                name: float(value)
                for name, value in output.metrics.items()
                if name == "loss" or name.startswith("loss_")
            }
            for output in outputs
        ],
        "logits that are not finite": [
            batch.ids[~output.logits.detach().isfinite().all(1)[: len(batch.ids)]].tolist()
            for output, batch in zip(outputs, batches, strict=True)
        ],
        "gradients that are not finite": sorted(bad, key=lambda name: order[name])[:_MOST_NAMES],
        "how many": f"{len(bad)} of {len(norms)} parameters",
        "groups": [_group(group, norms) for group in optimizer.param_groups],
    }


def _group(group: Mapping[str, Any], norms: Mapping[int, float]) -> dict[str, Any]:
    parameters: list[nn.Parameter] = group["params"]
    known = [norms[id(p)] for p in parameters if id(p) in norms]
    finite = [norm for norm in known if math.isfinite(norm)]
    with torch.no_grad():
        here = [p.detach().abs().max().float() for p in parameters if p.numel()]
        # of what lies on this rank, where parameters are divided, and that may be nothing
        largest = torch.stack(here).max() if here else torch.tensor(0.0)
    return {
        "role": group.get("role"),
        "lr": float(group["lr"]),
        "gradient norm": math.sqrt(sum(norm * norm for norm in finite)),
        "largest weight": float(largest),
        "parameters": len(parameters),
        "not finite": len(known) - len(finite),
    }


def explain(diagnosis: Mapping[str, Any]) -> str:
    """One sentence for the user: what was not finite, where it seems to begin, what to try."""
    terms = sorted(
        {name for losses in diagnosis["losses"] for name, value in losses.items() if not math.isfinite(value)}
    )
    images = [i for ids in diagnosis["images that are not finite"] for i in ids]
    lr = diagnosis["groups"][0]["lr"] if diagnosis["groups"] else 0.0
    if images:
        cause = f"images {images[:5]} hold values that are not finite: look at these files"
    elif terms:
        parts = [name for name in terms if name != "loss"]
        cause = f"the loss is not finite{' in its part ' + ', '.join(parts) if parts else ''}"
    else:
        named = diagnosis["gradients that are not finite"]
        cause = f"the gradient is not finite in {diagnosis['how many']}" + (
            f", first {named[0]}" if named else ""
        )
    return (
        f"step {diagnosis['step']}: {cause}. The step was not taken: weights, moments and banks are from before it. "
        f"Try a lower optimizer.lr (now {lr:.2g}), train.clip_grad_norm=1 or train.precision=fp32; "
        "health.nonfinite=skip leaves such steps out"
    )
