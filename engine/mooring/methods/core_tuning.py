"""Core-tuning (Zhang, Hooi, Hu, Liang, Feng, NeurIPS 2021; arXiv 2102.06605)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import BaseModel
from torch import Tensor, nn

from mooring.collectives import all_rows, gather_rows
from mooring.config.contrast_settings import CoreTuningSettings
from mooring.methods.base import At, Method, Needs, SetupContext, StateTree
from mooring.methods.classification import batch_cross_entropy
from mooring.methods.forward import Forward
from mooring.methods.hard_mixing import Draws, MixedRows, hard_mixed

# A stream of its own: no other random draw of the run moves it, and it moves none.
_SEED = 0xC07E


class CoreTuning(Method):
    """``L = CE(mixed rows) + eta L_focal(mixed rows)``, over the features of a batch and mixtures of them.

    Mixed rows are the batch's own, those mixed with a random partner, and hard positives (``hard_mixed``), with
    labels mixed alike. L_focal is a supervised contrast over ``z = norm(MLP(f))``: rows of one class are positives
    of each other, all rows are keys (``focal_contrast``).

    Partners are found among the rows of all ranks, and every rank computes the loss of them all: the features travel,
    not the images.

    Parameters of the MLP are dropped from the exported model.

    Source: spec section 4, by the public code. Differs from it, unless ``parity="release"``: the farthest positive
    is searched among positives (masked entries are +inf, not 0, which with cosines >= 0 is a row of another
    class, most often the first, and then replaced by the row itself); a row of another class must exist; the
    weights ``1 - p`` are constants of the gradient; positives are averaged over their number, not over all rows;
    the batch's own rows carry their gradient into the encoder, where the code detaches them. In both: partners are
    never the row itself; which rows are of one class is compared by class, not by a rounded sum of powers of ten
    that overflows with many classes; no second forward for the accuracy.
    """

    Config: ClassVar[type[BaseModel]] = CoreTuningSettings
    name: ClassVar[str] = "core_tuning"
    needs: ClassVar[Needs] = Needs(mixing=False, encoder_in_parts=True)
    settings: CoreTuningSettings

    def __init__(self, encoder: nn.Module, head: nn.Linear, settings: BaseModel, **options: Any) -> None:
        super().__init__(encoder, head, settings, **options)
        width = head.in_features
        self.contrast_mlp = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), nn.Linear(width, self.settings.contrast_width)
        )
        self._generator = torch.Generator().manual_seed(_SEED)
        self._mixed: tuple[Forward, MixedRows] | None = None

    def setup(self, context: SetupContext) -> None:
        self._generator.manual_seed(context.seed ^ _SEED)

    def draw(self, rows: int) -> Draws:
        """Draws for a batch of so many rows, the next of the method's own stream."""
        return Draws.of(rows, self.settings.mix_alpha, self._generator, self.head.weight.device)

    def additions(self, run: Forward, at: At) -> dict[str, Tensor]:
        own = self.settings
        release = own.parity == "release"
        features = all_rows(run.features.float(), self.ranks, "features")
        labels = gather_rows(run.batch.labels, self.ranks, "features")
        mixed = hard_mixed(
            features, labels, self.head.out_features, self.draw(labels.shape[0]), release=release
        )
        self._mixed = run, mixed
        outputs = self.contrast_mlp(mixed.features)
        with torch.autocast(outputs.device.type, enabled=False):
            units = F.normalize(outputs.float(), dim=1)
            contrast = focal_contrast(
                units, mixed.classes, mixed.valid, own.contrast_temperature, release=release
            )
        return {"focal_contrast": own.contrast_weight * contrast}

    def classification(self, run: Forward, at: At) -> Tensor:
        assert self._mixed is not None and self._mixed[0] is run, "additions come first"
        (_, mixed), self._mixed = self._mixed, None
        rows = self.ranks.world * run.batch.labels.shape[0]
        if self.settings.parity == "release" or self.ranks.world > 1:
            logits = self.head(mixed.features)
        else:
            logits = torch.cat([run.logits, self.head(mixed.features[rows:])])
        return batch_cross_entropy(logits, mixed.targets, self.label_smoothing)

    def forward_state(self) -> tuple[list[Tensor], list[torch.Generator]]:
        return list(self.buffers()), [self._generator]

    def extra_state(self) -> StateTree:
        return {"generator": self._generator.get_state()}

    def load_extra_state(self, state: StateTree) -> None:
        self._generator.set_state(state["generator"].cpu())


def focal_contrast(
    units: Tensor, classes: Tensor, valid: Tensor, temperature: float, *, release: bool = False
) -> Tensor:
    """Mean over the rows i with a positive of ``mean_{j in pos(i)} -(1 - p_ij) log p_ij``; 0 if there are none.

    ``p_ij = exp(z_i . z_j / T) / sum_{k != i} exp(z_i . z_k / T)`` over valid rows k; positives of i are the other
    valid rows of its class. The factor ``1 - p`` is a constant of the gradient.

    Args:
        units: z, [N, d] float32 unit rows.
        classes: [N] int64; a row with -1 has no positives and is a key like the others.
        valid: [N] bool; other rows take no part.
        temperature: T > 0.
        release: ``1 - p`` has a gradient, and positives are summed and divided by the number of valid rows.
    """
    itself = torch.eye(units.shape[0], dtype=torch.bool, device=units.device)
    key = valid & ~itself
    positive = (classes[:, None] == classes) & (classes >= 0) & key & valid[:, None]
    count = positive.sum(1)
    has_positive = count > 0
    logits = (units @ units.T / temperature).masked_fill(~key, -torch.inf)
    # a row without keys would bring NaN into the gradient
    logits = torch.where(has_positive[:, None], logits, 0.0)
    # where before the product: masked logarithms are infinite
    log_p = torch.where(positive, logits - logits.logsumexp(1, keepdim=True), 0.0)
    weight = 1 - log_p.exp()
    if not release:
        weight, divisor = weight.detach(), count.clamp_min(1)
    else:
        divisor = valid.sum().clamp_min(1)
    per_row = -(weight * log_p).sum(1) / divisor
    return per_row.sum() / has_positive.sum().clamp_min(1)
