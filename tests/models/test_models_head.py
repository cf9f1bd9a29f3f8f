from __future__ import annotations

import torch

from mooring.models.head import build_head


def test_head_is_small_normal_with_zero_bias() -> None:
    head = build_head(2000, 100, generator=torch.Generator().manual_seed(0))
    assert head.weight.shape == (100, 2000) and not head.bias.any()
    # 200 000 draws: the standard deviation is known to 0.16 %, the mean to 2.2e-5; five sigma each
    assert abs(head.weight.std().item() / 0.01 - 1) < 0.008 and abs(head.weight.mean().item()) < 1.2e-4


def test_head_of_the_same_generator_is_the_same() -> None:
    first, second, third = (
        build_head(8, 3, generator=torch.Generator().manual_seed(s)).weight for s in (5, 5, 6)
    )
    assert torch.equal(first, second) and not torch.equal(first, third)
