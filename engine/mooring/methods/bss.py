"""Batch Spectral Shrinkage (Chen et al., NeurIPS 2019)."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import BaseModel
from torch import Tensor

from mooring.collectives import all_rows, gather_rows
from mooring.config.baseline_settings import BSSSettings
from mooring.methods.base import At, Method, Needs
from mooring.methods.forward import Forward


class BSS(Method):
    """``L = CE + eta sum_{i<=k} sigma_{-i}(F)^2``, the k smallest singular values of the features F [B, D]
    of a batch, of all ranks together.

    Source: spec section 4. The public code takes an SVD of F; here the squares are eigenvalues of the smaller
    Gram matrix, whose gradient 2 u u^T F stays defined where singular values tie.

    On CUDA the host waits for the device once per forward, the one place in a step where it does: torch's eigenvalue
    and singular value functions all read the solver's status there, and it has none without (as ``cholesky_ex`` is).
    What would not wait is not exact: inverse iteration for a fixed number of rounds mixes eigenvectors whose values lie
    close, which is the rule among the smallest of a batch. The matrix is min(B, D) wide, so the wait is for the queued
    work, not for the solver; ``train.accumulate`` does not change it, since each micro-batch has its own.
    """

    Config: ClassVar[type[BaseModel]] = BSSSettings
    name: ClassVar[str] = "bss"
    needs: ClassVar[Needs] = Needs(encoder_in_parts=True)
    settings: BSSSettings

    def additions(self, run: Forward, at: At) -> dict[str, Tensor]:
        with torch.autocast(run.features.device.type, enabled=False):
            smallest = smallest_squared_singular_values(
                all_rows(run.features.float(), self.ranks, "features"),
                gather_rows(run.valid, self.ranks, "features"),
                self.settings.singular_values,
            )
        return {"bss": self.settings.shrinkage * smallest.sum()}


def smallest_squared_singular_values(features: Tensor, valid: Tensor, count: int) -> Tensor:
    """The smallest squared singular values of the valid rows of ``features``, ascending.

    Args:
        features: [B, D] fp32.
        valid: [B] bool; rows that count.
        count: how many; at most min(B, D) are returned.
    """
    rows = features * valid[:, None]
    above = rows.detach().square().sum() + 1  # any singular value squared
    if rows.shape[0] > rows.shape[1]:
        gram = rows.T @ rows
    else:
        # A row that does not count must not bring a singular value of zero: its own is moved out of the way.
        gram = rows @ rows.T + torch.diag_embed((~valid) * 2 * above)
    kept = torch.linalg.eigvalsh(gram)[:count]
    # fewer valid rows than asked for: what was moved away is not a singular value
    return torch.where(kept.detach() > above, 0.0, kept).clamp_min(0)
