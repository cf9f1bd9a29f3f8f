"""DAFT inside the engine: rates, averages, and a continued run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mooring import Engine
from mooring.errors import ConfigError


def steps(engine: Engine, count: int) -> list[float]:
    losses: list[float] = []
    while True:
        for group in engine.epoch_groups():
            if len(losses) == count:
                return losses
            losses.append(float(engine.step(group).loss))


def head_rate(engine: Engine) -> float:
    return next(float(g["lr"]) for g in engine.optimizer.param_groups if g["role"] == "head")


def test_a_run_continues_bit_for_bit_and_converts_once(make_config, tmp_path: Path) -> None:
    options: dict = {
        "method": {"name": "daft"},
        "optimizer": {"name": "sgd", "lr": 1e-3},
        "train": {"ema_decay": 0.9},
    }
    whole = Engine.build(make_config(**options))
    steps(whole, 2)
    ref = whole.save("test")
    rest = steps(whole, 3)
    part = Engine.build(make_config(**options, resume="auto"))
    part.resume(ref)
    assert steps(part, 3) == rest
    assert head_rate(part) == head_rate(whole)
    assert part.head_lr == whole.head_lr > 0.1  # from the features, not five times the encoder's 0.001
    for (name, a), b in zip(
        part.method.state_dict().items(), whole.method.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name
    assert part.ema is not None and whole.ema is not None
    assert all(torch.equal(a, whole.ema.parameters[n]) for n, a in part.ema.parameters.items())


@pytest.mark.parametrize("transform", ["train", "clean"])
def test_the_average_starts_converted_and_batchnorm_trains(make_config, transform: str) -> None:
    config = make_config(method={"name": "daft", "calib_transform": transform}, train={"ema_decay": 0.9})
    with Engine.build(config) as engine:
        before = {n: p.detach().clone() for n, p in engine.method.named_parameters()}
        engine.prepare()
        assert engine.ema is not None
        for name, parameter in engine.method.named_parameters():
            assert torch.equal(engine.ema.parameters[name], parameter), name
        changed = {n for n, p in engine.method.named_parameters() if not torch.equal(p, before[n])}
        assert changed and all(engine.method.get_parameter(n).ndim == 1 for n in changed)
        engine.method.train()
        layers = [m for m in engine.method.encoder.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        assert layers and all(layer.training for layer in layers)


def test_the_heads_rate_is_the_one_that_was_written(make_config) -> None:
    options: dict = {"schedule": {"name": "constant", "warmup_epochs": 0.0}, "optimizer": {"lr": 1e-3}}
    with Engine.build(make_config(method={"name": "daft", "head_lr": 0.25}, **options)) as engine:
        assert engine.plan().head_lr == engine.head_lr == pytest.approx(0.25)
        steps(engine, 1)
        assert head_rate(engine) == pytest.approx(0.25)
    options["optimizer"] = {"name": "sgd", "head_lr_multiplier": 2.0}
    for head_lr in (0.25, "auto"):
        with pytest.raises(ConfigError, match=r"leave out optimizer\.head_lr_multiplier"):
            Engine.build(make_config(method={"name": "daft", "head_lr": head_lr}, **options))
    Engine.build(make_config(method={"name": "daft", "head_lr": None}, **options)).close()
