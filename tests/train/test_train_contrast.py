"""Bi-Tuning and Core-tuning in the engine: views from the data source, and what a resumed run needs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mooring import Engine
from mooring.errors import ConfigError

METHODS = {"bi_tuning": {"queue_rows": 3, "embed_width": 16}, "core_tuning": {"contrast_width": 16}}


def steps(engine: Engine, count: int) -> list[float]:
    losses: list[float] = []
    while len(losses) < count:
        for group in engine.epoch_groups():
            losses.append(float(engine.step(group).loss))
            if len(losses) == count:
                break
    return losses


@pytest.mark.parametrize("method", METHODS)
def test_state_taken_mid_epoch_continues_bit_for_bit(make_config, tmp_path: Path, method: str) -> None:
    config = make_config(
        method={"name": method, **METHODS[method]},
        train={"accumulate": 2, "batch_size": 3, "batchnorm": "train"},
    )
    with Engine.build(config) as whole:
        wanted = steps(whole, 8)
    with Engine.build(config) as first:
        steps(first, 3)
        ref = first.save("test")
    torch.randn(100)  # another process would have another random position
    with Engine.build(config.model_copy(update={"resume": "auto"})) as second:
        second.resume(ref)
        assert steps(second, 5) == wanted[3:]
    for (name, a), b in zip(
        whole.method.state_dict().items(), second.method.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name
    if method == "bi_tuning":
        assert torch.equal(whole.method.queue.fingerprint(), second.method.queue.fingerprint())


@pytest.mark.parametrize("method", METHODS)
def test_mixup_of_images_is_refused(make_config, method: str) -> None:
    with pytest.raises(ConfigError, match=r"does not define mixup.*one label a row"):
        Engine.build(make_config(method={"name": method}, train={"mixup": 0.2}))
