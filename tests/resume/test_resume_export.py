"""One model from what any number of ranks saved, by one process that has nothing else of the run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from other_ranks_cases import some_images
from ranks import RankPool, rank_pool
from resume_cases import METHODS, write_inputs
from safetensors.torch import load_file
from typer.testing import CliRunner

from mooring.cli import app
from mooring.errors import RunFolderError
from mooring.models.front_door import with_front_door
from mooring.models.torchvision_shim import import_timm
from mooring.parsing import parse_json
from mooring.train.exporting import export_saved

STOP = 4
# what always runs: a second head, folded statistics, resources that are not there any more
ALWAYS = ("concept_tuning", "linear_probe", "tes")
ROUNDING = {"rtol": 1e-4, "atol": 1e-5}  # of timm's own classifier, and of a mean over ranks


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("inputs")
    with pytest.MonkeyPatch.context() as patch:  # before the ranks start: they inherit it
        patch.setenv("MOORING_CACHE", str(tmp_path_factory.mktemp("cache")))
        write_inputs(folder, world=2)
        yield folder


@pytest.fixture(scope="module")
def one_rank(inputs: Path) -> Any:
    with rank_pool(1) as pool:
        yield pool


def elsewhere(run: Path, inputs: Path, to: Path) -> Path:
    """Of the run only what it is restored from, with paths that lead nowhere."""
    for name in ("checkpoints", "manifest"):
        shutil.copytree(run / name, to / name)
    (to / "config.toml").write_text((run / "config.toml").read_text().replace(str(inputs), "/nowhere"))
    return to


def answers(folder: Path) -> torch.Tensor:
    model = import_timm().create_model(f"local-dir:{folder}", pretrained=True)
    model = with_front_door(model, folder, parse_json((folder / "config.json").read_text())["mooring"])
    with torch.no_grad():
        return model.eval()(some_images()).float()


def exported(source: Path, out: Path) -> str:
    done = CliRunner(env={"COLUMNS": "300"}).invoke(app, ["export", str(source), "--out", str(out)])
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_checkpoint_of_two_ranks_gives_their_logits(
    two_ranks: RankPool, inputs: Path, tmp_path: Path, stage: int
) -> None:
    """With a weight average, and BatchNorm statistics of each rank's own."""
    run = tmp_path / "run"
    backend = {
        "name": "deepspeed",
        "zero_stage": stage,
        "deepspeed_config": str(inputs / "divided.json"),
    }
    logits = two_ranks.run(
        "other_ranks_cases:logits_at", stop=STOP, inputs=str(inputs), out=str(run),
        method="dr_tune", backend=backend, batchnorm="train", train={"sync_batchnorm": False},
    )  # fmt: skip
    torch.testing.assert_close(logits[0], logits[1])
    there = elsewhere(run, inputs, tmp_path / "there")
    assert f"step {STOP} (for the export)" in exported(there, tmp_path / "model")
    torch.testing.assert_close(answers(tmp_path / "model"), logits[0], **ROUNDING)
    exported(there / "checkpoints" / f"step-{STOP}", tmp_path / "again")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "again"))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("average", [{}, {"ema_decay": None}], ids=["averaged", "plain"])
@pytest.mark.parametrize(
    "method",
    [pytest.param(m, marks=() if m in ALWAYS else pytest.mark.slow) for m in (*METHODS, "daft+lwf")],
)
def test_of_every_method(
    one_rank: RankPool, inputs: Path, tmp_path: Path, method: str, average: dict[str, Any]
) -> None:
    run = tmp_path / "run"
    (logits,) = one_rank.run(
        "other_ranks_cases:logits_at", stop=STOP, inputs=str(inputs), out=str(run),
        method=method, backend={"name": "local"}, train=average,
    )  # fmt: skip
    exported(elsewhere(run, inputs, tmp_path / "there"), tmp_path / "model")
    torch.testing.assert_close(answers(tmp_path / "model"), logits, **ROUNDING)


def test_a_finished_run_gives_the_model_it_has(two_ranks: RankPool, inputs: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    backend = {
        "name": "deepspeed",
        "zero_stage": 3,
        "deepspeed_config": str(inputs / "divided.json"),
    }
    two_ranks.run(
        "other_ranks_cases:part", inputs=str(inputs), out=str(run), method="concept_tuning", backend=backend
    )
    assert "the best epoch" in exported(run, tmp_path / "model")
    files = [sorted(file.name for file in folder.iterdir()) for folder in (run / "model", tmp_path / "model")]
    assert files[0] == files[1] and "model.safetensors" in files[0]
    for name in [name for name in files[0] if name.endswith(".safetensors")]:
        own, again = (load_file(folder / name) for folder in (run / "model", tmp_path / "model"))
        assert own.keys() == again.keys() and all(torch.equal(own[k], again[k]) for k in own)
    assert (run / "model" / "config.json").read_text() == (tmp_path / "model" / "config.json").read_text()
    with pytest.raises(RunFolderError, match="new or empty folder"):
        export_saved(run, tmp_path / "model")
    shutil.rmtree(run / "best")
    newest = max((run / "checkpoints").glob("step-*"))
    weights = newest / "shared.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(RunFolderError, match="is damaged: expected"):
        export_saved(newest, tmp_path / "no")
    with pytest.raises(RunFolderError, match="expected a checkpoint that was written to its end"):
        export_saved(run / "checkpoints" / "step-77", tmp_path / "no")
    with pytest.raises(RunFolderError, match="expected a run folder"):
        export_saved(tmp_path / "nothing", tmp_path / "no")
    assert not (tmp_path / "no").exists()
