"""Follows what a computation allocates, computes and moves, operation by operation."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from math import prod
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_ATTENTION = "aten._scaled_dot_product_flash_attention_for_cpu"


class Ledger(TorchDispatchMode):
    """Counts live bytes, floating-point operations and bytes moved while it is active.

    Works on real and on fake tensors alike: a fake one has a size and no content.

    Attributes:
        live: bytes of all storages made since the beginning that still exist, gradients excepted.
        gradients: bytes of gradients of the followed parameters.
        peak: largest ``live``, gradients excepted.
        peak_with_gradients: largest sum of both.
        flops: of matrix products, convolutions and attention; a multiply-add counts twice.
        moved: bytes that all other operations read and write.
        operations: number of them.

    Args:
        parameters: whose gradients are counted by themselves.
    """

    def __init__(self, parameters: Iterable[nn.Parameter] = ()) -> None:
        super().__init__()
        self.live = self.gradients = self.peak = self.peak_with_gradients = 0
        self.flops = self.moved = self.operations = 0
        self._known: dict[int, tuple[weakref.ref[Any], int]] = {}
        self._gradients: dict[int, int] = {}
        self._hooks = [
            p.register_post_accumulate_grad_hook(self._got_gradient) for p in parameters if p.requires_grad
        ]

    def close(self) -> None:
        """Stops following the parameters."""
        for hook in self._hooks:
            hook.remove()

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Storages that were there before."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._known[id(storage)] = weakref.ref(storage), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "aten" and func._overloadpacket not in flop_registry:
            with self:  # in inference mode a composite operation arrives whole
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        for tensor in made:
            self._add(tensor)
        self._count(func, args, kwargs, result, made)
        self._peaks()
        return result

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        known = self._known.get(id(storage))
        if known is not None and known[0]() is storage:
            return
        key, size = id(storage), storage.nbytes()

        def gone(reference: Any) -> None:
            current = self._known.get(key)
            if current is not None and current[0] is reference:
                del self._known[key]
                if key in self._gradients:
                    self.gradients -= self._gradients.pop(key)
                else:
                    self.live -= size

        self._known[key] = weakref.ref(storage, gone), size
        self.live += size

    def _got_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        key = id(parameter.grad.untyped_storage())
        if key not in self._gradients and key in self._known:
            size = self._known[key][1]
            self._gradients[key] = size
            self.live -= size
            self.gradients += size

    def _peaks(self) -> None:
        self.peak = max(self.peak, self.live)
        self.peak_with_gradients = max(self.peak_with_gradients, self.live + self.gradients)

    def _count(self, func: Any, args: Any, kwargs: Any, result: Any, made: list[Tensor]) -> None:
        packet = func._overloadpacket
        if str(packet).startswith(_ATTENTION):
            self.flops += _attention_flops(str(packet), args)
        elif packet in flop_registry:
            self.flops += flop_registry[packet](*args, **kwargs, out_val=result)
        elif not func.is_view:
            read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            self.moved += sum(tensor.nbytes for tensor in (*read, *made))
        else:
            return
        self.operations += 1


def _attention_flops(name: str, args: Any) -> int:
    """Two products of [S, S] by [S, D] a head forward; backward five, one of them again the first."""
    query, key = (args[1], args[2]) if "backward" in name else (args[0], args[1])
    product = 2 * prod(query.shape[:-2]) * query.shape[-2] * key.shape[-2] * query.shape[-1]
    return (5 if "backward" in name else 2) * product
