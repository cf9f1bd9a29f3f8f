"""What runs the optimizer step: the contract, and which backend a run gets."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mooring.config.schema import RunConfig
from mooring.data.batch import Batch
from mooring.distributed import Ranks
from mooring.errors import ConfigError
from mooring.methods.base import At, Method, StepOutput


class Backend(Protocol):
    """Forward, backward, clip and step of one run, on one rank among several or alone.

    The gradient that a step applies is the mean over ranks of the gradients of ``sum over micro-batches of loss``.
    Every rank makes the same calls in the same order.

    Attributes:
        name: as in ``backend.name``.
        ranks: this process and the others; ``rank`` and ``world`` are theirs.
        device: where parameters and batches lie.
        divided: ``state_dict`` is this rank's part alone.
    """

    name: str
    ranks: Ranks
    rank: int
    world: int
    device: torch.device
    divided: bool

    def autocast(self) -> AbstractContextManager[object]:
        """A context in which matrix products and convolutions run in the run's precision."""
        ...

    def prepare(self, method: Method, optimizer: Optimizer) -> None:
        """Once, after the method's set-up or a resume has given it its weights, before the first ``forward``."""
        ...

    def forward(self, batch: Batch, at: At) -> StepOutput:
        """The method's forward, in the run's precision."""
        ...

    def predict(self, images: Tensor) -> Tensor:
        """The method's inference logits; in evaluation mode, in the caller's precision."""
        ...

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Adds the gradient of ``loss``; ``last``: of the step, so that ranks may bring theirs together."""
        ...

    def clip(self, limit: float) -> Tensor:
        """Has the step scale the gradient to at most ``limit`` in L2 norm; its norm before, a device scalar."""
        ...

    def step(self) -> None:
        """Applies the gradient and clears it."""
        ...

    def discard(self) -> None:
        """Clears the gradient instead of a step: parameters and optimizer state stay as they are."""
        ...

    def gradient_norms(self) -> tuple[list[nn.Parameter], Tensor]:
        """Parameters that have a gradient, and its L2 norms [P] fp32; exchanges it where it is divided."""
        ...

    def weights(self) -> dict[str, Tensor]:
        """The method's ``state_dict`` with whole tensors, on every rank; not to be written to."""
        ...

    def whole(self, module: nn.Module, *, write: bool = False) -> AbstractContextManager[None]:
        """Within it ``module`` is an ordinary module with whole parameters; ``write``: what is changed stays."""
        ...

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Gives the method the weights that ``weights`` returned; after ``prepare``."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """State of the optimizer, the same on every rank unless ``divided``."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what ``state_dict`` returned; after ``prepare``."""
        ...

    def takes(self, state: Mapping[str, Any]) -> bool:
        """Whether ``load_state_dict`` does, after ``prepare``: the state was divided as it is here, or not at all."""
        ...

    def load_redistributed(self, states: Iterable[Mapping[str, Any]]) -> None:
        """Restores the optimizer's state of another backend, stage or number of ranks; after ``prepare``.

        Args:
            states: what ``state_dict`` returned on each rank, or once where not ``divided``; read one by one.

        Raises:
            ValueError: it is of another model, or does not say how it was divided.
        """
        ...


def make_backend(config: RunConfig, device: torch.device, precision: str, ranks: Ranks) -> Backend:
    """The backend that ``config.backend`` asks for; ``auto``: local for one process, DeepSpeed for several.

    Raises:
        ConfigError: it does not fit the number of processes, or settings that it cannot honour.
        MissingDependencyError: DeepSpeed was asked for by name and is not installed.
    """
    from mooring.train.data_parallel_backend import DataParallelBackend
    from mooring.train.local_backend import LocalBackend

    name = config.backend.name
    if name == "auto":
        installed = importlib.util.find_spec("deepspeed") is not None
        name = "local" if ranks.world == 1 else "deepspeed" if installed else "ddp"
    if name == "local" and ranks.world > 1:
        raise ConfigError(
            f"backend.name=local is for one process, and {ranks.world} were started: take auto, ddp or deepspeed"
        )
    if name == "local":
        return LocalBackend(device, precision)
    if name == "ddp":
        return DataParallelBackend(device, precision, ranks)
    from mooring.train.deepspeed_backend import DeepSpeedBackend

    return DeepSpeedBackend(config, device, precision, ranks)
