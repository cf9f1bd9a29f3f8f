"""A loss or gradient that is not finite never reaches the weights.

The flag is computed on the device after the backward pass. torch's fused optimizers get it as ``found_inf`` and then
leave parameters and moments alone, so the host need not know before the step: it learns it from a copy that arrives
while the optimizer's kernels run, before anything else is done with the step. Other optimizers wait for it first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

if TYPE_CHECKING:
    from mooring.train.backend import Backend


@dataclass(slots=True)
class Verdict:
    """Whether a step is bad, on its way to the host.

    Attributes:
        flag: fp32 scalar on the device, 1 where the loss or a gradient is not finite, on any rank.
        norms: [P] fp32, L2 norm of each gradient, before clipping; [1], of all, where they are divided.
        parameters: the P parameters that have one; empty where they are divided.
    """

    flag: Tensor
    norms: Tensor
    parameters: Sequence[nn.Parameter]
    _host: Tensor
    _arrived: torch.cuda.Event | None

    def is_bad(self) -> bool:
        """The flag; waits until it has arrived, not for the device."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return bool(self._host.item() != 0)


def judge(
    loss: Tensor,
    parameters: Sequence[nn.Parameter],
    norms: Tensor,
    shared: Callable[[Tensor], Tensor] = lambda flag: flag,
) -> Verdict:
    """Looks at a step's loss and gradients; nothing waits.

    Args:
        loss: scalar of the step.
        parameters: those that have a gradient.
        norms: [P] fp32, the L2 norm of each one's, or [1], of all together.
        shared: makes of a flag the largest one over the ranks, in place or not.
    """
    loss = loss.detach().float().reshape(())
    # 0 times anything finite is 0: a sum of large finite norms may overflow, a sum of zeros may not
    flag = shared((~((norms * 0).sum() + loss * 0).isfinite()).float())
    if flag.device.type != "cuda":
        return Verdict(flag, norms, parameters, flag, None)
    host = torch.empty((), pin_memory=True)
    host.copy_(flag, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return Verdict(flag, norms, parameters, host, arrived)


def take_step(verdict: Verdict, backend: Backend, optimizer: Optimizer) -> bool:
    """Takes the optimizer's step unless it is bad; the gradients are gone either way.

    Args:
        verdict: of the step; gets the gradients' norms where it has only that of all together.
        backend: of the run.
        optimizer: that the backend steps.

    Returns:
        Whether it was taken. Where it was not, parameters and optimizer state are bit for bit as before.
    """
    # the mark of torch's fused optimizers: they look at the flag on the device. DeepSpeed's step reads norms on the
    # host anyway, and what is divided can only be looked at before it
    if getattr(optimizer, "_step_supports_amp_scaling", False) and not backend.divided:
        optimizer.found_inf = verdict.flag  # type: ignore[attr-defined]
        optimizer.grad_scale = None  # type: ignore[attr-defined]
        try:
            backend.step()
        finally:
            del optimizer.found_inf, optimizer.grad_scale  # type: ignore[attr-defined]
        return not verdict.is_bad()
    if verdict.is_bad():
        if backend.divided:
            verdict.parameters, verdict.norms = backend.gradient_norms()
        backend.discard()
        return False
    backend.step()
    return True
