"""Kernels of Mooring, usable without the engine: one public function per op, each with four implementations.

``impl="auto"`` takes Triton for CUDA tensors, the C++ kernels for CPU tensors, and the reference (plain
torch operations, float64-capable) where neither applies.
"""

# torch first: its OpenMP runtime must be the one in the process when the native module is loaded.
import torch  # noqa: F401

from mooring_kernels.bank_cross_entropy.op import bank_cross_entropy
from mooring_kernels.batchnorm_statistics.op import batchnorm_statistics
from mooring_kernels.calibrate.op import calibrate
from mooring_kernels.channel_attention.op import channel_attention
from mooring_kernels.class_ring_push.op import class_ring_push_
from mooring_kernels.class_statistics.op import class_statistics
from mooring_kernels.concept_boxes.op import concept_boxes
from mooring_kernels.convert_batchnorm.op import convert_batchnorm_
from mooring_kernels.dr_tune_loss.op import dr_tune_loss
from mooring_kernels.ema.op import ema_
from mooring_kernels.l2_sp.op import l2_sp
from mooring_kernels.patch_match_info_nce.op import patch_match_info_nce
from mooring_kernels.procrustes_rotation.op import procrustes_rotation
from mooring_kernels.queue_info_nce.op import queue_info_nce
from mooring_kernels.ring_push.op import ring_push_
from mooring_kernels.row_normalise.op import row_normalise
from mooring_kernels.runtime.dispatch import Impl
from mooring_kernels.runtime.native import cpu_capability
from mooring_kernels.text_supervised_loss.op import text_supervised_loss
from mooring_kernels.two_head_cross_entropy.op import two_head_cross_entropy

__all__ = [
    "Impl",
    "bank_cross_entropy",
    "batchnorm_statistics",
    "calibrate",
    "channel_attention",
    "class_ring_push_",
    "class_statistics",
    "concept_boxes",
    "convert_batchnorm_",
    "cpu_capability",
    "dr_tune_loss",
    "ema_",
    "l2_sp",
    "patch_match_info_nce",
    "procrustes_rotation",
    "queue_info_nce",
    "ring_push_",
    "row_normalise",
    "text_supervised_loss",
    "two_head_cross_entropy",
]
