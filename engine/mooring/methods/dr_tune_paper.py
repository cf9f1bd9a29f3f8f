"""DR-Tune's calibration as the paper writes it: raw features, logits as confidence, no rescaling."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def paper_calibration(
    frozen: Tensor,
    tuned: Tensor,
    labels: Tensor,
    head_weight: Tensor,
    rotation: Tensor | None,
    *,
    translation: bool = True,
) -> Tensor:
    """``v_k = R p_k + mu_d,c - R mu_p,c`` with c the row's class.

    ``mu_p,c`` is the plain mean of the frozen rows of class c; ``mu_d,c`` the mean of the tuned rows with weights
    ``softmax over the class of W_c . d_k``. Plain torch, and no kernel: this form exists for comparison with the
    paper's text; the public code, which gave the paper's numbers, is what the ops compute.

    Args:
        frozen, tuned: p and d, [K, D] raw features.
        labels: [K] int64; rows whose label is no class come out as zeros.
        head_weight: W, [C, D].
        rotation: R, [D, D], or None for the identity.
        translation: False leaves ``R p_k``.

    Returns:
        [K, D] float32.

    Source: arXiv 2308.12058, eq. 8-12.
    """
    classes = head_weight.shape[0]
    valid = (labels >= 0) & (labels < classes)
    index = labels.clamp(0, classes - 1)
    p = torch.where(valid[:, None], frozen.float(), 0)
    d = torch.where(valid[:, None], tuned.float(), 0)
    moved = p if rotation is None else p @ rotation.float().T
    if not translation:
        return moved
    members = F.one_hot(index, classes).float() * valid[:, None]  # [K, C]
    logits = (d * head_weight.float()[index]).sum(1)
    per_class = torch.where(members > 0, logits[:, None], -torch.inf)
    # the largest of each class is subtracted; an absent class has none, and its column is never read
    weight = torch.where(valid, (logits - per_class.amax(0)[index]).exp(), 0)
    total = (members * weight[:, None]).sum(0).clamp_min(torch.finfo(torch.float32).tiny)
    tuned_mean = (members * weight[:, None]).T @ d / total[:, None]
    frozen_mean = members.T @ moved / members.sum(0).clamp_min(1)[:, None]
    return (moved + tuned_mean[index] - frozen_mean[index]) * valid[:, None]
