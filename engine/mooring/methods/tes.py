"""TeS: text-supervised fine-tuning (Wang, Qian, Jin, arXiv 2304.01489)."""

from __future__ import annotations

import logging
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import BaseModel
from torch import Tensor, nn

from mooring.config.tes_settings import TeSSettings
from mooring.distributed import ALONE
from mooring.methods.base import At, Method, Needs, StateTree
from mooring.methods.forward import Forward
from mooring.models.batchnorm_sync import batch_statistics
from mooring_kernels import text_supervised_loss

_log = logging.getLogger(__name__)


class TeS(Method):
    """``L = CE((1 - lv) onehot(y) + lv r, softmax(z)) + lt CE(onehot(y), softmax(v / tau))``.

    ``v_ij = cos(g(f(x_i)), t_j)`` with t_j the frozen vector of class name j and g a projection head that is
    trained along; ``r = softmax(v / tau)``, detached. With ``reference="class"``, ``r_c = softmax_j(t_c . t_j /
    tau)`` comes from the names alone, and there is neither g nor the text loss.

    The classifier alone is exported. Label smoothing, where set, applies to the label's share of the target.

    Source: arXiv 2304.01489 by its public code (instance level); the class level is the form its abstract
    describes. g is Linear - BatchNorm - ReLU - Linear; its BatchNorm counts no padding row.
    """

    Config: ClassVar[type[BaseModel]] = TeSSettings
    name: ClassVar[str] = "tes"
    needs: ClassVar[Needs] = Needs(text_features=True, encoder_in_parts=True)
    settings: TeSSettings

    def __init__(self, encoder: nn.Module, head: nn.Linear, settings: BaseModel, **options: Any) -> None:
        super().__init__(encoder, head, settings, **options)
        text = self.resources.text_features
        if text is None or text.ndim != 2 or text.shape[0] != head.out_features:
            raise ValueError(
                f"tes needs resources.text_features, [{head.out_features}, d], one row per class; got "
                f"{None if text is None else list(text.shape)}"
            )
        # Constant and known from the run's settings, so it is no weight of the model.
        self.register_buffer("text", F.normalize(text.float(), dim=1), persistent=False)
        self.text: Tensor
        self.projection: ProjectionHead | None = None
        if self.settings.reference == "instance":
            hidden = self.settings.projection_width or head.in_features
            self.projection = ProjectionHead(head.in_features, hidden, text.shape[1])

    def classification(self, run: Forward, at: At) -> Tensor:
        settings = self.settings
        ramp = settings.lambda_v_ramp
        lambda_v = settings.lambda_v * (min(1.0, at.progress / ramp) if ramp else 1.0)
        logits = run.logits.float()  # the head's own product runs in the precision of the run
        with torch.autocast(run.features.device.type, enabled=False):
            if self.projection is None:
                cosines, lambda_t = self._class_level(run), 0.0
            else:
                units = F.normalize(self.projection(run.features.float(), run.valid), dim=1)
                cosines, lambda_t = units @ self.text.T, settings.lambda_t
            loss = text_supervised_loss(
                logits,
                cosines,
                run.batch.labels,
                settings.tau,
                lambda_v,
                lambda_t,
                target=self._soft_labels(run),
            )
            return run.over_ranks(loss)

    def extra_state(self) -> StateTree:
        return {"text": self.text}

    def load_extra_state(self, state: StateTree) -> None:
        saved = state["text"].to(self.text.device)
        # another machine's text encoder rounds otherwise; the run goes on with the vectors it began with
        if saved.shape != self.text.shape or not torch.allclose(saved, self.text, rtol=0, atol=1e-3):
            raise ValueError(
                "the vectors of the class names differ from those the run was started with: restore the text "
                "encoder, file or names of method.text, or start a new run"
            )
        self.text.copy_(saved)

    def _class_level(self, run: Forward) -> Tensor:
        """Cosines of the names to the name of each row's class; of a mixed row, to the mean of its names."""
        labels = run.batch.labels.clamp_min(0)
        if run.batch.targets is None:
            return (self.text @ self.text.T)[labels]
        return F.normalize(run.batch.targets @ self.text, dim=1) @ self.text.T

    def _soft_labels(self, run: Forward) -> Tensor | None:
        """The labels' distribution [B, C] where it is not one class per row."""
        smoothing, classes = self.label_smoothing, self.head.out_features
        if run.batch.targets is None and smoothing == 0:
            return None
        labels = run.batch.targets
        if labels is None:
            labels = F.one_hot(run.batch.labels.clamp_min(0), classes).float()
        return labels * (1 - smoothing) + smoothing / classes


class ProjectionHead(nn.Module):
    """g: D -> hidden -> d, into the space of the text.

    Args:
        feature_dim: D.
        hidden: width of the layer with BatchNorm.
        text_dim: d.
    """

    def __init__(self, feature_dim: int, hidden: int, text_dim: int) -> None:
        super().__init__()
        self.widen = nn.Linear(feature_dim, hidden)
        self.norm = MaskedBatchNorm(hidden)
        self.project = nn.Linear(hidden, text_dim)

    def forward(self, features: Tensor, valid: Tensor) -> Tensor:
        """[B, d] from features [B, D]; only valid rows count in the statistics."""
        return self.project(self.norm(self.widen(features), valid).relu())


class MaskedBatchNorm(nn.BatchNorm1d):
    """BatchNorm over the valid rows of a batch, without a data-dependent shape; one valid row is no error.

    ``ranks``: whose rows count, see ``synchronise_statistics_``.
    """

    ranks = ALONE

    def forward(self, input: Tensor, valid: Tensor | None = None) -> Tensor:
        if not self.training or valid is None:
            return super().forward(input)
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        weight = valid[:, None].to(input.dtype)
        mean, variance, count = batch_statistics(input, self.ranks, weight)
        centred = input - mean
        with torch.no_grad():
            seen = (count > 0) * self.momentum
            count = count.clamp_min(1)
            unbiased = variance * count / (count - 1).clamp_min(1)
            self.running_mean += seen * (mean - self.running_mean)
            self.running_var += seen * (unbiased - self.running_var)
            if self.num_batches_tracked is not None:
                self.num_batches_tracked += 1
        return centred * torch.rsqrt(variance + self.eps) * self.weight + self.bias
