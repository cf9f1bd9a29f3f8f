"""A model that is read parameter by parameter, each divided at once, is the one that every rank loads whole."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loading_cases import memory_of_loading  # noqa: F401  fails here, and not in a rank, if it cannot be imported
from PIL import Image
from ranks import RankPool, rank_pool
from safetensors.torch import load_file, save_file

from mooring.config.method_settings import FineTuneSettings
from mooring.config.schema import RunConfig
from mooring.distributed import Ranks
from mooring.errors import ConfigError
from mooring.methods.registry import needs_of
from mooring.models.encoder import build_encoder
from mooring.models.torchvision_shim import import_timm
from mooring.report.metrics_log import read_metrics
from mooring.train import sharded_loading
from mooring.train.sharded_loading import loads_in_parts

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:  # before the ranks start: they inherit it
        patch.setenv("MOORING_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Weights of another image size, with a classifier and a wrapper's prefix: all that loading has to undo."""
    root = tmp_path_factory.mktemp("loading")
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 2), ("test", 2)):
        for label in range(3):
            folder = root / "photos" / split / f"class_{label}"
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 120, (40, 44, 3)) + 60 * label
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    torch.manual_seed(3)
    whole = import_timm().create_model("test_vit", num_classes=7)
    for name, half in (("single", False), ("half", True)):
        save_file(
            {f"module.{k}": (v.half() if half else v).clone() for k, v in whole.state_dict().items()},
            root / f"{name}.safetensors",
        )
    settings = root / "deepspeed.json"
    settings.write_text(json.dumps({"zero_optimization": {"stage3_param_persistence_threshold": 0}}))
    return {
        "data": {"path": str(root / "photos"), "source": "torch", "workers": 1},
        "model": {"name": "test_vit", "weights": str(root / "single.safetensors")},
        "train": {"epochs": 2, "batch_size": 6, "image_size": 32, "eval_size": 32, "device": "cpu"},
        "method": {"name": "fine_tune"},
        "report": {"progress": "quiet", "log_every": 1, "plots": False, "tensorboard": False},
        "backend": {
            "name": "deepspeed", "zero_stage": 3, "sharded_loading": True, "deepspeed_config": str(settings)
        },
    }  # fmt: skip


def changed(recipe: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return recipe | {
        key: recipe[key] | value if isinstance(recipe.get(key), dict) else value
        for key, value in changes.items()
    }


@pytest.mark.parametrize(
    "precision, offloaded",
    [("single", False), ("half", False), pytest.param("half", True, marks=pytest.mark.slow)],
)
def test_weights_are_those_of_the_whole_load(
    two_ranks: RankPool, recipe: dict[str, Any], precision: str, offloaded: bool
) -> None:
    file = Path(recipe["model"]["weights"]).with_name(f"{precision}.safetensors")
    tables = changed(recipe, model={"weights": str(file)}, backend={"offload_parameters": offloaded})
    whole = two_ranks.run("loading_cases:built", **changed(tables, backend={"sharded_loading": False}))
    parts = two_ranks.run("loading_cases:built", **tables)
    for found, expected in zip(parts, whole, strict=True):
        assert found["in_parts"] and not expected["in_parts"]
        assert found["weights"].keys() == expected["weights"].keys()
        for name, tensor in expected["weights"].items():
            assert torch.equal(found["weights"][name], tensor), name
        assert torch.equal(found["logits"], expected["logits"])
        assert found["divided"] and found["held"] == expected["held"] < 0.51 * found["elements"]


@pytest.mark.parametrize(
    "method", [{"name": "lp_ft"}, pytest.param({"name": "core_tuning"}, marks=pytest.mark.slow)], ids=str
)
def test_a_run_is_that_of_the_whole_load(
    two_ranks: RankPool, recipe: dict[str, Any], tmp_path: Path, method: dict[str, Any]
) -> None:
    """Losses, tests and the exported model, bit for bit; stopped by a signal and continued as well."""
    for name, setting in (("parts", True), ("whole", False)):
        tables = changed(recipe, method=method, backend={"sharded_loading": setting}) | {
            "out": str(tmp_path / name)
        }
        found = two_ranks.run("run_cases:stopped_and_continued", steps=4, **tables)
        assert found[0]["steps"] == 6
    parts, whole = (
        [(r.kind, r.step, dict(r.values)) for r in read_metrics(tmp_path / name) if r.kind != "system"]
        for name in ("parts", "whole")
    )
    timed = {"images_per_second", "step_seconds", "data_seconds"}
    assert [(k, s, _without(v, timed)) for k, s, v in parts] == [
        (k, s, _without(v, timed)) for k, s, v in whole
    ]
    one, other = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("parts", "whole"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def _without(values: dict[str, float], names: set[str]) -> dict[str, float]:
    return {name: value for name, value in values.items() if name not in names}


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "vit_tiny_patch16_224"])
def test_building_draws_the_same_numbers(name: str, tmp_path: Path) -> None:
    """So that the head, drawn next, does not depend on how the encoder was loaded."""
    file = tmp_path / "weights.safetensors"
    save_file({k: v.clone() for k, v in build_encoder(name, weights="none").model.state_dict().items()}, file)
    states = []
    for deferred in (False, True):
        torch.manual_seed(1)
        encoder = build_encoder(name, weights=file, image_size=64, deferred=deferred)
        states.append(torch.get_rng_state())
        assert all(p.is_meta == deferred for p in encoder.parameters())
        assert not any(b.is_meta for b in encoder.buffers())
    assert torch.equal(*states)


