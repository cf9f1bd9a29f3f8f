"""``python -m bench.distributed.memory``: bytes of a rank, as ``mooring plan`` predicts them and as they are.

Whole engine steps on two gloo ranks, ZeRO 0 to 3. Measured is what tensors hold: every storage that is alive between
two steps, and on top of them every storage that a step makes, followed operation by operation to its worst moment
(``mooring.capacity.storages.Ledger``). Memory that is reserved and never written counts, as it does on a GPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import warnings
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from torch import Tensor

from bench.distributed.runs import record, start, without_folder, words, write_data
from mooring.capacity.prediction import Cluster, Predictor
from mooring.capacity.storages import Ledger
from mooring.config.load import load_config
from mooring.distributed import Ranks
from mooring.train.engine import Engine

CLASSES = 100
# label -> model, pixels, images of a rank, method, elements of DeepSpeed's bucket (None: its own 500 million)
CASES: dict[str, tuple[str, int, int, str, int | None]] = {
    "ViT-Ti/16, fine_tune": ("vit_tiny_patch16_224", 96, 8, "fine_tune", 2_000_000),
    "ViT-Ti/16, dr_tune": ("vit_tiny_patch16_224", 96, 8, "dr_tune", 2_000_000),
    "ViT-S/16, dr_tune": ("vit_small_patch16_224", 224, 4, "dr_tune", 10_000_000),
    "ViT-B/16, fine_tune": ("vit_base_patch16_224", 224, 2, "fine_tune", 50_000_000),
    "ViT-B/16, fine_tune, DeepSpeed's own bucket": ("vit_base_patch16_224", 224, 2, "fine_tune", None),
}


def storages() -> dict[int, tuple[Tensor, int]]:
    """Every storage that a living tensor on the CPU holds: address -> a tensor of it, bytes."""
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some objects warn when they are looked at
        gc.collect()
        for each in gc.get_objects():
            if issubclass(type(each), Tensor) and each.device.type == "cpu":
                storage = each.untyped_storage()
                found[storage.data_ptr()] = each, storage.nbytes()
    return found


def measure(settings: Sequence[str]) -> dict[str, int]:
    """Bytes of this rank: between two steps, and at the worst moment of a step; batches of images aside."""
    before = set(storages())
    with Engine.build(load_config(None, list(settings))) as engine:
        engine.prepare()
        group = next(iter(engine.epoch_groups()))
        engine.train_source.close()
        engine.step(group)  # makes the optimizer's state
        own = {
            t.untyped_storage().data_ptr() for batch in group for t in (batch.images, batch.labels, batch.ids)
        }
        known = storages()
        between = sum(size for place, (_, size) in known.items() if place not in before | own)
        with closing(Ledger()) as ledger, ledger:
            ledger.ignore(tensor for tensor, _ in known.values())
            engine.step(group)
        del known
    return {"between_steps": between, "worst_moment": between + ledger.peak}


def predict(settings: Sequence[str], world: int, stage: int) -> dict[str, float]:
    predictor = Predictor(load_config(None, list(settings)), CLASSES, precision="fp32", overhead=0)
    way = predictor.predict(Cluster(1, world, 1e12), stage)  # type: ignore[arg-type]
    parts = {
        "parameters": way.model.parameters,
        "gradients": way.model.gradients,
        "optimizer": way.model.optimizer,
        "buffers": way.model.buffers,
        "activations": way.activations,
        "constants": way.constants,
        "banks": way.banks,
    }
    return {**parts, "worst_moment": way.memory}


def settings_of(folder: Path, label: str, stage: int, world: int) -> list[str]:
    model, side, images, method, bucket = CASES[label]
    chosen = [
        word for word in words(folder, "vit", method, side=side, batch=images * world) if "model." not in word
    ]
    if bucket is not None:
        file = folder / f"bucket-{bucket}.json"
        file.write_text(json.dumps({"zero_optimization": {"reduce_bucket_size": bucket}}), encoding="utf-8")
        chosen.append(f"backend.deepspeed_config={file}")
    return [
        *chosen, f"model.name={model}", "model.weights=none", "backend.name=deepspeed", f"backend.zero_stage={stage}",
    ]  # fmt: skip


def worker(folder: Path, labels: Sequence[str]) -> None:
    from mooring.distributed import launched_ranks

    world = launched_ranks().world
    for label in labels:
        for stage in range(4):
            settings = settings_of(folder, label, stage, world)
            every = Ranks.here().gather(measure(settings)) if stage or True else []
            if not Ranks.here().is_first:
                continue
            predicted = predict(settings, world, stage)
            measured = {name: max(each[name] for each in every) for name in every[0]}
            record(
                "memory",
                {
                    "what": "memory", "case": label, "world": world, "zero_stage": stage, "bucket": CASES[label][4],
                    "images_of_a_rank": CASES[label][2], "pixels": CASES[label][1], "measured": measured,
                    "predicted": predicted, "settings": without_folder(settings, folder),
                },
            )  # fmt: skip
            ratio = predicted["worst_moment"] / measured["worst_moment"]
            print(
                label,
                stage,
                {
                    k: round(v / 1e6, 1)
                    for k, v in {**measured, **{"p." + k: v for k, v in predicted.items()}}.items()
                },
                f"{ratio:.2f}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.distributed.memory", description=__doc__)
    parser.add_argument("--cases", nargs="*", default=list(CASES))
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker, args.cases)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder, CLASSES, 2 * CLASSES, 96)
        start("bench.distributed.memory", 2, folder, "--cases", *args.cases)


if __name__ == "__main__":
    main()
