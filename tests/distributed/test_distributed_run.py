"""The same recipe on one process and on two: the same images, the same losses, one run folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import RankPool
from run_cases import fit, seen
from safetensors.torch import load_file

from mooring.report.metrics_log import read_metrics


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A short run on generated photos: 3 classes; 30 training images, 7 of them for validation, 7 for the test."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for split, count in (("train", 10), ("val", 3), ("test", 2)):
        for label in range(3):
            folder = root / split / f"class_{label}"
            folder.mkdir(parents=True)
            for number in range(count + (split != "train" and label == 0)):
                pixels = rng.integers(0, 120, (40, 44, 3)) + 60 * label
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    return {
        "data": {"path": str(root), "source": "torch", "workers": 1},
        "model": {"name": "test_vit", "weights": "none"},
        "train": {"epochs": 2, "batch_size": 6, "image_size": 32, "eval_size": 32, "device": "cpu"},
        "method": {"name": "dr_tune", "bank_size": 12, "rotation_period": 2},
        "report": {"progress": "quiet", "log_every": 1, "plots": False, "tensorboard": False},
    }


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:  # before the ranks start: they inherit it
        patch.setenv("MOORING_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def with_changes(recipe: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return recipe | {
        key: recipe[key] | value if isinstance(recipe.get(key), dict) else value
        for key, value in changes.items()
    }


def divided(folder: Path) -> Path:
    """Settings under which DeepSpeed leaves no parameter whole at stage 3, however small."""
    file = folder / "deepspeed.json"
    file.write_text(json.dumps({"zero_optimization": {"stage3_param_persistence_threshold": 0}}))
    return file


def losses(run: Path) -> list[float]:
    return [record.values["loss"] for record in read_metrics(run) if record.kind == "train"]


def test_two_ranks_see_each_image_once(two_ranks: RankPool, recipe: dict[str, Any]) -> None:
    alone = seen(**recipe)
    ranks = two_ranks.run("run_cases:seen", **recipe)
    assert [first + second for first, second in zip(*ranks, strict=True)] == alone


def test_a_run_of_two_ranks_is_the_run_of_one(
    two_ranks: RankPool, recipe: dict[str, Any], tmp_path: Path
) -> None:
    alone = fit(**with_changes(recipe, out=str(tmp_path / "one")))
    both = two_ranks.run(
        "run_cases:fit", **with_changes(recipe, out=str(tmp_path / "two"), backend={"name": "ddp"})
    )
    for result in both:
        assert result["batch"] == 3 and result["steps"] == alone["steps"] == 10
        assert result["backend"] == "ddp" and result["best_epoch"] == alone["best_epoch"]
        assert result["val"][1] == alone["val"][1] == 10 and result["test"][1] == alone["test"][1] == 7
        assert torch.equal(result["val"][2], alone["val"][2])
        for key in ("val", "test"):
            assert result[key][0] == pytest.approx(alone[key][0], rel=1e-4, abs=1e-5)
            assert result[key][0] == both[0][key][0]  # the same numbers on every rank
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    assert (tmp_path / "two" / "model" / "model.safetensors").is_file()
    assert (tmp_path / "two" / "result.json").is_file()


@pytest.mark.parametrize("stage", [1, 3])
def test_deepspeed_runs_validates_averages_and_exports(
    two_ranks: RankPool, recipe: dict[str, Any], tmp_path: Path, stage: int
) -> None:
    averaged = with_changes(recipe, train={"ema_decay": 0.8, "clip_grad_norm": 1.0})
    alone = fit(**averaged, out=str(tmp_path / "one"))
    both = two_ranks.run(
        "run_cases:fit",
        **averaged,
        out=str(tmp_path / "two"),
        backend={"name": "deepspeed", "zero_stage": stage, "deepspeed_config": str(divided(tmp_path))},
    )
    for result in both:
        assert result["backend"] == "deepspeed"
        assert torch.equal(result["val"][2], alone["val"][2])
        assert result["val"][0] == pytest.approx(alone["val"][0], rel=1e-4, abs=1e-5)
        assert result["test"][0] == pytest.approx(alone["test"][0], rel=1e-4, abs=1e-5)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    one, two = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "stage, precision",
    [
        ("ddp", "fp32"),
        (1, "fp32"),
        (2, "bf16"),
        (3, "fp32"),
        *(pytest.param(s, "fp32", marks=pytest.mark.slow) for s in (0, 2)),
        *(pytest.param(s, "bf16", marks=pytest.mark.slow) for s in (0, 1, 3)),
    ],
)
def test_a_signal_to_one_rank_stops_all_and_the_run_continues_exactly(
    two_ranks: RankPool, recipe: dict[str, Any], tmp_path: Path, stage: int | str, precision: str
) -> None:
    """DR-Tune with banks of their own: each rank's state is in its part of the checkpoint."""
    backend: dict[str, Any] = {"name": "ddp"}
    if isinstance(stage, int):
        file = str(divided(tmp_path))
        backend = {"name": "deepspeed", "zero_stage": stage, "deepspeed_config": file}
    private = with_changes(recipe, method={"bank_scope": "private"}, train={"precision": precision})
    private["backend"] = backend
    whole = two_ranks.run("run_cases:fit", **private, out=str(tmp_path / "whole"))
    parts = two_ranks.run("run_cases:stopped_and_continued", steps=7, **private, out=str(tmp_path / "parts"))
    for one, other in zip(whole, parts, strict=True):
        assert one["val"][0] == other["val"][0] and one["test"] == other["test"]
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    one, two = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(one[name], two[name]) for name in one)


