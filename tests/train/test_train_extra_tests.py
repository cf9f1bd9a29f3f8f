"""Further test sets and the distortion of features: measured once, on the selected weights, never before."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from mooring import Engine
from mooring.data.batch import Batch
from mooring.errors import ConfigError, DataError
from mooring.report.metrics_log import read_metrics
from mooring.train.distortion import feature_distortion
from mooring.train.inference import load_run


def test_each_is_measured_once_at_the_selected_epoch(make_config, elsewhere: Path, photos: Path) -> None:
    config = make_config(
        data={"extra_test": {"far": elsewhere, "near": photos}}, report={"distortion": True, "plots": False}
    )
    result = Engine.build(config).fit()
    assert result.test is not None and list(result.extra_tests) == ["far", "near"]
    assert result.extra_tests["far"].n == 15
    # the run's own test split under another name: the same weights, the same numbers
    assert result.extra_tests["near"].scalars() == result.test.scalars()
    assert result.distortion["test/near"] == result.distortion["test"]
    again = load_run(result.run).evaluate(elsewhere)
    assert torch.equal(again.confusion, result.extra_tests["far"].confusion)
    record = json.loads((result.run / "result.json").read_text(encoding="utf-8"))
    assert record["extra_tests"] == {n: r.scalars() for n, r in result.extra_tests.items()}
    assert set(record["distortion"]) == {"val", "test", "test/far", "test/near"}
    assert all(0 < d["feature_cosine"] <= 1 for d in record["distortion"].values())
    kinds = [r.kind for r in read_metrics(result.run)]
    assert [kinds.count(k) for k in ("test", "test/far", "test/near")] == [1, 1, 1]

    # a finished run that is resumed looks at none of them again, but at one that is new
    config = make_config(
        data={"extra_test": {"far": elsewhere, "new": photos}}, resume="auto", report={"plots": False}
    )
    resumed = Engine.build(config).fit()
    assert resumed.extra_tests["new"].scalars() == result.test.scalars()
    kinds = [r.kind for r in read_metrics(result.run)]
    assert [kinds.count(k) for k in ("test/far", "test/new")] == [1, 1]


def test_a_run_that_is_not_tested_looks_at_none(make_config, elsewhere: Path) -> None:
    config = make_config(
        data={"extra_test": {"far": elsewhere}},
        train={"epochs": 1},
        report={"distortion": True, "plots": False},
    )
    result = Engine.build(config).fit(test=False)
    assert result.test is None and not result.extra_tests and set(result.distortion) == {"val"}
    assert not any(record.kind.startswith("test") for record in read_metrics(result.run))


def test_what_cannot_be_measured_is_refused_before_any_training(
    make_config, other_classes: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"data\.extra_test\.far: .*got nothing there"):
        Engine.build(make_config(data={"extra_test": {"far": tmp_path / "missing"}}))
    with pytest.raises(DataError, match=r"data\.extra_test\.far: .*class_3"):
        Engine.build(make_config(data={"extra_test": {"far": other_classes}}))
    assert not (tmp_path / "run").exists()


def test_distortion_is_a_mean_cosine_and_a_mean_distance() -> None:
    g = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 12, 5, generator=g)
    before, after = (nn.Sequential(nn.Flatten(), nn.Linear(12, 5, bias=False)) for _ in range(2))
    with torch.no_grad():
        before[1].weight.copy_(first.T)
        after[1].weight.copy_(second.T)
    batches, cosines, distances = [], [], []
    for rows in (4, 3):
        images = torch.randn(rows, 3, 2, 2, generator=g)
        ids = torch.arange(rows)
        ids[-1] = -1  # padding
        batches.append(Batch(images, ids, ids))
        for image in images[:-1].flatten(1).double():
            old, new = image @ first.double(), image @ second.double()
            cosines.append(float(old @ new / old.norm() / new.norm()))
            distances.append(float((new - old).norm()))
    found = feature_distortion(before, after, batches, "cpu")
    assert found.n == 5
    assert found.cosine == pytest.approx(sum(cosines) / 5, rel=1e-5)
    assert found.distance == pytest.approx(sum(distances) / 5, rel=1e-5)
    same = feature_distortion(before, before, batches, "cpu")
    assert (same.cosine, same.distance) == (pytest.approx(1), 0)
    with pytest.raises(DataError, match="no image"):
        feature_distortion(before, after, [], "cpu")


def test_distortion_has_to_be_asked_for(make_config) -> None:
    with Engine.build(make_config()) as engine, pytest.raises(ConfigError, match=r"report\.distortion=true"):
        engine.distortion(engine.val_source)
