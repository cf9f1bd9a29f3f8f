"""A run that measures, epoch by epoch, what its encoder tells apart beyond the classes of the run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from mooring import Engine
from mooring.cli import app
from mooring.config.load import absolute_paths
from mooring.errors import ConfigError, DataError
from mooring.models.torchvision_shim import import_timm
from mooring.report.discrimination import nearest_mean_accuracy, recall_at_1
from mooring.report.metrics_log import read_metrics

MEASURED = ["unseen_recall_at_1", "unseen_nearest_mean", "source_top1"]


@pytest.fixture(scope="session")
def many(photos_in, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photos_in(tmp_path_factory.mktemp("many"), classes=5, train=6, test=2, size=36)


@pytest.fixture(scope="session")
def other_task(photos_in, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four classes, in sizes that make other bytes."""
    return photos_in(tmp_path_factory.mktemp("task"), classes=4, train=8, test=1, size=44)


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    file = tmp_path_factory.mktemp("weights") / "four.safetensors"
    save_file(import_timm().create_model("resnet10t", num_classes=4).state_dict(), file)
    return file


@pytest.fixture
def config(make_config, many: Path, other_task: Path, weights: Path):
    def build(**changes: object):
        tables: dict[str, dict] = {
            "data": {"path": many, "unseen_classes": 2},
            "model": {"weights": str(weights)},
            "report": {"discrimination": True, "source": other_task, "plots": False},
        }
        for name, change in changes.items():
            tables[name] = {**tables.get(name, {}), **change}  # type: ignore[dict-item]
        return make_config(**tables)

    return build


def test_every_epoch_is_logged_and_the_selected_one_reported(config) -> None:
    with Engine.build(config()) as engine:
        assert engine.parts.num_classes == 3 and engine.parts.held_out is not None
        unseen, own = engine.parts.held_out.unseen, engine.parts.held_out.source
        assert unseen is not None and own is not None
        first = engine.discrimination()
        assert first.n == 16, "all images of the two classes, of every split"
        engine.method.eval()
        with torch.no_grad():
            unseen.rewind()
            pairs = [(engine.method.encoder(b.images), b.labels) for b in unseen]
        features, labels = (torch.cat(part) for part in zip(*pairs, strict=True))
        assert first.recall_at_1 == recall_at_1(features, labels)
        assert first.nearest_mean == nearest_mean_accuracy(features, labels)
        result = engine.fit()
    logged = [record for record in read_metrics(result.run) if record.kind == "discrimination"]
    assert [(record.step, record.epoch) for record in logged] == [(0, 0), (2, 0), (4, 1)]
    assert all(list(record.values) == MEASURED for record in logged)
    assert result.discrimination["pretrained"] == logged[0].values == first.scalars()
    assert result.best_epoch is not None
    assert result.discrimination["selected"] == logged[1 + result.best_epoch].values
    record = json.loads((result.run / "result.json").read_text(encoding="utf-8"))
    assert record["discrimination"] == result.discrimination
    shown = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["info", str(result.run)]).output
    assert "unseen Recall@1" in shown and "pretrained" in shown
    assert any(p.name.startswith("events") for p in (result.run / "tensorboard").iterdir())
    # the exported model and the run's own evaluation know the classes of the run only
    shown = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["eval", str(result.run)])
    assert shown.exit_code == 0, shown.output

    resumed = Engine.build(config().model_copy(update={"resume": "auto"})).fit()
    assert resumed.discrimination == result.discrimination


def test_the_measurement_does_not_change_the_run(config) -> None:
    ends = []
    for measures in (True, False):
        report = {} if measures else {"discrimination": False, "source": None}
        with Engine.build(config(report=report, train={"batchnorm": "train"})) as engine:
            for group in engine.epoch_groups():
                if measures:
                    engine.discrimination()
                engine.step(group)
            ends.append({k: v.clone() for k, v in engine.method.state_dict().items()})
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_the_methods_own_source_head_answers_for_its_task(config, other_task: Path) -> None:
    changes = {"method": {"name": "soft_fine_tuning", "source_data": other_task}, "report": {"source": None}}
    with Engine.build(config(**changes)) as engine:
        assert engine.parts.held_out is not None
        assert engine.parts.held_out.source_head is engine.method.source_head
        before = engine.discrimination().source_top1
        with torch.no_grad():
            engine.method.source_head.weight.zero_()
            engine.method.source_head.bias.copy_(torch.tensor([0.0, 0.0, 9.0, 0.0]))
        after = engine.discrimination().source_top1
        # one answer for all images of four equally frequent classes
        assert before is not None and after == pytest.approx(0.25)
        # validation and training images of the source task are not the same ones
        stream = engine.source_stream
        assert stream is not None
        own = set(engine.parts.held_out.source.split.sha256)
        assert own and not own & set(stream.source.split.sha256)


def test_a_folder_of_unseen_classes(config, many: Path, elsewhere: Path) -> None:
    changes = {"data": {"unseen_classes": None}, "report": {"unseen": elsewhere, "source": None}}
    with Engine.build(config(**changes)) as engine:
        assert engine.parts.num_classes == 5
        assert list(engine.discrimination().scalars()) == MEASURED[:2]
    with pytest.raises(DataError, match=r"report\.unseen.*40 of the 40"):
        Engine.build(config(**{**changes, "report": {"unseen": many, "source": None}}))


def test_what_cannot_be_measured_is_refused_before_any_training(config, many: Path) -> None:
    with pytest.raises(ConfigError, match="unseen_classes=N"):
        Engine.build(config(data={"unseen_classes": None}, report={"source": None}))
    with pytest.raises(DataError, match="two classes"):
        Engine.build(config(data={"unseen_classes": 1}))
    with pytest.raises(ValueError, match=r"report\.discrimination=true"):
        config(report={"discrimination": False})
    with pytest.raises(ValueError, match="give one of them"):
        config(data={"classes": ["class_0", "class_1"]})
    with Engine.build(config(report={"discrimination": False, "source": None})) as engine:
        with pytest.raises(ConfigError, match=r"report\.discrimination=true"):
            engine.discrimination()
        assert engine.parts.held_out is None


def test_paths_do_not_depend_on_the_folder(config) -> None:
    settings = absolute_paths(config(report={"unseen": Path("here"), "source_classes": Path("t.csv")}))
    assert settings.report.unseen == Path("here").absolute()
    assert settings.report.source_classes == Path("t.csv").absolute()
