"""L2-SP: weights are pulled to where they started (Li, Grandvalet, Davoine, ICML 2018)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from mooring.config.baseline_settings import L2SPSettings
from mooring.methods.base import At, Method, SetupContext, StateTree
from mooring.methods.forward import Forward
from mooring.methods.weight_pull import weight_pull


class L2SP(Method):
    """``L = CE + a/2 |theta - theta_0|^2 + b/2 |phi|^2``.

    theta are the encoder's trainable weights and theta_0 their values when the run was set up (after a
    BatchNorm conversion, where one runs); phi are weight and bias of the head. The state holds theta_0, so that
    a continued run is pulled to the same place.

    Source: spec section 4; both pulls and no weight decay as in TLlib's code.
    """

    Config: ClassVar[type[BaseModel]] = L2SPSettings
    name: ClassVar[str] = "l2_sp"
    settings: L2SPSettings

    def __init__(self, encoder: nn.Module, head: nn.Linear, settings: BaseModel, **options: Any) -> None:
        super().__init__(encoder, head, settings, **options)
        self._anchors: list[Tensor] = []
        self._keep_anchors()

    def _anchored(self) -> list[nn.Parameter]:
        return [p for p in self.encoder.parameters() if p.requires_grad]

    def _keep_anchors(self) -> None:
        self._anchors = [p.detach().clone() for p in self._anchored()]

    def setup(self, context: SetupContext) -> None:
        self._keep_anchors()

    def additions(self, run: Forward, at: At) -> dict[str, Tensor]:
        run.logits  # noqa: B018  the forward comes first, see weight_pull
        head = list(self.head.parameters())
        return {
            "l2_sp": weight_pull(self._anchored(), self._anchors, self.settings.backbone_pull)
            + weight_pull(head, [None] * len(head), self.settings.head_pull)
        }

    def extra_state(self) -> StateTree:
        return {"anchors": {str(i): anchor for i, anchor in enumerate(self._anchors)}}

    def load_extra_state(self, state: StateTree) -> None:
        parameters = self._anchored()
        saved = state["anchors"]
        if len(saved) != len(parameters):
            raise ValueError(
                f"expected {len(parameters)} anchors, got {len(saved)}: the state is of another model"
            )
        self._anchors = [
            torch.empty_like(p, requires_grad=False).copy_(saved[str(i)]) for i, p in enumerate(parameters)
        ]
