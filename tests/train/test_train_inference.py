"""A run folder as a classifier: which images it measures on, files it cannot read, damage it meets."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
import torch

from mooring.config.load import load_config, to_toml
from mooring.data.cache import open_manifest
from mooring.errors import DataError, RunFolderError
from mooring.models.encoder import build_encoder
from mooring.models.export import export
from mooring.models.head import build_head
from mooring.report.run_folder import RunFolder
from mooring.train.inference import Predictor, load_run


@pytest.fixture(scope="module")
def exported(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with what inference reads: settings, manifest, model."""
    run = tmp_path_factory.mktemp("exported") / "run"
    run.mkdir()
    settings = [f"data={photos}", "data.source=torch", "data.workers=1", "model.name=resnet10t"]
    RunFolder(run).write_text("config.toml", to_toml(load_config(None, settings)))
    manifest = open_manifest(photos, run.parent / "cache")
    manifest.save(run / "manifest")
    torch.manual_seed(0)
    encoder = build_encoder("resnet10t", weights="none")
    head = build_head(encoder.feature_dim, len(manifest.classes), std=0.5)
    export(encoder, head, run / "model", manifest.classes, data_config={"input_size": (3, 32, 32)})
    return run


@pytest.fixture
def run(exported: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(exported, tmp_path / "run"))


@pytest.fixture(scope="module")
def predictor(exported: Path) -> Predictor:
    return load_run(exported)


# ---------------------------------------------------------------- evaluation


def test_the_test_split_is_measured_where_there_is_one(predictor: Predictor) -> None:
    assert predictor.evaluation_split().name == "test"
    assert predictor.evaluate().n == 12
    assert predictor.evaluation_split(split="val").name == "val"


def test_validation_is_measured_where_there_is_no_test(run: Path, photos: Path, tmp_path: Path) -> None:
    open_manifest(photos / "train", tmp_path / "cache").save(run / "manifest")
    predictor = load_run(run)
    rows = predictor.evaluation_split()
    assert rows.name == "val"
    assert predictor.evaluate_split(rows).n == len(rows) > 0


def test_other_images_are_one_test_split_with_the_labels_of_the_run(
    predictor: Predictor, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOORING_CACHE", str(tmp_path / "cache"))
    shutil.copytree(photos / "test" / "class_2", tmp_path / "other" / "class_2")
    rows = predictor.evaluation_split(tmp_path / "other")
    assert rows.name == "test"
    assert rows.labels.tolist() == [2] * 4
    assert predictor.evaluate_split(rows).confusion.sum(1).tolist() == [0, 0, 4]


def test_data_of_other_classes_is_refused(
    predictor: Predictor, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOORING_CACHE", str(tmp_path / "cache"))
    shutil.copytree(photos / "test", tmp_path / "other")
    (tmp_path / "other" / "class_2").rename(tmp_path / "other" / "class_9")
    with pytest.raises(DataError, match="class_9"):
        predictor.evaluation_split(tmp_path / "other")


# ---------------------------------------------------------------- files


@pytest.fixture
def files(photos: Path, tmp_path: Path) -> list[Path]:
    """38 files, more than a batch; the third and the last cannot be read."""
    images = sorted((photos / "train").rglob("*.jpg"))
    assert len(images) == 36
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    images[2:2] = [broken]
    return [*images, tmp_path / "missing.jpg"]


def test_a_bad_file_ends_nothing_where_it_may_be_left_out(predictor: Predictor, files: list[Path]) -> None:
    problems: dict[Path, str] = {}

    def unreadable(path: Path, problem: DataError) -> None:
        problems[path] = str(problem)

    results = dict(predictor.predict_each(files, unreadable))
    bad = [files[2], files[-1]]
    assert list(problems) == bad
    assert all(str(path) in problem for path, problem in problems.items())
    good = [path for path in files if path not in bad]
    assert list(results) == good
    # the same batches give the same bits
    assert list(results.values())[:31] == predictor.predict_files(good[:31])


def test_results_come_before_the_files_behind_them_are_read(predictor: Predictor, files: list[Path]) -> None:
    answers = predictor.predict_each([*files[3:37], files[2]])
    assert [path for path, _ in islice(answers, 34)] == files[3:37], "also the good ones of the last batch"
    with pytest.raises(DataError, match=r"cannot decode .*broken\.jpg"):
        next(answers)


def test_a_bad_file_is_an_error_by_default(predictor: Predictor, files: list[Path]) -> None:
    with pytest.raises(DataError, match=r"broken\.jpg"):
        predictor.predict_files(files)


# ---------------------------------------------------------------- damage


def _edit_config(change: Callable[[dict[str, object]], object]) -> Callable[[Path], None]:
    def damage(model: Path) -> None:
        content = json.loads((model / "config.json").read_text())
        change(content)
        (model / "config.json").write_text(json.dumps(content))

    return damage


def _cut(name: str) -> Callable[[Path], None]:
    def damage(model: Path) -> None:
        content = (model / name).read_bytes()
        (model / name).write_bytes(content[: len(content) // 2])

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        _cut("config.json"),
        _cut("model.safetensors"),
        lambda model: (model / "model.safetensors").unlink(),
        lambda model: (model / "config.json").write_text("[]"),
        _edit_config(lambda content: content.pop("label_names")),
        _edit_config(lambda content: content.pop("pretrained_cfg")),
        _edit_config(lambda content: content.pop("architecture")),
        _edit_config(lambda content: content.update(architecture="no_such_net")),
        _edit_config(lambda content: content.update(label_names=["a"])),
    ],
    ids=[
        "half-json", "half-weights", "no-weights", "other-json", "no-names", "no-preprocessing", "no-architecture",
        "unknown-architecture", "too-few-names",
    ],
)  # fmt: skip
def test_a_damaged_export_is_named(damage: Callable[[Path], None], run: Path) -> None:
    damage(run / "model")
    with pytest.raises(RunFolderError, match=r"the exported model is damaged \(.+\): train again, or"):
        load_run(run)


def test_a_run_without_an_export_says_so(run: Path) -> None:
    shutil.rmtree(run / "model")
    with pytest.raises(RunFolderError, match="expected an exported model"):
        load_run(run)
