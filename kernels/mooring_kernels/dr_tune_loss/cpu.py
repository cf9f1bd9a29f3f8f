"""The kernels of the block from the native module."""

from __future__ import annotations

from torch import Tensor

from mooring_kernels.bank_cross_entropy.cpu import softmax_cross_entropy_rows_
from mooring_kernels.calibrate.cpu import calibrate_translate_
from mooring_kernels.class_statistics.cpu import class_statistics_fwd
from mooring_kernels.dr_tune_loss.block import Kernels


def _translate_(
    frozen: Tensor, labels: Tensor, frozen_mean: Tensor, tuned_mean: Tensor, scale: Tensor, out: Tensor
) -> Tensor:
    return calibrate_translate_(frozen, labels, frozen_mean, tuned_mean, float(scale), out)


KERNELS = Kernels(class_statistics_fwd, _translate_, softmax_cross_entropy_rows_)
