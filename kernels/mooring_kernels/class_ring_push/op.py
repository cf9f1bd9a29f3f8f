"""Writing rows into one ring per class: checks and dispatch. No gradient passes into a bank."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mooring_kernels.class_ring_push import reference
from mooring_kernels.runtime.checks import require_floats, require_labels, require_one_device, require_width
from mooring_kernels.runtime.dispatch import Impl, choose


def class_ring_push_(
    bank_fields: Sequence[Tensor],
    bank_labels: Tensor,
    heads: Tensor,
    fields: Sequence[Tensor],
    labels: Tensor,
    *,
    normalise: bool = True,
    impl: Impl = "auto",
) -> Tensor:
    """Writes row i of every field to slot ``(heads[y_i] + rank of i among its class) mod K`` of its class, in place.

    The rank counts the earlier rows of the batch with the same label. With more than K rows of one class the last K
    stay, where row after row would have put them; pushing a batch in pieces or at once gives the same bank. A row
    whose label is outside 0..C-1 is skipped. Heads and labels are read and written on the device: no call waits.

    Args:
        bank_fields: one [C, K, ..., D_f] float32 or bfloat16 tensor per field, contiguous; written in place. What lies
            between K and D_f are the vectors of one image (patches [C, K, P, D]); each is normalised by itself.
        bank_labels: [C, K] int64, contiguous, -1 in empty slots; a written slot gets its class. Flattened, it and the
            fields are what ``queue_info_nce`` takes.
        heads: [C] int64, contiguous, the next slot of each class in 0..K-1; moved on in place.
        fields: one [B, ..., D_f] tensor per field, on the bank's device; B >= 0. Detached here.
        labels: [B] int64.
        normalise: store ``v / max(|v|, 1e-12)``, computed in fp32, instead of ``v``.
        impl: see ``mooring_kernels``.

    Returns:
        [B] int64, the flat slot ``y_i K + s`` that each row went to, -1 where it was skipped: for what else is kept
        per slot.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit, or a bank tensor is strided.

    Source: spec 1(c) step 7 of Concept-Tuning; the public code writes row after row.
    Cost: reads and writes B sum(D_f) elements once.
    """
    op = "class_ring_push_"
    if bank_labels.dim() != 2:
        raise ValueError(f"{op}: bank_labels must be [C, K] int64; got {list(bank_labels.shape)}")
    (classes, slots), rows = bank_labels.shape, labels.shape[0]
    require_labels(op, "bank_labels (flattened)", bank_labels.flatten(), classes * slots)
    require_labels(op, "heads", heads, classes)
    require_labels(op, "labels", labels, rows)
    require_width(op, "C", classes)
    require_width(op, "K", slots)
    if len(bank_fields) != len(fields) or len(fields) == 0:
        raise ValueError(
            f"{op}: bank_fields and fields must be equally long and not empty; "
            f"got {len(bank_fields)} and {len(fields)}"
        )
    for number, (bank, field) in enumerate(zip(bank_fields, fields, strict=True)):
        inner: list[int | str] = list(bank.shape[2:]) or ["D"]
        require_floats(op, f"bank_fields[{number}]", bank, classes, slots, *inner)
        require_floats(op, f"fields[{number}]", field, rows, *inner)
        require_width(op, f"a row of bank_fields[{number}]", bank[0, 0].numel())
        require_one_device(op, bank_labels=bank_labels, labels=labels, heads=heads, bank=bank, field=field)
    written = {"bank_labels": bank_labels, "heads": heads}
    written |= {f"bank_fields[{number}]": bank for number, bank in enumerate(bank_fields)}
    for name, tensor in written.items():
        if not tensor.is_contiguous():
            raise ValueError(f"{op}: {name} must be contiguous; got stride {tensor.stride()}")
    chosen = choose(op, impl, *bank_fields, *fields)
    banks, detached = list(bank_fields), [field.detach() for field in fields]
    if chosen == "reference":
        with torch.no_grad():
            return reference.class_ring_push(banks, bank_labels, heads, detached, labels, normalise)
    return _forward(banks, bank_labels, heads, detached, labels, normalise, chosen)


@torch.library.custom_op("mooring::class_ring_push", mutates_args=("bank_fields", "bank_labels", "heads"))
def _forward(
    bank_fields: list[Tensor],
    bank_labels: Tensor,
    heads: Tensor,
    fields: list[Tensor],
    labels: Tensor,
    normalise: bool,
    impl: str,
) -> Tensor:
    if impl == "triton":
        from mooring_kernels.class_ring_push import gpu

        return gpu.class_ring_push_fwd(bank_fields, bank_labels, heads, fields, labels, normalise)
    from mooring_kernels.class_ring_push import cpu

    return cpu.class_ring_push_fwd(bank_fields, bank_labels, heads, fields, labels, normalise)


@_forward.register_fake
def _(
    bank_fields: list[Tensor],
    bank_labels: Tensor,
    heads: Tensor,
    fields: list[Tensor],
    labels: Tensor,
    normalise: bool,
    impl: str,
) -> Tensor:
    return torch.empty_like(labels, memory_format=torch.contiguous_format)
