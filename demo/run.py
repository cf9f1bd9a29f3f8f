"""The demo: linear probe, plain fine-tuning and DR-Tune on real photos of fruit, side by side.

The settings are those of demo/recipe.toml; the probe, which trains the head alone, has a rate of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from fetch import PHOTOS, demo_folder
from rich.console import Console
from rich.table import Table

from mooring import Engine, RunConfig, load_config
from mooring.data.scan import scan
from mooring.report.environment import collect_environment
from mooring.report.progress import counting

HERE = Path(__file__).resolve().parent
METHODS = {
    # forward only, so it gets more epochs, a head rate of its own, and bf16 where the CPU is fast at it
    "linear_probe": (
        "linear probe",
        ["optimizer.lr=2e-3", "optimizer.head_lr_multiplier=1", "train.epochs=8", "train.precision=bf16"],
    ),
    "fine_tune": ("plain fine-tuning", []),
    "dr_tune": ("DR-Tune", ["method.bank_size=512"]),
}
LONG = ["train.epochs=10", "schedule.warmup_epochs=1"]


def manifest_folder(out: Path) -> Path:
    """Scans the photos once and shows what was found."""
    folder = out / "photos"
    if not (folder / "manifest.json").is_file():
        with counting("scanning the photos", "images") as progress:
            report = scan(demo_folder() / PHOTOS.saved_as, out=folder, progress=progress)
        for line in report.lines():
            Console().print(f"  {line}", highlight=False)
    return folder


def settings(method: str, seed: int, photos: Path, run: Path, extra: list[str]) -> RunConfig:
    overrides = [
        f"data={photos}",
        f"method={method}",
        f"seed={seed}",
        f"out={run}",
        *METHODS[method][1],
        *extra,
    ]
    return load_config(HERE / "recipe.toml", overrides)


def one_run(
    method: str, seed: int, photos: Path, out: Path, extra: list[str], console: Console
) -> dict[str, Any]:
    """Trains, continues what was interrupted, or reads what is done; returns the record.

    Raises:
        SystemExit: the run was interrupted, or the folder holds a run of other settings.
    """
    run = out / f"{method}-seed{seed}"
    wanted = settings(method, seed, photos, run, extra)
    if (run / "config.toml").is_file():
        done = load_config(run / "config.toml", [])
        differing = [
            key for key in ("seed", "model", "method", "train", "optimizer", "schedule")
            if getattr(done, key) != getattr(wanted, key)
        ]  # fmt: skip
        if differing:
            raise SystemExit(
                f"{run} holds a run with other settings ({', '.join(differing)}): remove it, or take --out"
            )
    record = json.loads((run / "result.json").read_text()) if (run / "result.json").is_file() else None
    if record is None or record["interrupted"]:
        console.rule(f"{METHODS[method][0]}, seed {seed}", align="left")
        if Engine.build(wanted.model_copy(update={"resume": "auto"})).fit().interrupted:
            raise SystemExit(130)
        record = json.loads((run / "result.json").read_text())
    commit = json.loads((run / "environment.json").read_text())["commit"]
    return {**record, "run": run, "seed": seed, "commit": commit}


def shown(values: list[float], percent: bool = True) -> str:
    scale = 100 if percent else 1
    mean = f"{scale * statistics.mean(values):.1f}"
    spread = f" ± {scale * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return mean + spread + (" %" if percent else "")


def results_table(records: dict[str, list[dict[str, Any]]]) -> Table:
    table = Table(title="Fruit in a supermarket, 14 classes: photos of the test split", title_justify="left")
    table.add_column("method", no_wrap=True)
    for name in ("test top-1", "per class", "val top-1", "train images/s"):
        table.add_column(name, justify="right")
    for method, rows in records.items():
        table.add_row(
            METHODS[method][0],
            shown([r["test"]["top1"] for r in rows]),
            shown([r["test"]["mean_per_class"] for r in rows]),
            shown([r["val"]["top1"] for r in rows]),
            shown([r["images_per_second"] for r in rows], percent=False),
        )
    return table


def write_record(path: Path, records: dict[str, list[dict[str, Any]]], long: bool) -> None:
    """One JSON line with every run's figures and the environment."""
    runs = {m: [{k: v for k, v in r.items() if k != "run"} for r in rows] for m, rows in records.items()}
    line = {
        "what": "demo-long" if long else "demo",
        "time": time.strftime("%Y-%m-%d", time.gmtime()),
        "threads": torch.get_num_threads(),
        "environment": collect_environment(),
        "runs": runs,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo-runs"))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--long", action="store_true", help="10 epochs of fine-tuning instead of 3")
    parser.add_argument("--record", type=Path, help="append the results to this file, one JSON line")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings for all runs")
    options = parser.parse_args()
    out = options.out / "long" if options.long else options.out
    extra = [*(LONG if options.long else []), *options.set]
    console, started = Console(), time.perf_counter()
    photos = manifest_folder(options.out)
    records: dict[str, list[dict[str, Any]]] = {method: [] for method in options.methods}
    for seed in options.seeds:
        for method in options.methods:
            records[method].append(one_run(method, seed, photos, out, extra, console))
    console.print()
    console.print(results_table(records))
    minutes = (time.perf_counter() - started) / 60
    console.print(
        f"{minutes:.1f} minutes. Each run looked at the test split once, after its best epoch was chosen."
    )
    console.print("The probe trains the head alone: its images/s are forward passes.")
    for rows in records.values():
        for r in rows:
            console.print(f"  {r['run']}/  curves.png, confusion.png, model/", highlight=False)
    if options.record:
        write_record(options.record, records, options.long)


if __name__ == "__main__":
    main()
