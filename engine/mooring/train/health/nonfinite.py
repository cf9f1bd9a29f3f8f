"""A loss or gradient that is not finite never reaches the weights.

The flag is computed on the device after the backward pass. torch's fused optimizers get it as ``found_inf`` and then
leave parameters and moments alone, so the host need not know before the step: it learns it from a copy that arrives
while the optimizer's kernels run, before anything else is done with the step. Other optimizers wait for it first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


@dataclass(slots=True)
class Verdict:
    """Whether a step is bad, on its way to the host.

    Attributes:
        flag: fp32 scalar on the device, 1 where the loss or a gradient is not finite, on any rank.
        norms: [P] fp32, L2 norm of each gradient, before clipping.
        parameters: the P parameters that have one.
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
    loss: Tensor, optimizer: Optimizer, shared: Callable[[Tensor], Tensor] = lambda flag: flag
) -> Verdict:
    """Looks at a step's loss and gradients; nothing waits.

    Args:
        loss: scalar of the step.
        optimizer: its parameters are looked at, as far as they have a gradient.
        shared: makes of a flag the largest one over the ranks, in place or not.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    loss = loss.detach().float().reshape(())
    norms = loss.new_zeros(0)
    if parameters:
        gradients = [p.grad for p in parameters if p.grad is not None]
        norms = torch.stack([norm.float() for norm in torch._foreach_norm(gradients)])
    # 0 times anything finite is 0: a sum of large finite norms may overflow, a sum of zeros may not
    flag = shared((~((norms * 0).sum() + loss * 0).isfinite()).float())
    if flag.device.type != "cuda":
        return Verdict(flag, norms, parameters, flag, None)
    host = torch.empty((), pin_memory=True)
    host.copy_(flag, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return Verdict(flag, norms, parameters, host, arrived)


def take_step(verdict: Verdict, optimizer: Optimizer, step: Callable[[], None]) -> bool:
    """Takes the optimizer's step unless it is bad; the gradients are gone either way.

    Args:
        step: applies and clears the gradients.

    Returns:
        Whether it was taken. Where it was not, parameters and optimizer state are bit for bit as before.
    """
    # the mark of torch's fused optimizers: they look at the flag on the device
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.found_inf = verdict.flag  # type: ignore[attr-defined]
        optimizer.grad_scale = None  # type: ignore[attr-defined]
        try:
            step()
        finally:
            del optimizer.found_inf, optimizer.grad_scale  # type: ignore[attr-defined]
        return not verdict.is_bad()
    if verdict.is_bad():
        optimizer.zero_grad(set_to_none=True)
        return False
    step()
    return True
