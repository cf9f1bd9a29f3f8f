"""What ``python -m bench.distributed.equality`` runs: every cell of the table held against one process, one record each.

The tests of test_distributed_equality.py hold a part of these cells always and all of them in ``make test-full``;
this writes down how close they are. ``python -m bench.distributed.tables`` draws the table.
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
from pathlib import Path

import torch
from equality import STAGES, both, check_equal, classes_of, deepspeed, differences
from method_cases import SETTINGS
from ranks import RankFailure, RankPool, rank_pool

from bench import environment
from bench.records import FOLDER

RECORDS = FOLDER / "distributed" / "equality.jsonl"
DDP = "ddp"


def measure(pool: RankPool, method: str, kind: str, backend: str) -> dict[str, object]:
    """One cell: the differences, and what the tests say of them."""
    chosen = {"backend": DDP} if backend == DDP else deepspeed(int(backend.removeprefix("zero")))
    results, single = both(pool, method, kind, classes=classes_of(method), **chosen)
    problem = None
    try:
        check_equal(results, single)
    except AssertionError as err:
        problem = str(err)
    return {**differences(results, single), "steps": len(single["losses"]), "problem": problem}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--worlds", type=int, nargs="*", default=(2, 4))
    parser.add_argument("--kinds", nargs="*", default=("vit", "cnn"))
    parser.add_argument("--methods", nargs="*", default=sorted(SETTINGS))
    parser.add_argument("--backends", nargs="*", default=(DDP, *(f"zero{stage}" for stage in STAGES)))
    args = parser.parse_args()
    torch.set_num_threads(1)
    described = environment.describe(torch.device("cpu"))
    commit = environment.commit()
    args.records.parent.mkdir(parents=True, exist_ok=True)
    failed = 0
    for world in args.worlds:
        cells = [(m, k, b) for m in args.methods for k in args.kinds for b in args.backends]
        while cells:
            with rank_pool(world) as pool:
                while cells:
                    method, kind, backend = cells.pop(0)
                    cell = {"method": method, "kind": kind, "world": world, "backend": backend}
                    began, broken = time.monotonic(), False
                    try:
                        found = measure(pool, method, kind, backend)
                    except RankFailure as err:
                        found, broken = {"problem": str(err)}, True
                    record = {
                        "what": "equality", **cell, "classes": classes_of(method), **found,
                        "environment": described, "commit": commit,
                        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
                    }  # fmt: skip
                    with args.records.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(record) + "\n")
                    failed += found["problem"] is not None
                    print(
                        *cell.values(),
                        *(f"{v:.1e}" for k, v in found.items() if k.endswith("difference")),
                        found["problem"] or "equal",
                        f"{time.monotonic() - began:.1f} s",
                        flush=True,
                    )
                    if broken:
                        break  # the pool is of no more use
    raise SystemExit(f"{failed} cells differ" if failed else 0)


if __name__ == "__main__":
    main()
