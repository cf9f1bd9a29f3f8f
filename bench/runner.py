"""One candidate bound to its inputs: the calls that are verified, measured and timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo.utils import counters

from bench.memory import peak_bytes
from bench.operation import Candidate, Inputs, Operation, Outputs, Pass, map_tensors
from bench.timing import SLOW_SECONDS, Call
from bench.verify import VerificationError, gradients, relative_error, upstream_for

_STALE = 1e-3  # relative: eager was held against the definition, only an unwritten result is off by this much


def _prepared(candidate: Candidate) -> Callable[[Inputs], Outputs]:
    return torch.compile(candidate.call, dynamic=False) if candidate.compiled else candidate.call


class Runner:
    """Each call takes the next set of inputs, that none stays in cache."""

    def __init__(
        self,
        operation: Operation,
        candidate: Candidate,
        sets: list[Inputs],
        *,
        device: torch.device,
        seed: int,
    ) -> None:
        self.candidate = candidate
        self.peaks: dict[Pass, int] = {}
        self.compiled: dict[str, int] = {}  # of a compiled candidate: graphs and breaks between them
        self._device = device
        self._operation = operation
        self._call = _prepared(candidate)
        # in-place ops write their inputs: candidates must not see each other's
        self._sets = [map_tensors(s, lambda t: t.clone()) for s in sets] if operation.in_place else sets
        self._seed = seed
        self._turn = 0
        self._slow_seconds: float | None = None
        self._saved: list[tuple[Outputs, Outputs]] = []

    def _next(self) -> int:
        self._turn = (self._turn + 1) % len(self._sets)
        return self._turn

    def first(self, upstream: Outputs) -> tuple[Outputs, Outputs]:
        """Outputs and gradients on the first set of inputs, for the verify gate."""
        inputs = self._sets[0]
        counters.clear()
        outputs = self._first_call(inputs)
        if self.candidate.compiled:
            self.compiled = {
                "graphs": counters["stats"]["unique_graphs"],
                "graph_breaks": sum(counters["graph_break"].values()),
            }
        if not self._operation.differentiable:
            return outputs, ()
        return outputs, gradients(self._operation, inputs, outputs, upstream)

    def _first_call(self, inputs: Inputs) -> Outputs:
        """A forward pass that takes a second or more is measured here: an SVD is not run once more for that."""
        if self._operation.differentiable or self.candidate.compiled or self.candidate.graphed:
            return self._call(inputs)
        results: list[Outputs] = []
        peak, seconds = peak_bytes(lambda: results.append(self._call(inputs)), self._device)
        if seconds >= SLOW_SECONDS:
            self.peaks["forward"], self._slow_seconds = peak, seconds
        return results[0]

    def _forward(self, number: int) -> Outputs:
        with torch.no_grad():
            return self._call(self._sets[number])

    def _both(self, number: int) -> Outputs:
        outputs = self._call(self._sets[number])
        return gradients(self._operation, self._sets[number], outputs, self._saved[number][1])

    def _backward(self, number: int) -> Outputs:
        outputs, upstream = self._saved[number]
        return gradients(self._operation, self._sets[number], outputs, upstream)

    def bind(self, which: Pass) -> Call:
        """The call that is timed for one pass."""
        if self._operation.differentiable and not self._saved:
            for inputs in self._sets:
                outputs = self._call(inputs)
                self._saved.append((outputs, upstream_for(outputs, self._seed)))
        step = {"forward": self._forward, "backward": self._backward, "both": self._both}[which]
        if not self.candidate.graphed:
            return lambda: step(self._next())
        graphs = [self._capture(step, number, which) for number in range(len(self._sets))]
        return lambda: graphs[self._next()].replay()

    def measure_peak(self, which: Pass, call: Call) -> float | None:
        """Fills ``peaks`` from one call and returns its seconds; a graph was measured while it was captured."""
        if self.candidate.graphed or self._slow_seconds is not None:
            return self._slow_seconds
        if self.candidate.compiled:
            call()  # compiles: what that allocates is not the op's
        self.peaks[which], seconds = peak_bytes(call, self._device)
        return seconds

    def _capture(self, step: Callable[[int], Outputs], number: int, which: Pass) -> Any:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                step(number)
            eager = map_tensors(list(step(number)), lambda tensor: tensor.detach().clone())
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.cuda.graph(graph):
            captured = step(number)
        self.peaks[which] = torch.cuda.max_memory_allocated() - before
        graph.replay()
        if not all(relative_error(a, b) <= _STALE for a, b in zip(captured, eager, strict=True)):
            raise VerificationError("a replayed CUDA graph gives another result than the calls it captured")
        return graph
