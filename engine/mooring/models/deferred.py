"""Models whose pretrained parameters are read one by one, when each is divided among ranks: none holds them all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

# Of a file in half precision, matrices above this size stay in it until they are read; what conversions for a family
# compute with (position embeddings, patch kernels, tables) becomes fp32 before.
_MATRIX = 1 << 16


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules built inside have parameters without storage, and buffers as always.

    Random numbers are drawn as for the real parameters, one after the other, and thrown away: what is drawn later does
    not depend on how the model was loaded.
    """
    register = nn.Module.register_parameter

    def registered(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
        register(module, name, param)

    nn.Module.register_parameter = registered  # type: ignore[method-assign, assignment]
    try:
        with _DrawnAllTheSame():
            yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


class _DrawnAllTheSame(TorchDispatchMode):
    """What is drawn in place into tensors without storage moves the generator on as if they had one."""

    def __init__(self) -> None:
        super().__init__()
        self._scratch = Scratch(torch.device("cpu"))

    def _with_storage(self, value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_meta:
            return self._scratch.tensor(value.shape, value.dtype)
        return value

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        target = args[0] if args else None
        if (
            isinstance(target, Tensor)
            and target.is_meta
            and torch.Tag.nondeterministic_seeded in func.tags
            and func._schema.is_mutable
        ):
            real = tree_map(self._with_storage, (args, kwargs))
            func(*real[0], **real[1])
            return target
        return func(*args, **kwargs)


class Scratch:
    """Storage for one tensor at a time. Blocks that come and go beside others that stay would tear memory to pieces."""

    def __init__(self, device: torch.device, bytes_ahead: int = 0) -> None:
        self._bytes = torch.empty(bytes_ahead, dtype=torch.uint8, device=device)

    def tensor(self, shape: torch.Size, dtype: torch.dtype = torch.float32) -> Tensor:
        """Undefined values; valid until the next call."""
        wanted = shape.numel() * dtype.itemsize
        if wanted > len(self._bytes):
            self._bytes = self._bytes.new_empty(wanted)
        return self._bytes[:wanted].view(dtype).view(shape)


def kept_in_half(tensor: Tensor) -> bool:
    """Whether a tensor of a weights file becomes fp32 only when it is read into its parameter."""
    return tensor.ndim == 2 and tensor.numel() > _MATRIX


class DeferredWeights:
    """The values of a model's parameters, still in their file.

    Args:
        values: parameter name -> tensor, best memory-mapped.
    """

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        self._values = dict(values)

    def take(self, name: str, target: Tensor) -> None:
        """Copies the value of one parameter; once."""
        target.copy_(self._values.pop(name))

    def __len__(self) -> int:
        return len(self._values)


def is_deferred(module: nn.Module) -> bool:
    """Whether it has parameters that are not loaded yet."""
    return any(parameter.is_meta for parameter in module.parameters())


@torch.no_grad()
def materialise(
    module: nn.Module, weights: DeferredWeights | None, device: torch.device, divide: Callable[[Tensor], None]
) -> None:
    """Gives every parameter without storage its value, one at a time, and has it divided before the next is read.

    The parameters stay the same objects: optimizers may hold them.

    Args:
        module: names in ``weights`` are its own.
        weights: None: this rank needs no values, another one sends them; parameters get undefined storage.
        device: where they are whole for the moment.
        divide: called with each parameter; must leave no reference to its storage, which the next one gets.
    """
    largest = max((p.numel() for p in module.parameters() if p.is_meta), default=0)
    scratch = Scratch(device, 4 * largest)
    for name, parameter in module.named_parameters():
        if not parameter.is_meta:
            continue
        value = scratch.tensor(parameter.shape)
        if weights is not None:
            weights.take(name, value)
        # assigning data is refused between kinds of device
        torch.utils.swap_tensors(parameter, nn.Parameter(value, requires_grad=parameter.requires_grad))
        divide(parameter)
