"""What `mooring plan` says of a rank's memory, against what its tensors hold in real steps on two ranks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from ranks import RankPool

from bench.distributed.memory import predict
from bench.distributed.runs import write_data

CLASSES = 10


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:  # before the ranks start: they inherit it
        patch.setenv("MOORING_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("memory")
    write_data(folder, CLASSES, 4 * CLASSES, 64, models=())
    bucket = {"zero_optimization": {"reduce_bucket_size": 1_000_000}}
    (folder / "bucket.json").write_text(json.dumps(bucket), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    "stage", [pytest.param(0, marks=pytest.mark.slow), 1, pytest.param(2, marks=pytest.mark.slow), 3]
)
def test_a_rank_holds_what_the_plan_says(two_ranks: RankPool, photos: Path, stage: int) -> None:
    """At the worst moment of a step: parameters, gradients, optimizer, buffers, activations, frozen encoder, bank."""
    settings = [
        f"data={photos}/photos", "model.name=vit_tiny_patch16_224", "model.weights=none", "train.image_size=64",
        "train.eval_size=64", "train.batch_size=16", "train.device=cpu", "data.source=torch", "data.workers=1",
        "report.progress=quiet", "method=dr_tune", "method.bank_size=512", "backend.name=deepspeed",
        f"backend.zero_stage={stage}", f"backend.deepspeed_config={photos}/bucket.json",
    ]  # fmt: skip
    predicted = predict(settings, 2, stage, CLASSES)
    for measured in two_ranks.run("bench.distributed.memory:measure", settings=settings):
        assert predicted["worst_moment"] == pytest.approx(measured["worst_moment"], rel=0.15)
        kept = ("parameters", "optimizer", "constants", "banks")
        held = sum(predicted[part] for part in kept)
        if stage == 3:  # parts of gradients and the bucket stay from step to step
            held += predicted["gradients"] + 4 * 1_000_000
        assert held == pytest.approx(measured["between_steps"], rel=0.15)
