"""Images per second of the two data sources on the same manifest, taken in turns; one record per source.

Wall time is what a training step waits for; CPU time says what a core can do when other load shares the
machine. Both sources first make the same batches, and the record holds how far their pixels lie apart.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch

from bench import environment, records
from bench.timing import Quantiles
from mooring.data.augment import Augmentation, ModelInput, preset
from mooring.data.cache import open_manifest
from mooring.data.manifest import Split
from mooring.data.sources import SourceKind, dali_is_installed, make_source
from mooring.errors import MooringError

_SEED = 20240229


def pixel_difference(split: Split, augment: Augmentation, batch_size: int) -> float:
    """Mean absolute difference of the first batch between the sources, in 8-bit steps."""
    batches = []
    for kind in ("torch", "dali"):
        with make_source(kind, split, augment, batch_size=batch_size, training=True, seed=_SEED) as source:
            batches.append(next(iter(source)))
    reference, fast = batches
    if not torch.equal(reference.ids, fast.ids):
        raise RuntimeError("the sources disagree about which images a batch holds")
    steps = 255 * torch.tensor(augment.input.std)[:, None, None]
    return float(((reference.images - fast.images).abs() * steps).mean())


def one_round(
    kind: SourceKind, split: Split, augment: Augmentation, *, batch_size: int, batches: int, workers: int
) -> tuple[float, float]:
    """Seconds per image of a fresh source, start-up left out: (wall, CPU of this process)."""
    with make_source(
        kind, split, augment, batch_size=batch_size, training=True, seed=_SEED, workers=workers
    ) as source:

        def forever() -> None:
            taken = 0
            while taken < batches:
                for _ in source:
                    taken += 1
                    if taken == batches:
                        return

        next(iter(source))
        wall, cpu = time.perf_counter(), time.process_time()
        forever()
        images = batches * batch_size
        return (time.perf_counter() - wall) / images, (time.process_time() - cpu) / images


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints and records; returns 2 where a source or the data is missing."""
    parser = argparse.ArgumentParser(prog="python -m bench.data_throughput", description=__doc__)
    parser.add_argument("data", type=Path, help="image folder, list or manifest folder")
    parser.add_argument("--augment", choices=("light", "standard", "strong"), default="standard")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--batches", type=int, default=16, help="batches per round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=1, help="DALI threads, torch processes")
    parser.add_argument("--records", type=Path, default=records.FOLDER)
    chosen = parser.parse_args(arguments)
    if not dali_is_installed():
        print("the comparison needs DALI: python -m pip install '.[dali]'", file=sys.stderr)
        return 2
    try:
        with tempfile.TemporaryDirectory() as cache:
            split = open_manifest(chosen.data, Path(cache), workers=2).split("train")
            measure(split, chosen)
    except MooringError as err:
        print(err, file=sys.stderr)
        return 2
    return 0


def measure(split: Split, chosen: argparse.Namespace) -> None:
    """Alternates the sources, prints a line and appends a record for each."""
    torch.set_num_threads(1)  # what is measured is the loader, not torch's own threads
    augment = preset(chosen.augment, ModelInput(size=chosen.size))
    difference = pixel_difference(split, augment, chosen.batch_size)
    kinds: tuple[SourceKind, ...] = ("torch", "dali")
    wall: dict[SourceKind, list[float]] = {kind: [] for kind in kinds}
    cpu: dict[SourceKind, list[float]] = {kind: [] for kind in kinds}
    for number in range(chosen.rounds):
        for kind in kinds if number % 2 == 0 else kinds[::-1]:
            seconds = one_round(
                kind,
                split,
                augment,
                batch_size=chosen.batch_size,
                batches=chosen.batches,
                workers=chosen.workers,
            )
            wall[kind].append(seconds[0])
            cpu[kind].append(seconds[1])
    described = environment.describe(torch.device("cpu"))
    identity = environment.identity(described)
    records.remember_environment(identity, described, chosen.records)
    mean_size = split.sizes.mean(axis=0)
    print(f"{'source':<8}{'images/s':>10}{'images per CPU-second':>24}{'pixel difference':>18}")
    for kind in kinds:
        # with several torch workers the decoding happens in other processes, whose time is not seen here
        here = kind == "dali" or chosen.workers == 1
        on_cpu = Quantiles.of(cpu[kind]) if here else None
        on_wall = Quantiles.of(wall[kind])
        records.append(
            {
                "op": "data",
                "size": f"{chosen.augment}-{chosen.size}px-B{chosen.batch_size}-w{chosen.workers}",
                "dtype": "float32",
                "device": "cpu",
                "pass": "load",
                "candidate": kind,
                "seconds": asdict(on_wall),
                "cpu_seconds": None if on_cpu is None else asdict(on_cpu),
                "rounds": chosen.rounds,
                "images_per_round": chosen.batches * chosen.batch_size,
                "mean_width": round(float(mean_size[0]), 1),
                "mean_height": round(float(mean_size[1]), 1),
                "data_digest": split.digest,
                "mean_absolute_pixel_difference": difference,
                "environment": identity,
                "commit": environment.commit(),
                "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "note": "seconds are per image, start-up left out",
            },
            chosen.records,
        )
        per_cpu = "-" if on_cpu is None else f"{1 / on_cpu.p50:.0f}"
        print(f"{kind:<8}{1 / on_wall.p50:>10.0f}{per_cpu:>24}{difference:>18.3f}")


if __name__ == "__main__":
    sys.exit(main())
