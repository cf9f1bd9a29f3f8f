"""A recommendation on generated photos: what it measures, what it says, what it leaves alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from mooring.advice.recommend import recommend
from mooring.cli import app
from mooring.errors import ConfigError


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("MOORING_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    for c in range(2):
        folder = tmp_path / "photos" / f"class_{c}"
        folder.mkdir(parents=True)
        for i in range(10):
            pixels = np.clip(90 + 60 * c + rng.normal(0, 30, (36, 40, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
    return [
        f"data={tmp_path / 'photos'}", "data.source=torch", "data.workers=1", "data.val_fraction=0.3",
        "model.name=resnet10t", "model.weights=none", "train.image_size=32", "train.eval_size=32",
        "train.device=cpu", "train.epochs=1", "report.progress=plain",
    ]  # fmt: skip


def test_the_command_tells_what_it_measured(words: list[str], tmp_path: Path) -> None:
    before = {path.name for path in tmp_path.iterdir()}
    result = CliRunner(env={"COLUMNS": "200"}).invoke(
        app, ["recommend", *words, "--methods", "fine_tune", "--minutes", "3"]
    )
    assert result.exit_code == 0, result.output
    for text in (
        "a linear probe on its frozen features gets", "14 training images", "LogME", "race: 7 images per class",
        "linear_probe on the race's images alone", "fine_tune: ", "6 validation images, one seed",
        "begin with", "mooring train data=",
    ):  # fmt: skip
        assert text in result.stdout, text
    assert {path.name for path in tmp_path.iterdir()} - before == {"cache"}, "the race leaves nothing behind"


def test_without_time_there_is_no_race_and_no_certainty(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mooring.advice.recommend.run_comparison", None)
    found = recommend(None, words, minutes=1e-6)
    assert list(found.race) == ["linear_probe"]
    assert found.sure == "undecided"
    assert any("give more --minutes" in reason for reason in found.reasons)


def test_a_model_without_weights_here_is_left_out(words: list[str]) -> None:
    found = recommend(None, words, models=["resnet10t", "no_such_model"], minutes=1e-6)
    assert [score.model for score in found.models] == ["resnet10t"]
    assert any(reason.startswith("no_such_model is left out") for reason in found.reasons)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (["method=dr_tune"], {}, "leave it out"),
        (["out=x"], {}, "leave it out"),
        ([], {"minutes": 0.0}, "more than 0"),
        ([], {"models": ["no_such_model", "nor_this"]}, "none of them can be used"),
    ],
)
def test_what_cannot_be_recommended_on_is_refused(
    words: list[str], change: list[str], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        recommend(None, [*words, *change], **options)
