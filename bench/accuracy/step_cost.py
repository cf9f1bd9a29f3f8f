"""``python -m bench.accuracy.step_cost --data DIR``: the time of a training step of each method over plain fine-tuning.

Whole engine steps are timed: forward of all networks and views, losses, backward, optimizer, banks and queues. The
batches are made before, so decoding is not in it; further views cost decoding time too. In every round each method
makes one step, beside one of plain fine-tuning, and the ratio is taken of the two.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import cycle, islice
from pathlib import Path

import torch

from bench import environment
from bench.accuracy.keep import FOLDER
from bench.timing import Quantiles, alternate, paired_ratio
from mooring import Engine
from mooring.config.load import load_config

FILE = "step_cost.jsonl"
BASE = "fine_tune"
METHODS: dict[str, Sequence[str]] = {
    name: (f"method={name}",)
    for name in (
        "linear_probe", "l2_sp", "feature_map", "delta", "bss", "stoch_norm", "lwf", "feature_distillation",
        "co_tuning", "bi_tuning", "core_tuning", "dr_tune", "tes", "daft", "dr_tune+tes", "daft+dr_tune+tes",
    )
}  # fmt: skip
METHODS |= {
    # the contrasts are part of the step from the first one on
    "concept_tuning": ("method=concept_tuning", "method.contrast_warm_up=0.0"),
    "concept_tuning, channel slices": (
        "method=concept_tuning",
        "method.contrast_warm_up=0.0",
        "method.concept_source=channel_slices",
    ),
    "soft_fine_tuning, distilling": ("method=soft_fine_tuning", "method.source=distill"),
}
_ROUNDS, _STEPS = 3, 10  # one refresh of DR-Tune's rotation a round


class Stepper:
    """Engine steps on batches that are ready."""

    def __init__(self, words: Sequence[str]) -> None:
        self.engine = Engine.build(load_config(None, words))
        self.engine.prepare()
        self.batches = cycle([batch for group in islice(self.engine.epoch_groups(), 3) for batch in group])
        self.engine.train_source.close()

    def __call__(self) -> None:
        for _ in range(_STEPS):
            self.engine.step(next(self.batches))
            self.engine.global_step %= self.engine.total_steps - 1  # the schedule has no end here


def measure(label: str, common: Sequence[str], only: Sequence[str]) -> Iterator[dict[str, object]]:
    """One record per method; those that the encoder does not allow are left out, and said."""
    described = environment.describe(torch.device("cpu"))
    with_base = Stepper([*common, f"method={BASE}"])
    for method, words in METHODS.items():
        if only and method not in only:
            continue
        try:
            stepper = Stepper([*common, *words])
        except ValueError as err:
            print(f"{method}: left out: {str(err).splitlines()[0]}", flush=True)
            continue
        samples = alternate(
            {BASE: with_base, method: stepper},
            torch.device("cpu"),
            rounds=_ROUNDS,
            budget_seconds=60,
            warm_up=1,
        )
        ours, base = samples[method].seconds, samples[BASE].seconds
        ratios = paired_ratio(base, ours)
        yield {
            "what": "step_cost",
            "encoder": label,
            "method": method,
            "over": BASE,
            "times": asdict(ratios),
            "seconds": asdict(Quantiles.of([second / _STEPS for second in ours])),
            "rounds": len(ours),
            "steps_a_round": _STEPS,
            "settings": [
                word for word in (*common, *words) if not word.startswith(("data=", "model.weights="))
            ],
            "clock": "CPU time, one thread",
            "environment": described,
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        }
        print(f"{label}  {method:32} {ratios.p50:.2f} ({ratios.p20:.2f} to {ratios.p80:.2f})", flush=True)
        stepper.engine.close()
    with_base.engine.close()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.accuracy.step_cost", description=__doc__)
    parser.add_argument("--assets", type=Path, required=True, help="folder with weights/ and datasets/")
    parser.add_argument("--methods", default="", help="comma-separated; none: all")
    parser.add_argument("--encoders", default="", help="comma-separated; none: both")
    parser.add_argument("--records", type=Path, default=FOLDER, help="where the record is written")
    args = parser.parse_args()
    weights = args.assets / "weights"
    common = (
        f"data={args.assets}/datasets/flowers12", "train.image_size=96", "train.eval_size=96", "train.batch_size=32",
        "train.threads=1", "data.workers=1", "data.source=torch", "report.progress=quiet",
    )  # fmt: skip
    only = [name for name in args.methods.split(",") if name]
    encoders = {
        "tf_efficientnet_lite0": "tf_efficientnet_lite0.in1k.fp16.safetensors",
        "vit_tiny_patch16_224": "vit_tiny_patch16_224.augreg_in21k_ft_in1k.fp16.safetensors",
    }
    args.records.mkdir(parents=True, exist_ok=True)
    for name in encoders if not args.encoders else args.encoders.split(","):
        words = (*common, f"model.name={name}", f"model.weights={weights / encoders[name]}")
        for record in measure(name, words, only):
            with (args.records / FILE).open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
