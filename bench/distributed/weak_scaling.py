"""``python -m bench.distributed.weak_scaling``: the same images a rank on 1, 2 and 4 gloo ranks, and where time goes.

ViT-tiny at 96 pixels, whole engine steps from decoding on. The machine's cores are fewer than the ranks, and others
use it: the wall says nothing of scaling then. What a rank computes does: its CPU time, all threads, gloo's included.
``efficiency`` is that of one process by the local backend over that of a rank, for the same images; parts are CPU time
of the main thread, and ``exchange`` is also given as the wall, which is waiting: for others' work, for the cores and
for bytes. One rank and several alternate, round by round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from bench.distributed.clocks import Clocks
from bench.distributed.runs import record, start, without_folder, words, write_data
from mooring.config.load import load_config
from mooring.distributed import Ranks, launched_ranks
from mooring.train.engine import Engine

IMAGES, SIDE, CLASSES, STEPS = 16, 96, 100, 5
WORLDS = (1, 2, 4)
_BACKENDS = {
    "ddp": ("backend.name=ddp",),
    "zero1": ("backend.name=deepspeed", "backend.zero_stage=1"),
    "zero3": ("backend.name=deepspeed", "backend.zero_stage=3"),
}
CASES = [
    *(("fine_tune", None, backend) for backend in _BACKENDS),
    *(("dr_tune", "gathered", backend) for backend in _BACKENDS),
    *(("dr_tune", "sharded", backend) for backend in _BACKENDS),
]


def measure(settings: Sequence[str], clocks: Clocks) -> dict[str, Any]:
    """Seconds of this rank's step: of its process, of the wall, and of its parts."""
    with Engine.build(load_config(None, list(settings))) as engine:
        engine.prepare()
        clocks.on(engine)
        groups = iter(engine.epoch_groups())
        for group in islice(groups, 2):  # the first makes the optimizer's state
            engine.step(group)
        clocks.phase("data")
        clocks.cpu.clear()
        clocks.wall.clear()
        samples = []
        for _ in range(STEPS):
            cpu, wall = time.process_time(), time.perf_counter()
            engine.step(next(groups))
            clocks.phase("data")
            samples.append((time.process_time() - cpu, time.perf_counter() - wall))
        return {
            "process_seconds": statistics.median(cpu for cpu, _ in samples),
            "wall_seconds": statistics.median(wall for _, wall in samples),
            "part_seconds": {name: value / STEPS for name, value in clocks.cpu.items()},
            "part_wall_seconds": {name: value / STEPS for name, value in clocks.wall.items()},
        }


def worker(folder: Path) -> None:
    """All cases; one rank runs each method once, by the local backend."""
    clocks, world, done = Clocks(), launched_ranks().world, set()
    clocks.on_exchanges()
    for method, scope, backend in CASES:
        if world == 1 and method in done:
            continue
        done.add(method)
        chosen = ["backend.name=local"] if world == 1 else [*_BACKENDS[backend]]
        if scope is not None:
            chosen.append(f"method.bank_scope={scope}")
        settings = words(folder, "vit", method, *chosen, side=SIDE, batch=IMAGES * world)
        found = measure(settings, clocks)
        every = Ranks.here().gather(found)
        if Ranks.here().is_first:
            line = {
                "method": method,
                "scope": scope,
                "backend": "local" if world == 1 else backend,
                "world": world,
            }
            kept = {"ranks": every, "settings": without_folder(settings, folder)}
            with (folder / "found.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({**line, **kept}) + "\n")
            seconds = statistics.fmean(each["process_seconds"] for each in every)
            print(*line.values(), f"{seconds:.3f} s of CPU a rank and step", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.distributed.weak_scaling", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder, CLASSES, 8 * IMAGES * max(WORLDS), SIDE)
        for _ in range(args.rounds):
            for world in WORLDS:
                start("bench.distributed.weak_scaling", world, folder)
        by_case: dict[str, list[dict[str, Any]]] = {}
        for text in (folder / "found.jsonl").read_text(encoding="utf-8").splitlines():
            line = json.loads(text)
            key = json.dumps([line["method"], line["scope"], line["backend"], line["world"]])
            by_case.setdefault(key, []).append(line)
        for rounds in by_case.values():
            record("weak_scaling", _summary(rounds))


def _summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """The median over rounds of what is the mean over ranks within one."""

    def middle(take: Any) -> float:
        return statistics.median(statistics.fmean(take(rank) for rank in line["ranks"]) for line in rounds)

    first = rounds[0]
    parts = sorted({part for line in rounds for rank in line["ranks"] for part in rank["part_seconds"]})
    return {
        "what": "weak_scaling",
        **{name: first[name] for name in ("method", "scope", "backend", "world", "settings")},
        "images_of_a_rank": IMAGES,
        "rounds": len(rounds),
        "steps_a_round": STEPS,
        "process_seconds": middle(lambda rank: rank["process_seconds"]),
        "process_seconds_by_round": [
            statistics.fmean(rank["process_seconds"] for rank in line["ranks"]) for line in rounds
        ],
        "wall_seconds": middle(lambda rank: rank["wall_seconds"]),
        "part_seconds": {
            part: middle(lambda rank, part=part: rank["part_seconds"].get(part, 0.0)) for part in parts
        },
        "exchange_wall_seconds": middle(lambda rank: rank["part_wall_seconds"].get("exchange", 0.0)),
    }


if __name__ == "__main__":
    main()
