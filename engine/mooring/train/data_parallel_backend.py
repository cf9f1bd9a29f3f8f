"""Every rank holds the whole model; gradients are averaged while the backward pass goes on."""

from __future__ import annotations

import weakref

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from mooring.collectives import broadcast_
from mooring.distributed import Ranks
from mooring.methods.base import Method
from mooring.traffic import TRAFFIC
from mooring.train.local_backend import LocalBackend

# Large enough that latency does not count, small enough that the first is on its way early.
_BUCKET_BYTES = 25 << 20


class DataParallelBackend(LocalBackend):
    """Plain data parallelism: the mean of the ranks' gradients, one all-reduce for each bucket of parameters.

    A bucket is sent as soon as its gradients are there, in the order in which the backward pass makes them. Parameters
    that no rank has a gradient for in a step (a head that is not used yet) have none afterwards, as with one process;
    which ones they are may depend on the step alone.

    Args:
        device, precision: as ``LocalBackend``.
        ranks: all that train together.
    """

    name = "ddp"

    def __init__(self, device: torch.device, precision: str, ranks: Ranks) -> None:
        super().__init__(device, precision)
        self.ranks = ranks
        self.rank, self.world = ranks.rank, ranks.world
        self._buckets: list[list[nn.Parameter]] = []
        self._bucket_of: dict[nn.Parameter, int] = {}
        self._missing: list[int] = []  # gradients that each bucket still waits for
        self._sent: list[tuple[dist.Work | None, Tensor, list[nn.Parameter]]] = []
        self._next = 0  # buckets leave in order, so that all ranks send the same one
        self._last = False

    def prepare(self, method: Method, optimizer: Optimizer) -> None:
        super().prepare(method, optimizer)
        if self.ranks.world == 1:
            return
        with torch.no_grad():
            for tensor in (*method.parameters(), *method.buffers()):
                broadcast_(tensor, self.ranks, "first weights")
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        owned = {id(p) for p in trained}
        # the last layers' gradients come first
        order = [p for p in reversed(list(method.parameters())) if id(p) in owned]
        self._buckets = _buckets(order)
        self._bucket_of = {p: number for number, bucket in enumerate(self._buckets) for p in bucket}
        # weakly: a parameter's hook that holds what holds the parameter is never collected
        arrived = weakref.WeakMethod(self._arrived)

        def hook(parameter: Tensor) -> None:
            if (method := arrived()) is not None:
                method(parameter)

        for parameter in order:
            parameter.register_post_accumulate_grad_hook(hook)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self._last = last and self.ranks.world > 1
        if self._last:
            self._missing = [len(bucket) for bucket in self._buckets]
            self._sent, self._next = [], 0
        loss.backward()
        if not self._last:
            return
        while self._next < len(self._buckets):  # those with parameters that got no gradient
            self._send(self._buckets[self._next])
        for work, flat, parameters in self._sent:
            if work is not None:
                work.wait()
            flat.div_(self.ranks.world)
            for p, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
                assert p.grad is not None
                p.grad.copy_(part.view_as(p))
        self._sent = []

    def _arrived(self, parameter: Tensor) -> None:
        if not self._last:
            return
        self._missing[self._bucket_of[parameter]] -= 1  # type: ignore[index]
        while self._next < len(self._buckets) and self._missing[self._next] == 0:
            self._send(self._buckets[self._next])

    def _send(self, bucket: list[nn.Parameter]) -> None:
        self._next += 1
        parameters = [p for p in bucket if p.grad is not None]
        if not parameters:
            return
        flat = torch.cat([p.grad.reshape(-1) for p in parameters if p.grad is not None])
        TRAFFIC.count(flat, "gradients", self.world)
        self._sent.append((dist.all_reduce(flat, async_op=True), flat, parameters))


def _buckets(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    buckets: list[list[nn.Parameter]] = []
    room = 0
    for parameter in parameters:
        size = parameter.numel() * parameter.element_size()
        if room < size or not buckets:
            buckets.append([])
            room = _BUCKET_BYTES
        buckets[-1].append(parameter)
        room -= size
    return buckets
