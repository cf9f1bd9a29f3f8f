"""The short way to an op outside torch.compile: its functions, without the dispatcher of torch.library.

A call through torch.library.custom_op with its backward costs some 150 microseconds of Python: more than the work
at a few hundred classes. A torch.autograd.Function over the same functions costs a fraction of it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def runs_eagerly(*tensors: Tensor) -> bool:
    """Whether these are ordinary tensors in ordinary Python: nothing traces them and none is a stand-in."""
    return not torch.compiler.is_compiling() and all(
        type(tensor) in (Tensor, torch.nn.Parameter) for tensor in tensors
    )


def wants_gradient(*tensors: Tensor) -> bool:
    """Whether autograd has to hear of a call on these tensors."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
