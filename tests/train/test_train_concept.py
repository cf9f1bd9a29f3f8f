"""A run of Concept-Tuning: validation decides how it predicts, and the run folder predicts in that way."""

from __future__ import annotations

import json

import pytest
import torch

from mooring.train.engine import Engine
from mooring.train.inference import load_run

SETTINGS = {"name": "concept_tuning", "queue_rows": 2, "bottleneck": 16, "transport_rounds": 3}


@pytest.mark.parametrize(("predict", "ema"), [("auto", 0.9), ("avg", None)])
def test_the_run_folder_predicts_as_the_run_did(make_config, predict: str, ema: float | None) -> None:
    config = make_config(method=SETTINGS | {"predict": predict}, train={"ema_decay": ema})
    engine = Engine.build(config)
    result = engine.fit()
    chosen = engine.method.chosen
    described = json.loads((result.run / "model" / "config.json").read_text())["mooring"]
    assert described.get("predict", "cls") == chosen
    again = load_run(result.run).evaluate(None, "test")
    assert again.top1 == result.test.top1
    assert again.nll == pytest.approx(result.test.nll, rel=1e-4)


def test_validation_takes_the_best_way(make_config) -> None:
    with Engine.build(make_config(method=SETTINGS | {"predict": "auto"}, train={"ema_decay": 0.9})) as engine:
        engine.prepare()
        with torch.no_grad():
            for weights in (engine.method.front_door.classifier, engine.method.head):
                weights.weight.zero_()
                weights.bias.zero_()
        engine.ema.copy_from(engine.method)
        # all say the same: the first wins; a constant answer with confidence in one class loses on nll
        assert next(iter(engine.validate())) == "cls" == engine.method.chosen
        with torch.no_grad():
            engine.method.head.bias[0] += 50
        engine.ema.copy_from(engine.method)
        results = engine.validate()
        assert next(iter(results)) == "fd" == engine.method.chosen
        assert set(results) == {"cls", "fd", "avg"}
        with engine.ema.applied_to(engine.method):
            assert engine.method.chosen == "fd"
