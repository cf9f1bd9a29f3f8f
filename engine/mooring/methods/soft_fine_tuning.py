"""Soft Fine-tuning (arXiv 1909.02236): the source loss fades out."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel
from torch import Tensor, nn

from mooring.config.soft_settings import SoftFineTuningSettings
from mooring.data.batch import Batch
from mooring.errors import ConfigError
from mooring.methods.base import At, Method, Needs, SetupContext
from mooring.methods.classification import batch_cross_entropy, tempered_divergence
from mooring.methods.forward import Forward
from mooring.methods.soft_schedule import source_batch_rows, source_weight
from mooring.models.batchnorm_source import mixes_rows, running_statistics, untracked, with_statistics
from mooring_kernels import two_head_cross_entropy

_Policy = Literal["frozen_stats", "eval", "shared", "joint"]
# Below so many source images their batch statistics say too little, and those of the start are used.
_FEWEST_FOR_STATISTICS = 16


class SoftFineTuning(Method):
    """``L = CE(h_T(g(x_T)), y_T) + w(t) CE(h_S(g(x_S)), y_S)``, w falling from w0 to 0.

    g is the encoder, h_T the head, h_S the classifier that the pretrained weights came with, trained along at the
    backbone's learning rate and dropped from the exported model. At w = 0 no source image is drawn or seen, and
    h_S stays as it is. ``source_shrink`` draws ceil(w B_S) source images instead of B_S: the mean loss keeps the
    weight w, so the gradient is the same on average. Where no BatchNorm uses batch statistics (or with
    ``source_bn="joint"``) source and target images go through the encoder as one batch; elsewhere the source
    images follow the target's, under the policy ``source_bn``. Evaluation uses the target's buffers only.

    Without source images, ``source="distill"``: w(t) mean_i KL(softmax(s_0 / T) || softmax(s / T)), s and s_0 the
    source head's logits of the target images now and at the start; no factor T^2, as LwF.

    Label smoothing, where set, applies to both heads; mixed images are target images only.

    Source: arXiv 1909.02236 is readable in its abstract only; the form, target weight 1 and a linear fall to 0 are
    those of a third party's code under that name (spec section 3), which counts in epochs
    (``soft_granularity="epoch"``), gives all parts one learning rate, passes the source images through the running
    statistics (``source_bn="shared"``), and still reads them at w = 0.
    """

    Config: ClassVar[type[BaseModel]] = SoftFineTuningSettings
    name: ClassVar[str] = "soft_fine_tuning"
    needs: ClassVar[Needs] = Needs(source_head=True, source_stream=True)
    settings: SoftFineTuningSettings

    def __init__(self, encoder: nn.Module, head: nn.Linear, settings: BaseModel, **options: Any) -> None:
        super().__init__(encoder, head, settings, **options)
        self.source_head = self.own_source_head()
        bn = self.settings.source_bn
        self._policy: _Policy = "frozen_stats" if bn == "auto" else bn
        distills = self.settings.source == "distill"
        if distills:
            self.keep_frozen_copy()
        # known from the weights, so not saved
        weight, bias = self.source_head.weight.detach().clone(), self.source_head.bias.detach().clone()
        self.register_buffer("first_weight", weight if distills else None, persistent=False)
        self.register_buffer("first_bias", bias if distills else None, persistent=False)
        # saved: a method that is set up before this one (DAFT) may change them
        mean, var = running_statistics(encoder)
        keeps = len(mean) > 0 and not distills and self._policy != "joint"
        self.register_buffer("source_mean", mean if keeps else None)
        self.register_buffer("source_var", var if keeps else None)
        self.first_weight: Tensor | None
        self.first_bias: Tensor | None
        self.source_mean: Tensor | None
        self.source_var: Tensor | None

    @classmethod
    def needs_of(cls, settings: BaseModel) -> Needs:
        assert isinstance(settings, SoftFineTuningSettings)
        reads = settings.source == "data"
        return Needs(
            source_head=True,
            source_stream=reads and settings.ever_on,
            frozen_encoder=not reads,
        )

    def joined(self, partners: frozenset[str]) -> None:
        if "daft" not in partners:
            return
        if self.settings.source_bn not in ("auto", "eval"):
            raise ConfigError(
                f"method.source_bn={self.settings.source_bn} is wrong beside daft: it gives BatchNorm affine "
                "weights for the target's statistics, and source images need the statistics of the start; take "
                "source_bn=eval"
            )
        self._policy = "eval"

    def pretrained_parameters(self) -> list[nn.Parameter]:
        return list(self.source_head.parameters())

    def setup(self, context: SetupContext) -> None:
        """Takes the statistics of the start anew: what was set up before this may have changed them."""
        if self.source_mean is not None and self.source_var is not None:
            mean, var = running_statistics(self.encoder)
            self.source_mean.copy_(mean)
            self.source_var.copy_(var)

    # ---------------------------------------------------------------- the source images of a step

    def source_rows(self, at: At) -> int:
        if self.settings.source == "distill":
            return 0
        weight = source_weight(self.settings, at)
        return 0 if weight <= 0 else source_batch_rows(self.settings, weight, self._source_batch())

    def _source_batch(self) -> int:
        batch = self.resources.source_batch_size or self.settings.source_batch_size
        if batch is None:
            raise ValueError("soft_fine_tuning: give method.source_batch_size or resources.source_batch_size")
        return batch

    def source_alongside(self, batch: Batch, at: At) -> bool:
        if batch.source is None or self.settings.source == "distill" or source_weight(self.settings, at) <= 0:
            return False
        return self._policy == "joint" or not mixes_rows(self.encoder)

    def _source_features(self, run: Forward, source: Batch) -> Tensor:
        if run.source_features is not None:
            return run.source_features
        run.features  # noqa: B018  the target's forward comes first, as if there were no source images
        with self._statistics(self.ranks.world * source.images.shape[0]):
            return self.encoder(source.images)

    def _statistics(self, rows: int) -> AbstractContextManager[None]:
        """What BatchNorm does while so many source images pass."""
        policy = self._policy
        full = self.resources.source_batch_size or self.settings.source_batch_size or rows
        if rows < min(full, _FEWEST_FOR_STATISTICS):
            policy = "eval"
        if policy == "eval" and self.source_mean is not None and self.source_var is not None:
            return with_statistics(self.encoder, self.source_mean, self.source_var)
        return untracked(self.encoder) if policy == "frozen_stats" else nullcontext()

    # ---------------------------------------------------------------- the loss

    def additions(self, run: Forward, at: At) -> dict[str, Tensor]:
        weight = source_weight(self.settings, at)
        if weight <= 0:
            return {}
        if self.settings.source == "distill":
            target, source = None, run.over_ranks(self._divergence(run))
        else:
            target, source = self._both_heads(run, weight)
        if self.settings.target_weight == "complement":
            if target is None:
                target = batch_cross_entropy(run.logits, run.targets, self.label_smoothing)
            target = (1 - weight) * target
        run.cross_entropy = target
        return {"source": weight * source}

    def _both_heads(self, run: Forward, weight: float) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy of the target rows and of the source rows."""
        source = run.batch.source
        if source is None:
            raise ValueError(
                f"soft_fine_tuning: expected Batch.source with method.source_rows(at) rows at weight {weight:.3g}; "
                "got none"
            )
        logits = self.source_head(self._source_features(run, source))
        if run.batch.targets is None:
            _, target_loss, source_loss = two_head_cross_entropy(
                run.logits,
                run.batch.labels,
                logits,
                source.labels,
                weight,
                label_smoothing=self.label_smoothing,
            )
            return target_loss, source_loss
        # mixed images have a distribution for a label
        return (
            batch_cross_entropy(run.logits, run.targets, self.label_smoothing),
            batch_cross_entropy(logits, source.labels, self.label_smoothing),
        )

    def _divergence(self, run: Forward) -> Tensor:
        """Of the source head's answers to the target images, from its first ones."""
        assert self.first_weight is not None
        with torch.autocast(run.features.device.type, enabled=False):
            return tempered_divergence(
                self.source_head(run.features.float()),
                F.linear(run.frozen_features, self.first_weight, self.first_bias),
                self.settings.distillation_temperature,
                run.valid,
            )
