"""StochNorm (Kou, You, Long, Wang, NeurIPS 2020)."""

from __future__ import annotations

import logging
from typing import Any, ClassVar

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from mooring.config.baseline_settings import StochNormSettings
from mooring.methods.base import Method, Needs, SetupContext, StateTree
from mooring.models.stoch_norm import make_stochastic_

_log = logging.getLogger(__name__)


class StochNorm(Method):
    """Plain fine-tuning with BatchNorm layers that draw between batch and moving statistics.

    In training each channel of each layer uses the statistics of the batch with probability p and the moving ones
    otherwise; the moving ones are always updated. In evaluation it is BatchNorm.

    Source: spec section 4. In the public code the option for p lands in another argument, so p is always 0.5.
    """

    Config: ClassVar[type[BaseModel]] = StochNormSettings
    name: ClassVar[str] = "stoch_norm"
    needs: ClassVar[Needs] = Needs(batchnorm="train")
    settings: StochNormSettings

    def __init__(self, encoder: nn.Module, head: nn.Linear, settings: BaseModel, **options: Any) -> None:
        super().__init__(encoder, head, settings, **options)
        self._generator = torch.Generator().manual_seed(0)
        self.layers = make_stochastic_(encoder, self.settings.batch_probability, self._generator)
        if self.layers == 0:
            _log.warning("stoch_norm: the encoder has no BatchNorm, so this is plain fine-tuning")

    def setup(self, context: SetupContext) -> None:
        self._generator.manual_seed(context.seed)

    def forward_state(self) -> tuple[list[Tensor], list[torch.Generator]]:
        return list(self.buffers()), [self._generator]

    def extra_state(self) -> StateTree:
        return {"generator": self._generator.get_state()}

    def load_extra_state(self, state: StateTree) -> None:
        self._generator.set_state(state["generator"].cpu())
