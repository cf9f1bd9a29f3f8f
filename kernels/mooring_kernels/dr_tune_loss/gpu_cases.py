"""Launches of dr_tune_loss that are compiled ahead of time: its kernels in combinations their own ops never ask for.

The frozen rows may be fp32 beside bf16 tuned ones (rotated by the op or kept rotated by the caller), and where the
head is rotated the tuned means begin C rows into a product, so not on 16 bytes at an odd width.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from mooring_kernels.dr_tune_loss.block import dr_tune_block
from mooring_kernels.dr_tune_loss.gpu import KERNELS
from mooring_kernels.runtime.launch_cases import Case, bank_shapes


def cases() -> Iterator[Case]:
    """A step at every shape and dtype of bank in use, with a rotation and with kept rotated rows."""
    for name, rows, width, classes, dtype in bank_shapes():
        tuned, labels = torch.zeros(rows, width, dtype=dtype), torch.zeros(rows, dtype=torch.int64)
        yield f"{name}-rotated", partial(_step, tuned, tuned, labels, classes, torch.zeros(width, width))
        yield f"{name}-kept", partial(_step, tuned.float(), tuned, labels, classes, None)


def _step(frozen: Tensor, tuned: Tensor, labels: Tensor, classes: int, rotation: Tensor | None) -> None:
    width = tuned.shape[1]
    dr_tune_block(
        torch.zeros(64, width),
        labels[:64],
        frozen,
        tuned,
        labels,
        torch.zeros(classes, width),
        torch.zeros(classes),
        rotation,
        torch.ones(()),
        cga_scale=1.0,
        label_smoothing=0.0,
        keep_logits=False,
        needs=[False, False, False],  # fewer products to pay for; bank_cross_entropy's cases have both
        kernels=KERNELS,
    )
