"""What each rank runs for test_distributed_health."""

from __future__ import annotations

import torch
from torch import nn

from mooring.distributed import Ranks
from mooring.methods.bank import BankSpec, FeatureBank
from mooring.train.health.banks import BanksDifferError, compare_banks
from mooring.train.health.nonfinite import judge


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bank = FeatureBank(BankSpec(rows=4, fields={"tuned": 3}))


def banks() -> tuple[bool, str]:
    ranks, holder = Ranks.here(), Holder()
    rows = torch.arange(6.0).reshape(2, 3) + 1
    holder.bank.push({"tuned": rows}, torch.tensor([0, 1]), torch.tensor([5, 6]))
    compare_banks(holder, ranks, 10)
    if ranks.rank == 1:
        holder.bank.view()["tuned"][1, 2] += 1e-3
    try:
        compare_banks(holder, ranks, 20)
    except BanksDifferError as err:
        return True, str(err)
    return False, ""


def a_fault_on_one_rank() -> list[bool]:
    ranks = Ranks.here()
    weight = nn.Parameter(torch.ones(3))
    found = []
    for bad in (None, 0, 1):
        weight.grad = torch.ones(3) * (float("nan") if ranks.rank == bad else 1.0)
        found.append(
            judge(
                torch.tensor(1.0),
                [weight],
                weight.grad.norm().reshape(1),
                lambda flag: ranks.all_reduce_(flag, "max"),
            ).is_bad()
        )
    return found