# a setting, and how far losses may be from those of one process with it
SETTINGS: dict[str, tuple[dict[str, Any], float]] = {
    # a product of other shapes is rounded otherwise, to 3 digits
    "bf16": ({"train": {"precision": "bf16"}}, 0.01),
    "activation checkpointing": ({"backend": {"activation_checkpointing": True}}, 1e-4),
    "rates by layer": ({"optimizer": {"layer_decay": 0.6}}, 1e-4),
}


@pytest.mark.parametrize(
    "setting, stage",
    [
        pytest.param(
            name, stage, marks=() if stage == 1 + 2 * (name != "rates by layer") else pytest.mark.slow
        )
        for name in SETTINGS
        for stage in range(4)
    ],
)
def test_a_setting_does_on_two_ranks_what_it_does_on_one(
    two_ranks: RankPool, recipe: dict[str, Any], tmp_path: Path, setting: str, stage: int
) -> None:
    changes, tolerance = SETTINGS[setting]
    backend = {"name": "deepspeed", "zero_stage": stage, "deepspeed_config": str(divided(tmp_path))}
    recipe = recipe | {"method": {"name": "fine_tune"}}
    tables = with_changes(recipe, **changes)
    plain, alone, both = (tmp_path / name for name in ("plain", "one", "two"))
    fit(**recipe, out=str(plain))
    fit(**tables, out=str(alone))
    two_ranks.run(
        "run_cases:fit", **tables | {"backend": changes.get("backend", {}) | backend}, out=str(both)
    )
    assert losses(both) == pytest.approx(losses(alone), rel=tolerance)
    if setting != "activation checkpointing":  # which changes no number
        assert losses(alone) != losses(plain)


BACKENDS: list[dict[str, Any]] = [
    {"name": "ddp"},
    *({"name": "deepspeed", "zero_stage": stage} for stage in range(4)),
]


def test_a_loss_that_is_no_number_on_one_rank_reaches_no_weights(
    two_ranks: RankPool, recipe: dict[str, Any], tmp_path: Path
) -> None:
    weights, told = [], set()
    for number, backend in enumerate(BACKENDS):
        tables = with_changes(recipe, train={"epochs": 1, "clip_grad_norm": 1.0}) | {"backend": backend}
        left_out = two_ranks.run(
            "run_cases:with_a_fault", policy="skip", **tables, out=str(tmp_path / f"s{number}")
        )
        stopped = two_ranks.run(
            "run_cases:with_a_fault", policy="stop", **tables, out=str(tmp_path / f"t{number}")
        )
        for one, other in zip(left_out, stopped, strict=True):
            assert one["unmoved"] == [False, False, True, False, False] and not one["said"], backend
            assert other["unmoved"] == [False, False, True] and "The step was not taken" in other["said"], (
                backend
            )
            told.add(other["said"].partition(". The step")[0])
        weights.append(left_out[0]["weights"])
    assert len(told) == 1 and "the gradient is not finite in" in told.pop()  # the same layers in each
    for backend, found in zip(BACKENDS, weights, strict=True):
        for name, tensor in weights[0].items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-5, msg=f"{backend} {name}")


@pytest.mark.parametrize("source", ["torch", "dali"])
def test_an_image_that_one_rank_cannot_read_stops_all_and_the_run_continues_exactly(
    two_ranks: RankPool, recipe: dict[str, Any], tmp_path: Path, source: str
) -> None:
    tables = with_changes(recipe, data={"source": source}) | {"backend": {"name": "ddp"}}
    whole = two_ranks.run("run_cases:fit", **tables, out=str(tmp_path / "whole"))
    image = str(Path(recipe["data"]["path"]) / "train" / "class_1" / "3.png")
    said = two_ranks.run("run_cases:with_a_lost_image", image=image, **tables, out=str(tmp_path / "parts"))
    assert all(image in text and "the state before it is kept" in text for text in said)
    assert sum(text.startswith("rank ") for text in said) == 1  # the other one's words
    parts = two_ranks.run("run_cases:fit", **tables, out=str(tmp_path / "parts"), resume="auto")
    for one, other in zip(whole, parts, strict=True):
        assert one["val"][0] == other["val"][0] and one["test"] == other["test"]
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_warnings_of_other_ranks_reach_the_first(two_ranks: RankPool, recipe: dict[str, Any]) -> None:
    assert two_ranks.run("run_cases:warned", **recipe) == [["rank 1: said by one"], []]


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"train": {"batch_size": 5}}, "multiple of their number; got 5 for 2 processes: take 4"),
        ({"backend": {"name": "local"}}, "backend.name=local is for one process"),
        (
            {"method": {"name": "dr_tune", "bank_size": 13, "bank_scope": "sharded"}},
            "multiple of the 2 ranks",
        ),
        ({"model": {"weights": "/nowhere.safetensors"}}, "does not exist"),
    ],
)
def test_what_cannot_be_shared_is_refused_by_all(
    two_ranks: RankPool, recipe: dict[str, Any], changes: dict[str, Any], says: str
) -> None:
    for message in two_ranks.run("run_cases:refused", **with_changes(recipe, **changes)):
        assert says in message
