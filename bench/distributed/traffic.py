"""``python -m bench.distributed.traffic``: bytes that a rank exchanges in a step, by purpose, for every method.

Whole engine steps on 2 and 4 gloo ranks, in the middle of a run: every method by plain data parallelism on a ViT and on
a CNN, every way to share banks and queues, and ZeRO 0 to 3 for plain fine-tuning and DR-Tune. What is counted is held
against what torch's dispatcher sees; a difference is an error. DR-Tune refreshes its rotation every so many steps: its
bytes are a mean over a period.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from bench.distributed.exchanges import Dispatched
from bench.distributed.runs import MODELS, opened, record, start, without_folder, words, write_data
from mooring.config.method_settings import method_tables
from mooring.distributed import Ranks
from mooring.traffic import TRAFFIC, grown

CLASSES, SIDE, BATCH = 100, 96, 16
_SCOPES = {
    "dr_tune": "bank_scope", "bi_tuning": "queue_scope", "concept_tuning": "queue_scope",
}  # fmt: skip
_STEPS = {"dr_tune": 10}  # a period of its rotation


def cases() -> Iterator[dict[str, Any]]:
    """method, kind, scope of banks and queues, backend."""
    for kind in MODELS:
        for method in sorted(method_tables()):
            yield {"method": method, "kind": kind, "scope": None, "backend": "ddp"}
    for method, _ in _SCOPES.items():
        for scope in ("private", "sharded"):
            yield {"method": method, "kind": "vit", "scope": scope, "backend": "ddp"}
    for method in ("fine_tune", "dr_tune"):
        for stage in range(4):
            yield {"method": method, "kind": "vit", "scope": None, "backend": f"zero{stage}"}


def settings_of(case: dict[str, Any], folder: Path) -> list[str]:
    backend = case["backend"]
    stage = f"backend.zero_stage={backend.removeprefix('zero')}"
    chosen = ["backend.name=ddp"] if backend == "ddp" else ["backend.name=deepspeed", stage]
    if case["scope"] is not None:
        chosen.append(f"method.{_SCOPES[case['method']]}={case['scope']}")
    return words(folder, case["kind"], case["method"], *chosen, side=SIDE, batch=BATCH)


def measure(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Of this rank: bytes of a step by purpose, handed over and sent; the share that waited for nobody."""
    settings, steps = settings_of(case, folder), _STEPS.get(case["method"], 2)
    engine, groups = opened(settings)
    with engine:
        engine.step(next(groups))  # the first step makes optimizer state, and refreshes the rotation
        engine.global_step += steps - 1
        handed, sent = TRAFFIC.bytes.copy(), TRAFFIC.sent.copy()
        with Dispatched() as dispatched:
            for group in islice(groups, steps):
                engine.step(group)
        counted = grown(TRAFFIC.bytes, handed)
        if sum(counted.values()) != sum(dispatched.bytes.values()):
            raise AssertionError(f"{case}: counted {counted}, torch saw {dict(dispatched.bytes)}")
        trained = sum(
            getattr(p, "ds_numel", p.numel())
            for group in engine.parts.optimizer.param_groups
            for p in group["params"]
        )
        return {
            **case,
            "handed": {name: count / steps for name, count in counted.items()},
            "sent": {name: count / steps for name, count in grown(TRAFFIC.sent, sent).items()},
            "background": sum(dispatched.background.values()) / sum(dispatched.bytes.values()),
            "steps": steps,
            "trained_parameters": trained,
            "settings": without_folder(settings, folder),
        }


def worker(folder: Path, only: list[str], first: int) -> None:
    for case in list(cases())[first:]:
        if only and case["method"] not in only:
            continue
        found = measure(case, folder)
        ranks = Ranks.here()
        every = ranks.gather(found["sent"])
        if ranks.is_first:
            apart = {name: max(each.get(name, 0) for each in every) for name in every[0]}
            line = {"what": "traffic", "world": ranks.world, **found, "sent": apart}
            record("traffic", line)
            print(ranks.world, *case.values(), json.dumps(line["handed"]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.distributed.traffic", description=__doc__)
    parser.add_argument("--worlds", type=int, nargs="*", default=(2, 4))
    parser.add_argument("--methods", nargs="*", default=())
    parser.add_argument(
        "--first", type=int, default=0, help="go on with this case, where a run was broken off"
    )
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker, list(args.methods), args.first)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder, CLASSES, 2 * CLASSES, SIDE)
        for world in args.worlds:
            start(
                "bench.distributed.traffic",
                world,
                folder,
                "--methods",
                *args.methods,
                "--first",
                str(args.first),
            )


if __name__ == "__main__":
    main()
