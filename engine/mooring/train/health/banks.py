"""Banks that are meant to be the same on every rank, compared by fingerprint."""

from __future__ import annotations

from torch import nn

from mooring.distributed import Ranks
from mooring.errors import MooringError
from mooring.train.health.memory import banks_of


class BanksDifferError(MooringError):
    """Copies of one bank have become different on the ranks: the rest of the run would be of no use."""


def compare_banks(method: nn.Module, ranks: Ranks, step: int) -> None:
    """Collective. Looks whether all ranks hold the same rows in every bank that is kept in common.

    Args:
        method: its banks with ``spec.scope == "gathered"`` are compared.
        ranks: all that train together.
        step: for the message.

    Raises:
        BanksDifferError: on every rank; names bank and ranks.
    """
    if ranks.world == 1:
        return
    mine = {
        name: tuple(bank.fingerprint().tolist())
        for name, bank in banks_of(method).items()
        if getattr(bank.spec, "scope", "gathered") == "gathered"
    }
    told = ranks.gather(mine)
    for name in mine:
        odd = [rank for rank, other in enumerate(told) if other.get(name) != told[0].get(name)]
        if odd:
            raise BanksDifferError(
                f"step {step}: bank {name} must hold the same rows on every rank; ranks {odd} differ from rank 0: "
                "continue from the last checkpoint, and report it if it happens again"
            )
