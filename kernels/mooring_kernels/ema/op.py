"""Exponential moving average of a list of tensors: checks and dispatch. No gradient passes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from mooring_kernels.ema import reference
from mooring_kernels.runtime.checks import require_one_device
from mooring_kernels.runtime.dispatch import Impl, choose

_COARSE = (torch.bfloat16, torch.float16)


def ema_(
    targets: Sequence[Tensor],
    sources: Sequence[Tensor],
    momentum: float | Tensor,
    *,
    allow_low_precision: bool = False,
    impl: Impl = "auto",
) -> None:
    """``t <- m t + (1 - m) s`` for every pair, in place; integer and bool targets become copies of their sources.

    Computed in fp32 (float64 for a float64 target) as ``t + (1 - m) (s - t)``: m = 1 leaves the targets and m = 0
    copies the sources, bit for bit. A bf16 source enters unrounded.

    Args:
        targets: any shapes; float32 or float64, integer or bool. They may be views of one buffer (a flat shard),
            but no two may share memory: each would be moved twice. Tied weights belong in the list once.
        sources: one tensor of the same shape per target, on its device; floating-point where the target is.
        momentum: m in [0, 1]; a 0-d tensor may lie on the targets' device, and nothing then waits for it.
        allow_low_precision: take bf16 and fp16 targets all the same. At m = 0.999 the step is a thousandth of the
            distance, and half a spacing of bf16 is a 256th of the value or more: such a target never moves.
        impl: ``"native"``: torch's multi-tensor lerp for equal dtypes, which runs at the copy rate, C++ for
            bf16 sources. ``"triton"`` names the multi-tensor lerp on the device.

    Raises:
        ValueError, TypeError: lists, shapes, dtypes, devices or ``momentum`` do not fit, with the index in the list.

    Source: arXiv 1911.05722, eq. 2 (momentum encoder).
    Cost: reads targets and sources once, writes targets once; 3 FLOP per value.
    """
    op = "ema_"
    _require_pairs(op, targets, sources, allow_low_precision)
    if isinstance(momentum, Tensor):
        if momentum.dim() != 0 or not momentum.is_floating_point():
            raise ValueError(
                f"{op}: momentum must be a number or a 0-d floating-point tensor; got {list(momentum.shape)} "
                f"{momentum.dtype}"
            )
    elif not 0 <= momentum <= 1:
        raise ValueError(f"{op}: momentum must be in [0, 1]; got {momentum}")
    if not targets:
        return
    moved, followed = [t.detach() for t in targets], [s.detach() for s in sources]
    # float64 keeps 1 - m exact; each implementation rounds it once
    share = momentum.detach().double() if isinstance(momentum, Tensor) else _as_tensor(momentum)
    if isinstance(momentum, Tensor) and share.device.type != "cpu":
        require_one_device(op, targets=moved[0], momentum=share)
    floats = [t for t in (*moved, *followed) if t.is_floating_point()]
    # the targets' other dtypes are torch's to handle: only the device and the installed parts decide
    chosen = choose(op, impl, *(t.new_empty(0, dtype=torch.float32) for t in (floats or moved)[:1]))
    _forward(moved, followed, share, chosen)


def _as_tensor(momentum: float) -> Tensor:
    return torch.full((), momentum, dtype=torch.float64)


def _require_pairs(
    op: str, targets: Sequence[Tensor], sources: Sequence[Tensor], allow_low_precision: bool
) -> None:
    if len(targets) != len(sources):
        raise ValueError(
            f"{op}: targets and sources must be equally many; got {len(targets)} and {len(sources)}"
        )
    for number, (target, source) in enumerate(zip(targets, sources, strict=True)):
        if target.shape != source.shape:
            raise ValueError(
                f"{op}: sources[{number}] must be {list(target.shape)} as its target; got {list(source.shape)}"
            )
        if target.device != source.device or target.device != targets[0].device:
            require_one_device(
                op,
                **{
                    "targets[0]": targets[0],
                    f"targets[{number}]": target,
                    f"sources[{number}]": source,
                },
            )
        if target.dtype in _COARSE and not allow_low_precision:
            raise TypeError(
                f"{op}: targets[{number}] must be float32; got {target.dtype}: at momentum 0.999 the step is below "
                "half a spacing of its numbers and the average never moves; keep it in float32, or pass "
                "allow_low_precision=True"
            )
        if target.is_complex() or source.is_complex():
            raise TypeError(f"{op}: targets[{number}] and its source must be real; got {target.dtype}")
        if target.is_floating_point() != source.is_floating_point():
            raise TypeError(
                f"{op}: targets[{number}] and its source must both be floating-point or both not; "
                f"got {target.dtype} and {source.dtype}"
            )


def require_apart(op: str, targets: Sequence[Tensor]) -> None:
    """No two contiguous targets share memory: they would be updated twice, at once on several threads.

    Raises:
        ValueError: two do; both are named by index.
    """
    spans = sorted(
        (t.data_ptr(), t.data_ptr() + t.numel() * t.element_size(), number)
        for number, t in enumerate(targets)
        if t.numel() and t.is_contiguous()
    )
    for (_, end, first), (begin, _, second) in pairwise(spans):
        if begin < end:
            first, second = sorted((first, second))
            raise ValueError(
                f"{op}: targets[{first}] and targets[{second}] share memory: list tied weights once"
            )


@torch.library.custom_op("mooring::ema", mutates_args=("targets",))
def _forward(targets: list[Tensor], sources: list[Tensor], momentum: Tensor, impl: str) -> None:
    require_apart("ema_", targets)
    if impl == "reference":
        reference.ema(targets, sources, momentum if momentum.is_cuda else float(momentum))
        return
    floats = [pair for pair in zip(targets, sources, strict=True) if pair[0].is_floating_point()]
    for target, source in zip(targets, sources, strict=True):
        if not target.is_floating_point():
            target.copy_(source)
    moved, followed = [t for t, _ in floats], [s for _, s in floats]
    # a momentum that already lies on the device stays there
    weight: float | Tensor = 1.0 - (float(momentum) if momentum.device.type == "cpu" else momentum)
    if impl == "native":
        from mooring_kernels.ema import cpu

        cpu.ema_fwd(moved, followed, float(weight))
    else:
        reference.ema_step(moved, followed, weight)


@_forward.register_fake
def _(targets: list[Tensor], sources: list[Tensor], momentum: Tensor, impl: str) -> None:
    return None
