"""Writing rows into a ring: checks and dispatch. No gradient passes into a bank."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mooring_kernels.ring_push import reference
from mooring_kernels.runtime.checks import require_floats, require_labels, require_one_device, require_width
from mooring_kernels.runtime.dispatch import Impl, choose
from mooring_kernels.runtime.eager import runs_eagerly


def ring_push_(
    bank_fields: Sequence[Tensor],
    bank_labels: Tensor,
    fields: Sequence[Tensor],
    labels: Tensor,
    head: int,
    *,
    normalise: bool = True,
    impl: Impl = "auto",
) -> int:
    """Writes row i of every field, and its label, to slot ``(head + i) mod K``, in place.

    With B > K the last K rows stay, where row after row would have put them: pushing a batch in pieces or
    at once gives the same bank. Rows are stored as ``v / max(|v|, 1e-12)``, computed in fp32 and rounded to
    nearest even. A padding row (label -1) takes a slot too, and its label masks that slot everywhere: leaving
    it out would need a shape that depends on data, hence a wait for the device.

    Args:
        bank_fields: one [K, D_f] float32 or bfloat16 tensor per field, contiguous; written in place.
        bank_labels: [K] int64, contiguous; written in place.
        fields: one [B, D_f] tensor per field, on the bank's device; B >= 0. Detached here.
        labels: [B] int64; -1 marks padding.
        head: first slot to write, in 0..K-1; a host number, so that no call waits for the device.
        normalise: store unit rows; otherwise only cast.
        impl: see ``mooring_kernels``.

    Returns:
        The next head, ``(head + B) mod K``.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or ``head`` do not fit, or a bank tensor is strided.

    Cost: reads and writes B sum(D_f) elements once; 3 B sum(D_f) FLOP.
    """
    op = "ring_push_"
    slots, rows = bank_labels.shape[0], labels.shape[0]
    require_labels(op, "bank_labels", bank_labels, slots)
    require_labels(op, "labels", labels, rows)
    require_width(op, "K", slots)
    if len(bank_fields) != len(fields) or len(fields) == 0:
        raise ValueError(
            f"{op}: bank_fields and fields must be equally long and not empty; "
            f"got {len(bank_fields)} and {len(fields)}"
        )
    if not bank_labels.is_contiguous():
        raise ValueError(f"{op}: bank_labels must be contiguous; got stride {bank_labels.stride()}")
    for number, (bank, field) in enumerate(zip(bank_fields, fields, strict=True)):
        require_floats(op, f"bank_fields[{number}]", bank, slots, "D")
        require_floats(op, f"fields[{number}]", field, rows, bank.shape[1])
        require_width(op, f"D of bank_fields[{number}]", bank.shape[1])
        if not bank.is_contiguous():
            raise ValueError(f"{op}: bank_fields[{number}] must be contiguous; got stride {bank.stride()}")
        require_one_device(op, bank_labels=bank_labels, labels=labels, bank_field=bank, field=field)
    if not 0 <= head < slots:
        raise ValueError(f"{op}: head must be in 0..{slots - 1}; got {head}")
    chosen = choose(op, impl, *bank_fields, *fields)
    if rows == 0:
        return head
    kept = min(rows, slots)
    first = (head + rows - kept) % slots
    banks, newest = list(bank_fields), [field.detach()[rows - kept :] for field in fields]
    if chosen == "reference":
        with torch.no_grad():
            reference.ring_push(banks, bank_labels, newest, labels[rows - kept :], first, normalise)
    elif runs_eagerly(*banks, bank_labels, *newest, labels):
        _push(banks, bank_labels, newest, labels[rows - kept :], first, normalise, chosen)
        torch.autograd.graph.increment_version((*banks, bank_labels))  # written behind autograd's back
    else:
        _forward(banks, bank_labels, newest, labels[rows - kept :], first, normalise, chosen)
    return (head + rows) % slots


def _push(
    bank_fields: list[Tensor],
    bank_labels: Tensor,
    fields: list[Tensor],
    labels: Tensor,
    head: int,
    normalise: bool,
    impl: str,
) -> None:
    if impl == "triton":
        from mooring_kernels.ring_push import gpu

        gpu.ring_push_fwd(bank_fields, bank_labels, fields, labels, head, normalise)
    else:
        from mooring_kernels.ring_push import cpu

        cpu.ring_push_fwd(bank_fields, bank_labels, fields, labels, head, normalise)


_forward = torch.library.custom_op("mooring::ring_push", _push, mutates_args=("bank_fields", "bank_labels"))


@_forward.register_fake
def _(
    bank_fields: list[Tensor],
    bank_labels: Tensor,
    fields: list[Tensor],
    labels: Tensor,
    head: int,
    normalise: bool,
    impl: str,
) -> None:
    return None
