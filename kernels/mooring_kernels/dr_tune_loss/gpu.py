"""The kernels of the block in Triton; each is its own op's."""

from __future__ import annotations

from mooring_kernels.bank_cross_entropy.gpu import softmax_cross_entropy_rows_
from mooring_kernels.calibrate.gpu import calibrate_translate_
from mooring_kernels.class_statistics.gpu import class_statistics_fwd
from mooring_kernels.dr_tune_loss.block import Kernels

KERNELS = Kernels(class_statistics_fwd, calibrate_translate_, softmax_cross_entropy_rows_)
