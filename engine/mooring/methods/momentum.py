"""The key network: a copy of the trained networks that follows them slowly and has no gradient."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from mooring.models.batchnorm_sync import merged_buffers
from mooring.models.partition import chunks, whole
from mooring_kernels import ema_


class MomentumCopy(nn.Module):
    """``theta_k <- m theta_k + (1 - m) theta_q`` over parameters; buffers go their own way.

    Whole and in fp32 on every rank; trained parameters that ranks divide are gathered for it, a few at a time.
    BatchNorm statistics of the copy are moved by its own forwards. Keep it out of the trained module (hold it in a
    tuple): it must not be wrapped, averaged, exported or given to an optimizer; ``state`` and ``load_state`` save it.

    Args:
        networks: the trained networks by name; copied here.

    Source: arXiv 1911.05722, eq. 2.
    """

    def __init__(self, networks: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleDict({name: copy.deepcopy(network) for name, network in networks.items()})
        self.networks.requires_grad_(False)

    def __getitem__(self, name: str) -> nn.Module:
        return self.networks[name]

    @torch.no_grad()
    def copy_from(self, networks: Mapping[str, nn.Module]) -> None:
        """Takes parameters and buffers as they are now."""
        self._each(networks, lambda own, followed: [p.copy_(q) for p, q in zip(own, followed, strict=True)])
        for name, network in networks.items():
            for own, followed in zip(self.networks[name].buffers(), network.buffers(), strict=True):
                own.copy_(followed)

    @torch.no_grad()
    def follow(self, networks: Mapping[str, nn.Module], momentum: float) -> None:
        """One step of the average; does not wait for the device."""
        self._each(networks, lambda own, followed: ema_(own, followed, momentum))

    def _each(
        self,
        networks: Mapping[str, nn.Module],
        function: Callable[[list[nn.Parameter], list[nn.Parameter]], object],
    ) -> None:
        """Calls the function with runs of own and of followed parameters, the latter whole."""
        own = [p for name in networks for p in self.networks[name].parameters()]
        followed = [p for network in networks.values() for p in network.parameters()]
        copies = {id(q): p for p, q in zip(own, followed, strict=True)}
        for chunk in chunks(followed):
            with whole(chunk):
                function([copies[id(q)] for q in chunk], chunk)

    def take_mode(self, networks: Mapping[str, nn.Module]) -> None:
        """Puts every layer into the mode its original is in, so that frozen statistics are frozen here too."""
        for name, network in networks.items():
            for own, followed in zip(self.networks[name].modules(), network.modules(), strict=True):
                own.training = followed.training

    def state(self) -> dict[str, Tensor]:
        """Parameters and buffers, copied."""
        return {name: tensor.clone() for name, tensor in self.networks.state_dict().items()}

    def resharded_state(self, states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """One state in place of those of several ranks: parameters are the same on all, statistics are averaged."""
        own = {name for name, _ in self.networks.named_buffers()}
        merged = merged_buffers([{name: state[name] for name in own if name in state} for state in states])
        return {name: merged[name] if name in own else states[0][name] for name in states[0]}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restores what ``state`` returned.

        Raises:
            ValueError: it is of other networks.
        """
        try:
            self.networks.load_state_dict(dict(state))
        except RuntimeError as err:
            raise ValueError(f"the saved key network is of another model: {err}") from None