@pytest.mark.slow
def test_no_rank_holds_the_whole_model(tmp_path: Path) -> None:
    """The peak over loading and dividing: half a model and a layer, where the whole load takes the model."""
    torch.manual_seed(0)
    model = build_encoder("vit_base_patch16_224", weights="none").model
    file = tmp_path / "weights.safetensors"
    save_file({key: value.clone() for key, value in model.state_dict().items()}, file)
    size = 4 * sum(p.numel() for p in model.parameters())
    largest = 4 * max(p.numel() for p in model.parameters())
    del model
    found = {}
    for in_parts in (False, True):
        with rank_pool(2) as fresh:  # new processes: memory that was freed stays with a process
            found[in_parts] = fresh.run(
                "loading_cases:memory_of_loading",
                name="vit_base_patch16_224",
                file=str(file),
                in_parts=in_parts,
            )
    print(
        f"model {size >> 20} MiB, largest parameter {largest >> 20}, whole {found[False]}, in parts {found[True]}"
    )
    assert all(result["peak"] >= size for result in found[False])
    # beside the part: the parameter that is read, and small things
    assert all(result["peak"] <= size / 2 + 3 * largest for result in found[True])


def settings_of(recipe: dict[str, Any], **changes: Any) -> RunConfig:
    return RunConfig.model_validate(changed(recipe, **changes))


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"backend": {"zero_stage": 2}}, "backend.zero_stage=3; got deepspeed with 2"),
        ({"method": {"name": "dr_tune"}}, "method.name=dr_tune copies, reads or runs the whole encoder"),
        ({"model": {"weights": "none"}}, "must be a .safetensors file of their own"),
        ({"train": {"ema_decay": 0.9}}, "train.ema_decay keeps a whole average"),
        ({"report": {"distortion": True}}, "report.distortion keeps a whole pretrained encoder"),
    ],
)
def test_what_cannot_be_loaded_in_parts_is_refused(
    recipe: dict[str, Any], changes: dict[str, Any], says: str
) -> None:
    config = settings_of(recipe, **changes)
    with pytest.raises(ConfigError, match=says):
        loads_in_parts(config, needs_of(config.method), CPU, Ranks(0, 2, 0))


def test_auto_loads_in_parts_what_is_large(
    recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    needs = needs_of(FineTuneSettings())
    auto = settings_of(recipe, backend={"sharded_loading": "auto"})
    size = 4 * sum(t.numel() for t in load_file(recipe["model"]["weights"]).values())
    answers = []
    for memory in (3.9 * size, 4.1 * size):
        monkeypatch.setattr(sharded_loading, "_memory", lambda *_, memory=memory: memory)
        answers.append(loads_in_parts(auto, needs, CPU, Ranks(0, 2, 0)))
    assert answers == [True, False]
    monkeypatch.setattr(sharded_loading, "_memory", lambda *_: size)
    held = settings_of(recipe, backend={"sharded_loading": "auto"}, method={"name": "dr_tune"})
    assert not loads_in_parts(held, needs_of(held.method), CPU, Ranks(0, 2, 0))
    assert "every process loads the whole model" in caplog.text


def test_an_architecture_that_computes_from_its_parameters_is_refused(tmp_path: Path) -> None:
    name = "swin_tiny_patch4_window7_224"
    file = tmp_path / "weights.safetensors"
    save_file({k: v.clone() for k, v in build_encoder(name, weights="none").model.state_dict().items()}, file)
    with pytest.raises(ConfigError, match=r"cannot be loaded parameter by parameter.*attn_mask"):
        build_encoder(name, weights=file, deferred=True)
