"""DeepSpeed's settings: what the run decides, what a user may add, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mooring.config.schema import RunConfig
from mooring.errors import ConfigError
from mooring.train.deepspeed_config import deepspeed_config


def settings(tmp_path: Path, given: Any = None, **tables: Any) -> dict[str, Any]:
    backend = tables.pop("backend", {})
    if given is not None:
        file = tmp_path / "deepspeed.json"
        file.write_text(given if isinstance(given, str) else json.dumps(given))
        backend |= {"deepspeed_config": str(file)}
    return deepspeed_config(RunConfig.model_validate({"data": "photos", "backend": backend, **tables}))


def test_what_the_run_decides(tmp_path: Path) -> None:
    found = settings(
        tmp_path,
        backend={"zero_stage": 3, "offload_optimizer": True, "offload_parameters": True},
        train={"clip_grad_norm": 1.5},
    )
    assert found["zero_optimization"] == {
        "stage": 3,
        "offload_optimizer": {"device": "cpu"},
        "offload_param": {"device": "cpu"},
    }
    assert found["gradient_clipping"] == 1.5
    # at stage 0 the backend clips by itself
    assert (
        settings(tmp_path, backend={"zero_stage": 0}, train={"clip_grad_norm": 1.5})["gradient_clipping"]
        == 0.0
    )


def test_what_a_user_may_add(tmp_path: Path) -> None:
    found = settings(
        tmp_path, {"zero_optimization": {"reduce_bucket_size": 1000}, "wall_clock_breakdown": True}
    )
    assert found["zero_optimization"] == {"stage": 1, "reduce_bucket_size": 1000}
    assert found["wall_clock_breakdown"] is True


def test_all_contradictions_are_named_at_once(tmp_path: Path) -> None:
    given = {
        "optimizer": {"type": "Adam"},
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 2},
        "elasticity": {},
        "misspelt": 1,
    }
    with pytest.raises(ConfigError) as caught:
        settings(tmp_path, given, backend={"offload_parameters": True}, optimizer={"name": "lamb"})
    for words in (
        "optimizer.name=lamb needs whole parameters",
        "offload_parameters needs backend.zero_stage=3; got 1",
        "optimizer is not for it to decide: set optimizer.name",
        "bf16 is not for it to decide: set train.precision",
        "zero_optimization.stage is not for it to decide: set backend.zero_stage",
        "elasticity is not for it to decide with this engine",
        "unknown or unsupported setting misspelt",
    ):
        assert words in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_a_file_that_is_no_table_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="expected a JSON"):
        settings(tmp_path, text)


def test_offloading_needs_something_divided(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"offload_optimizer needs backend\.zero_stage of 1 or more"):
        settings(tmp_path, backend={"zero_stage": 0, "offload_optimizer": True})
