"""DAFT: domain-aware fine-tuning (AAAI 2024, arXiv 2308.07728)."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from mooring.config.daft_settings import DAFTSettings
from mooring.distributed import Ranks
from mooring.methods.base import At, Method, Needs, SetupContext, StateTree
from mooring.models.batchnorm_conversion import (
    Conversion,
    Statistics,
    collect_statistics,
    convert_,
    give_affine_,
)

_log = logging.getLogger(__name__)

_LISTED = 5  # layers and channels that a warning names


class DAFT(Method):
    """``L = CE``, from a start that suits the new images: BatchNorm conversion, zero head, two learning rates.

    Before the first step every BatchNorm layer gets the mean mu_T and variance v_T of the training images in place of
    the stored mu_S and v_S, and weights that keep its function:

        gamma' = gamma sqrt(v_T + eps) / sqrt(v_S + eps),   beta' = beta + (mu_T - mu_S) gamma / sqrt(v_S + eps)

    so training with batch statistics begins at the pretrained function. The head starts at zero and learns at
    ``head_lr``, far above the encoder's rate: the gradient dL/df = W^T (p - onehot) is zero at first and grows with
    the head, which makes probing and fine-tuning one run. An encoder without BatchNorm keeps the head's part.

    ``head_lr="auto"`` is 3 / (lambda_max(E[f f^T]) + 1), the 1 for the bias; softmax regression by SGD with momentum
    0.9 is stable below 7.6 over the same. A rate above it is used, with a warning. It needs the same pass over the
    images as the conversion. For optimizers whose step does not scale with the gradient "auto" is the configured rate.

    The state says that the conversion is done: a continued run has converted layers and keeps them.

    Args:
        encoder, head, settings: as for every method; the head is set to zero in place, and BatchNorm layers without
            weight and bias get them (1 and 0).

    Source: arXiv 2308.07728 by its public code: statistics over training-augmented images in the batches of the
    training, means of batches unweighted. Ours: the pass is the live encoder's (the code copies it), leaves out
    what the training leaves out of an epoch (an incomplete last batch), and "auto". Published: SGD, momentum
    0.9 without Nesterov, no weight decay, no warm-up, cosine to zero; see the recipe ``daft_paper``.
    """

    Config: ClassVar[type[BaseModel]] = DAFTSettings
    name: ClassVar[str] = "daft"
    needs: ClassVar[Needs] = Needs(batchnorm="train", warm_up=True)
    settings: DAFTSettings

    def __init__(self, encoder: nn.Module, head: nn.Linear, settings: BaseModel, **options: Any) -> None:
        super().__init__(encoder, head, settings, **options)
        self._set_up = False
        self._head_factor = 1.0
        if self.settings.conversion:
            give_affine_(encoder)  # now: the optimizer and the weight average take their parameters from here
        if self.settings.zero_head:
            nn.init.zeros_(head.weight)
            if head.bias is not None:
                nn.init.zeros_(head.bias)

    def setup(self, context: SetupContext) -> None:
        """Measures, converts, and settles the head's rate."""
        if self._set_up:  # broken off in another method's part and begun again
            return
        settings = self.settings
        auto = settings.head_lr == "auto" and context.optimizer in (None, "sgd")
        statistics = None
        if settings.conversion or auto:
            statistics = self._measure(context)
        if settings.conversion and statistics is not None:
            _report(convert_(self.encoder, statistics))
        self._head_factor = self._factor(statistics, context, auto)
        self._set_up = True

    def _measure(self, context: SetupContext) -> Statistics:
        clean = self.settings.calib_transform == "clean"
        batches = context.clean_images() if clean else context.warm_up()
        # layers are listened to while the pass runs: a compiled forward would be one for this pass alone
        with torch.compiler.set_stance("force_eager"), context.autocast():
            return collect_statistics(
                self.encoder,
                _real_images(batches, self.ranks),
                max_images=self.settings.calib_images,
                ranks=self.ranks,
            ).reduce(self.ranks)

    def _factor(self, statistics: Statistics | None, context: SetupContext, auto: bool) -> float:
        """The head's rate over the one it is configured with."""
        largest = None
        if statistics is not None and statistics.lambda_max is not None:
            largest = 7.6 / (statistics.lambda_max + 1)
        if auto:
            rate = None if largest is None else largest * 3.0 / 7.6
        else:
            rate = None if isinstance(self.settings.head_lr, str) else self.settings.head_lr
            if rate is not None and largest is not None and rate > largest and context.optimizer == "sgd":
                _log.warning(
                    "daft: method.head_lr=%.3g is above %.3g, the largest rate at which the head is known to be "
                    "stable on these features with momentum 0.9; method.head_lr=auto takes %.3g",
                    *(rate, largest, largest * 3.0 / 7.6),
                )
        if rate is None or context.head_lr is None:
            return 1.0
        _log.info("daft: the head's peak learning rate is %.4g", rate)
        return rate / context.head_lr

    def lr_factors(self, at: At) -> Mapping[str, float]:
        return {"head": self._head_factor}

    def extra_state(self) -> StateTree:
        return {"set_up": self._set_up, "head_factor": self._head_factor}

    def load_extra_state(self, state: StateTree) -> None:
        self._set_up = bool(state["set_up"])
        self._head_factor = float(state["head_factor"])


def _real_images(batches: Iterator[Any], ranks: Ranks) -> Iterator[Tensor]:
    """The images without padding rows, which would count in the statistics; equally many batches on all ranks."""
    for batch in batches:
        valid = batch.labels >= 0
        if ranks.any(not bool(valid.any())):
            continue
        if bool(valid.all()):
            yield batch.images
        else:
            yield batch.images[valid].contiguous(memory_format=torch.channels_last)


def _report(conversion: Conversion) -> None:
    if conversion.converted:
        _log.info("daft: %s", conversion.note)
    else:
        _log.warning("daft: %s; what is left of the method is the head's start and rate", conversion.note)
    if conversion.outliers:
        shown = [
            f"{name} {channels[:_LISTED]}" for name, channels in list(conversion.outliers.items())[:_LISTED]
        ]
        _log.warning(
            "daft: channels whose weight changed more than a thousandfold, dead in pretraining or here: %s%s",
            ", ".join(shown),
            " and more" if len(conversion.outliers) > _LISTED else "",
        )
