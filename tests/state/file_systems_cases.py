"""Ranks whose run folders are different ones, as on machines with disks of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mooring.distributed import Ranks
from mooring.errors import MooringError
from mooring.state.encoding import encode_tree
from mooring.state.file_systems import keepers
from mooring.state.retention import Retention
from mooring.state.store import CheckpointStore


def _folder(root: Path, disks: list[str]) -> Path:
    return root / disks[Ranks.here().rank] / "run"


def _store(root: Path, disks: list[str]) -> CheckpointStore:
    folder, ranks = _folder(root, disks), Ranks.here()
    keep = Retention(last=2)
    return CheckpointStore(folder / "c", ranks, keepers=keepers(folder, ranks), keep=keep)


def seen(root: Path, disks: list[str]) -> tuple[int, ...]:
    return keepers(_folder(root, disks), Ranks.here())


def refused(root: Path, disks: list[str]) -> str:
    try:
        keepers(_folder(root, disks), Ranks.here())
    except MooringError as err:
        return str(err)
    return ""


def write(root: Path, disks: list[str], steps: list[int], reason: str = "test") -> None:
    store, rank = _store(root, disks), Ranks.here().rank
    for step in steps:
        parts = {f"rank-{rank}": encode_tree({"own": torch.full((1000,), step + 0.25 * rank)})}
        if rank == 0:
            parts["shared"] = encode_tree({"step": step, "weights": torch.full((50_000,), float(step))})
        store.write(step, reason, parts)


def read(root: Path, disks: list[str], *, every: bool = False) -> dict[str, Any]:
    """What each rank continues from."""
    store, ranks = _store(root, disks), Ranks.here()
    found = store.newest()
    store.tidy(found.damaged)
    ranks.barrier()
    names = sorted(entry.name for entry in store.folder.glob("step*"))
    if found.ref is None:
        return {"step": None, "notes": found.notes, "names": names}
    own = f"rank-{ranks.rank}"
    store.fetch(found.ref, None if every else ("shared", own))
    ranks.barrier()
    return {
        "step": store.read(found.ref, "shared")["step"],
        "weights": store.read(found.ref, "shared")["weights"][-1].item(),
        "own": store.read(found.ref, own)["own"][0].item(),
        "files": sorted(file.name for file in found.ref.folder.iterdir()),
        "notes": found.notes,
        "names": names,
    }
