"""How far fine-tuning moved the features: pretrained against tuned, on the same images."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from mooring.collectives import all_reduce_
from mooring.data.batch import Batch
from mooring.distributed import Ranks
from mooring.errors import DataError


@dataclass(frozen=True, slots=True)
class Distortion:
    """Means over n images.

    Attributes:
        cosine: cosine similarity of an image's features before and after; 1 where nothing but their length changed.
        distance: Euclidean distance between them, in the units of the features.
        n: images counted.
    """

    cosine: float
    distance: float
    n: int

    def scalars(self) -> dict[str, float]:
        """The single numbers, under the names they are reported with."""
        return {"feature_cosine": self.cosine, "feature_distance": self.distance}


@torch.no_grad()
def feature_distortion(
    before: nn.Module,
    after: nn.Module,
    source: Iterable[Batch],
    device: torch.device | str,
    ranks: Ranks | None = None,
) -> Distortion:
    """``mean_i cos(f_0(x_i), f(x_i))`` and ``mean_i |f(x_i) - f_0(x_i)|_2``, in fp32.

    Padding rows (id -1) count nowhere. Rows of length zero have cosine 0.

    Args:
        before, after: images [B, 3, H, W] -> features [B, D], both in eval mode.
        source: batches.
        device: where both networks are.
        ranks: those that share the rows; the result is that of all rows, on each.

    Raises:
        DataError: there is no image.

    Source: Figure 1 of DAFT (arXiv 2308.07728) shows both, before and after fine-tuning.
    """
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    n = 0
    for batch in source:
        real = batch.ids >= 0
        images = batch.images[real].to(device)
        if not len(images):
            continue
        old, new = before(images).float(), after(images).float()
        totals[0] += F.cosine_similarity(old, new, dim=1).double().sum()
        totals[1] += (new - old).double().norm(dim=1).sum()
        n += len(images)
    if ranks is not None and ranks.world > 1:
        n = sum(ranks.gather(n))
        all_reduce_(totals, ranks, "evaluation")
    if n == 0:
        raise DataError("nothing to measure the distortion of features on: no image")
    cosine, distance = (totals / n).tolist()
    return Distortion(cosine, distance, n)
