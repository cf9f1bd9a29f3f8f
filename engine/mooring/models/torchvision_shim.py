"""Lets torchvision, and with it timm and torchmetrics, import beside a CPU build of torch.

torchvision's wheels on the package index link CUDA libraries. Beside a CPU torch its native library
does not load, so its operators are never declared, and ``import torchvision`` fails where it registers
the shape functions of two of them. Declaring just those two lets the Python part import. Transforms and
feature extraction then work; ``torchvision.ops.nms``, ``roi_align`` and ``torchvision.io`` need the
native library and raise torchvision's own "Couldn't load custom C++ ops".
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import torch

_UNGUARDED_OPERATORS = ("nms", "qnms")
_declared: list[torch.library.Library] = []  # a Library that is collected takes its operators with it


def import_torchvision() -> ModuleType:
    """Imports torchvision; does nothing else where it imports by itself.

    Raises:
        RuntimeError: torchvision fails for another reason than the missing operators of a CPU torch.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as err:
        # Beside a CUDA torch the same message means a version mismatch, which must not be hidden.
        if "operator torchvision::" not in str(err) or torch.version.cuda is not None:
            raise
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]  # the halves left behind by the failed import
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in _UNGUARDED_OPERATORS:
        if not hasattr(torch.ops.torchvision, operator):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.append(library)
    return importlib.import_module("torchvision")


def import_timm() -> ModuleType:
    """Imports timm, which imports torchvision unconditionally."""
    import_torchvision()
    return importlib.import_module("timm")
