"""Settings beside which a method would silently be plain fine-tuning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mooring.comparison.plan import Comparison
from mooring.config.schema import RunConfig
from mooring.errors import ConfigError
from mooring.methods.without_effect import check_effect


def config(method: str | dict[str, Any], **train: Any) -> RunConfig:
    return RunConfig.model_validate({"data": "photos", "method": method, "train": train})


@pytest.mark.parametrize(
    ("method", "train", "says"),
    [
        ("stoch_norm", {"batchnorm": "frozen"}, "leave train.batchnorm out"),
        ({"name": "concept_tuning", "concept_start_epoch": 2}, {"epochs": 2}, "concept_start_epoch=2"),
        ({"name": "daft+concept_tuning", "concept_start_epoch": 2}, {"epochs": 2}, "concept_contrast=0"),
        ({"name": "soft_fine_tuning", "source": "distill", "source_images": 9}, {}, "method.source_images"),
    ],
)
def test_what_would_have_no_effect_is_refused(method: Any, train: dict[str, Any], says: str) -> None:
    if isinstance(method, dict) and "+" in method["name"]:
        method = {**method, "name": method["name"].split("+")}
    with pytest.raises(ConfigError, match=says):
        check_effect(config(method, **train))


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ("daft", "head's start and rate"),
        ({"name": "soft_fine_tuning", "source_bn": "shared"}, "source_bn=shared has no effect"),
    ],
)
def test_what_would_have_less_effect_is_said(method: Any, says: str) -> None:
    (note,) = check_effect(config(method, batchnorm="frozen"))
    assert says in note


@pytest.mark.parametrize(
    ("method", "train"),
    [
        ("stoch_norm", {}),
        ("stoch_norm", {"batchnorm": "train"}),
        ({"name": "daft", "conversion": False}, {"batchnorm": "frozen"}),
        ({"name": "concept_tuning", "concept_start_epoch": 1}, {"epochs": 2}),
        ({"name": "concept_tuning", "concept_start_epoch": 5, "concept_contrast": 0.0}, {"epochs": 2}),
        ({"name": "soft_fine_tuning", "source_bn": "shared"}, {"batchnorm": "train"}),
        ({"name": ["daft", "soft_fine_tuning"], "source_bn": "eval"}, {}),
        ("fine_tune", {"batchnorm": "frozen"}),
    ],
)
def test_the_rest_is_silent(method: Any, train: dict[str, Any]) -> None:
    assert check_effect(config(method, **train)) == []


def test_a_comparison_refuses_it_before_the_first_run(tmp_path: Path) -> None:
    words = ("data=photos", "train.batchnorm=frozen")
    with pytest.raises(ConfigError, match="stoch_norm draws"):
        Comparison(("fine_tune", "stoch_norm"), tmp_path, overrides=words).check()
